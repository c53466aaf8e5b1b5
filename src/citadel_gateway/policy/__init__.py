"""Decisions: pure and synchronous; time, randomness and cost are arguments."""

"""Reloads and restarts under load: `python -m tests.restarts --reloads 100 --rolling 20`."""

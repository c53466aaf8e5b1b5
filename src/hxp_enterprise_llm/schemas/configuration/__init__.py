"""Configuration schemas."""

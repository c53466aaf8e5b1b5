"""The unified API gateway."""

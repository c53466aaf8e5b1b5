"""Adapters to the outside: sockets, clocks, logs and metrics."""

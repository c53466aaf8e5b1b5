"""The gateway itself, assembled from policies and adapters."""

"""Many processes are one gateway: `python -m tests.many`."""

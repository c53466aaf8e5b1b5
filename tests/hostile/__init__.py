"""A hostile client's view of the server: a real process, real sockets, and nothing it may break.

`python -m tests.hostile --help` is the long run; `test_hostile.py` is a short one.
"""

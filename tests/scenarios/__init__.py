"""What becomes of a request when an engine fails: a benchmark for any gateway, run from outside.

Sixteen scenarios after the field's public failure benchmark, and some more.  Engines are scripted
and keep a ledger, clients keep another, everything speaks over loopback, and the clock is the
wall's.  `python -m tests.scenarios --help` runs it; `test_scenarios.py` runs it against this
gateway in the test suite.

Durations are written in the benchmark's own seconds and shrunk by a pace: at 0.1, a gateway that
is given 30 seconds gets three.  Only what a header says in whole seconds (`Retry-After`) stays.
"""

"""Many gateways on one store, in virtual time: ``python -m bench.fleet``."""

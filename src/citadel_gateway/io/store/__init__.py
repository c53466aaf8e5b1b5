"""Where several gateways keep what must be one for all of them."""

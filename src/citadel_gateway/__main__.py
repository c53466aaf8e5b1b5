"""``python -m citadel_gateway`` is ``citadel-gateway``."""

from citadel_gateway.cli import main

main()

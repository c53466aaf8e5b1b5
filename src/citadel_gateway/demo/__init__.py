"""What `citadel-gateway demo` starts beside the gateway, so that it can be tried on one machine."""


class EngineFailed(Exception):
    """An engine could not be started."""

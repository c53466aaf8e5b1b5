"""``citadel-gateway keygen``: a new API key, and what to put into the configuration for it."""

from __future__ import annotations

import click

from citadel_gateway.policy.auth import generate_key


@click.command()
@click.argument("key_id", metavar="ID")
def keygen(key_id: str) -> None:
    """Make an API key called ID.  The key is shown once; the file holds only its hash."""
    key, digest = generate_key(key_id)
    click.echo(f"key (give it to the client; it is not stored anywhere):\n  {key}\n")
    click.echo(f"configuration, under security.api_keys:\n  - id: {key_id}\n    sha256: {digest}")

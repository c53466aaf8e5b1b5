"""``citadel-gateway keygen``: a new API key, and what to put into the configuration for it."""

from __future__ import annotations

import re

import click

from citadel_gateway.policy.auth import generate_key

_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")  # part of the key, which travels in a header


@click.command()
@click.argument("key_id", metavar="ID")
def keygen(key_id: str) -> None:
    """Make an API key called ID.  The key is shown once; the file holds only its hash."""
    if not _ID.fullmatch(key_id):
        raise click.UsageError("ID may hold up to 128 letters, digits, dots, dashes, underscores.")
    key, digest = generate_key(key_id)
    click.echo(f"key (give it to the client; it is not stored anywhere):\n  {key}\n")
    click.echo(f'configuration, under security.api_keys:\n  - id: "{key_id}"\n    sha256: {digest}')

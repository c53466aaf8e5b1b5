"""``citadel-gateway check``: is this configuration right, and what does it come to?"""

from __future__ import annotations

import os
from collections.abc import Iterator

import click

from citadel_gateway.cli.common import load_or_exit
from citadel_gateway.config.endpoint_list import read_endpoints
from citadel_gateway.config.json_schema import dumps
from citadel_gateway.config.loader import ConfigError
from citadel_gateway.config.remarks import remarks
from citadel_gateway.config.schema import GatewayConfigSchema
from citadel_gateway.config.show import effective_yaml


@click.command()
@click.option("--config", "-c", "config_path", metavar="FILE", help="The configuration file.")
@click.option("--schema", is_flag=True, help="Print the JSON Schema of the file instead.")
def check(config_path: str | None, schema: bool) -> None:
    """Print the effective configuration, secrets masked; or every error, and exit with 78.

    What is right and hardly meant is remarked on standard error, and so is what is wrong with files
    that list endpoints: a gateway starts without them.
    """
    if schema:
        click.echo(dumps(), nl=False)
    elif config_path is None:
        raise click.UsageError("Missing option '--config' / '-c'.")
    else:
        config = load_or_exit(config_path)
        for remark in (*remarks(config), *_problems_of_files(config)):
            click.echo(f"remark: {remark}", err=True)
        click.echo(effective_yaml(config), nl=False)


def _problems_of_files(config: GatewayConfigSchema) -> Iterator[str]:
    for name, model in config.models.items():
        if model.endpoints_file is not None:
            try:
                read_endpoints(model.endpoints_file, model, os.environ)
            except ConfigError as exc:
                path = f"models.{name}.endpoints_file"
                yield from (f"{path}: {exc.source}: {problem}" for problem in exc.problems)

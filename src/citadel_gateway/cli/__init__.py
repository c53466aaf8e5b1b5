"""The command line.

Exit codes: 0 fine, 1 not fine, 2 wrong usage, 69 unreachable or port taken, 78 bad configuration.
"""

from __future__ import annotations

import click

from citadel_gateway.cli.check import check
from citadel_gateway.cli.demo import demo
from citadel_gateway.cli.endpoints import cordon, drain, uncordon
from citadel_gateway.cli.keygen import keygen
from citadel_gateway.cli.route import route
from citadel_gateway.cli.serve import serve
from citadel_gateway.cli.sim import sim
from citadel_gateway.cli.status import status


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="citadel-gateway")
def main() -> None:
    """One OpenAI-compatible address in front of your own language-model servers."""


for _command in (serve, check, demo, sim, status, route, cordon, drain, uncordon, keygen):
    main.add_command(_command)

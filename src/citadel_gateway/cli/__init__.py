"""The command line.

Exit codes: 0 fine, 1 not fine, 2 wrong usage, 69 unreachable or port taken, 78 bad configuration.
"""

from __future__ import annotations

from importlib import import_module

import click

# By the module of `citadel_gateway.cli` that has it, and is imported when it is called.
_COMMANDS = {
    "serve": "serve",
    "check": "check",
    "demo": "demo",
    "sim": "sim",
    "status": "status",
    "route": "route",
    "cordon": "endpoints",
    "drain": "endpoints",
    "uncordon": "endpoints",
    "add": "endpoints",
    "remove": "endpoints",
    "keygen": "keygen",
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  # click's
        return [*_COMMANDS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = getattr(
            import_module(f"{__name__}.{_COMMANDS[cmd_name]}"), cmd_name
        )
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="citadel-gateway")
def main() -> None:
    """One OpenAI-compatible address in front of your own language-model servers."""

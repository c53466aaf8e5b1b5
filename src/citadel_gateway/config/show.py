"""The configuration as it took effect: file, variables and defaults together, without secrets."""

from __future__ import annotations

import io
from typing import Any

from cattrs import Converter
from ruamel.yaml import YAML

from citadel_gateway.config.schema import GatewayConfigSchema
from citadel_gateway.config.values import Secret, Sha256

MASK = "********"


def effective_yaml(config: GatewayConfigSchema) -> str:
    """Every option with its value; a valid configuration file but for the masks."""
    yaml: Any = YAML(typ="safe", pure=True)  # ruamel types its settings as None
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # the schema's order, models in the file's
    yaml.allow_unicode = True
    yaml.width = 4096  # one line per value, for grep
    # Otherwise equal tuples are written once and referred to, as in `&id001`.
    yaml.representer.ignore_aliases = lambda _: True
    text = io.StringIO()
    yaml.dump(_converter().unstructure(config), text)
    return text.getvalue()


def _converter() -> Converter:
    converter = Converter(unstruct_collection_overrides={tuple: list})
    for hidden in (Secret, Sha256):
        # By declared type, so that a new option of these types is hidden, too.
        converter.register_unstructure_hook(hidden, lambda _: MASK)
    return converter

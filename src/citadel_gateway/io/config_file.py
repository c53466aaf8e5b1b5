"""The configuration file: what is in it, and whether that is still so.

Whoever changes a file may write it in place, put another one in its place, or turn a symbolic link
elsewhere.  All of these change what ``stat`` says of the path.  Nobody tells us when a writer is
done, so a change counts once the file has looked the same twice.
"""

from __future__ import annotations

import hashlib
import os
from typing import TypeAlias

import attrs

from citadel_gateway.config.loader import load_text, read_text
from citadel_gateway.config.schema import GatewayConfigSchema

Stamp: TypeAlias = tuple[int, int, int, int] | None
"""Device, inode, time of change and size of a file; ``None`` while there is none."""


@attrs.define(eq=False)
class ConfigFile:
    """A configuration file, and the TLS files that it names.  Every method may block on a disk."""

    path: str
    text: str = attrs.field(default="", init=False, repr=False)  # what was last read
    digest: str = attrs.field(default="", init=False)  # its SHA-256
    _files: tuple[str, ...] = attrs.field(init=False)
    _loaded: dict[str, Stamp] = attrs.field(factory=dict, init=False)
    _last: dict[str, Stamp] = attrs.field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        self._files = (self.path,)

    def load(self) -> GatewayConfigSchema:
        """The configuration, with the environment laid over it.  Raises ``ConfigError``."""
        self._loaded = self._look()  # before it is read: what is written meanwhile is a change
        self.text = read_text(self.path)
        self.digest = hashlib.sha256(self.text.encode()).hexdigest()
        config = load_text(self.text, source=self.path, environ=os.environ)
        self._files = (self.path, *_tls_files(config))
        self._loaded = {**self._look(), **self._loaded}
        return config

    def has_changed(self) -> bool:
        """Whether something else than was loaded is there, for good and not just half of it."""
        before, self._last = self._last, self._look()
        return (
            self._last == before
            and self._last[self.path] is not None
            and any(self._loaded.get(file) != stamp for file, stamp in self._last.items())
        )

    def _look(self) -> dict[str, Stamp]:
        return {file: stamp_of(file) for file in self._files}


def stamp_of(path: str) -> Stamp:
    """What there is at *path*, to be told apart from what there was; may block on a disk."""
    try:
        found = os.stat(path)  # noqa: PTH116  # that of what a link points to
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def _tls_files(config: GatewayConfigSchema) -> list[str]:
    """Certificates and keys: their names stay when they are renewed."""
    used = [tls for endpoint in config.all_endpoints() if (tls := endpoint.tls) is not None]
    files = [config.service.tls_certfile, config.service.tls_keyfile]
    for tls in used:
        files += [tls.ca_file, tls.cert_file, tls.key_file]
    return list(dict.fromkeys(file for file in files if file))

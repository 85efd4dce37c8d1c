"""The server's folder of LoRA adapters: names that requests may use → files. Knows not what is in them, nor torch."""

from __future__ import annotations

import re
from pathlib import Path
from stat import S_ISREG

from flux_local.errors import InvalidValue, NotFound, WeightsError
from flux_local.model.headers import safetensors_header

SUFFIX = ".safetensors"
NAME = re.compile(r"[^/\\\x00-\x1f.][^/\\\x00-\x1f]{0,150}")
"""A file's, without its suffix: no path, and nothing hidden."""
LISTED = 500
"""Bytes of names at most in an error's message."""


def find(folder: Path, chosen: tuple[tuple[str, float], ...]) -> tuple[tuple[str, float, int], ...]:
    """Path, scale and version of each adapter chosen by name. Reads the files' headers.

    Raises:
        InvalidValue: a name that is a path or an address, or a file that is no whole safetensors file.
        NotFound: no such adapter.
    """
    return tuple(located(folder, name, scale) for name, scale in chosen)


def located(folder: Path, name: str, scale: float) -> tuple[str, float, int]:
    if not NAME.fullmatch(name):
        raise InvalidValue(
            "An adapter is chosen by the name of its file in this server's own folder, not by a path or an address.",
            param="loras",
        )
    path = folder / (name + SUFFIX)
    try:
        found = path.stat()
    except OSError:  # not there, a name too long for a file, a folder that may not be read
        found = None
    if found is None or not S_ISREG(found.st_mode):
        raise NotFound(f"This server has no such adapter. {known(folder)}", param="loras")
    try:
        whole = safetensors_header(path).size == found.st_size
    except (WeightsError, OSError):
        whole = False
    if not whole:
        raise InvalidValue(
            "An adapter cannot be used: its file is no whole safetensors file. Leave it out.", param="loras"
        )
    return str(path.resolve()), scale, found.st_mtime_ns


def known(folder: Path) -> str:
    """What there is, for a message."""
    names = sorted(path.stem for path in folder.glob(f"*{SUFFIX}") if NAME.fullmatch(path.stem))
    if not names:
        return "Its folder of adapters is empty."
    shown = ", ".join(names)
    while len(shown.encode(errors="replace")) > LISTED:
        shown = shown.rpartition(", ")[0]
    return f"It has: {shown or names[0][:50]}{'' if shown == ', '.join(names) else ' …'}"

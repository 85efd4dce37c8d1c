"""The files behind `url` answers: written whole or not at all, found by an unguessable id, gone when they expire."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import time
from collections.abc import Iterable
from pathlib import Path

from flux_local.errors import AlreadyTaken, NotFound, SettingsError, StorageFull

NAME = re.compile(r"[A-Za-z0-9_-]{32}\.(png|jpeg|gif|webp|avif)")


class Store:
    """A data directory that this process alone writes to.

    Args:
        folder: made if it is not there.
        lifetime: seconds for which a file stays.

    Raises:
        AlreadyTaken: another server uses the folder. SettingsError: it cannot be written.
    """

    def __init__(self, folder: Path, lifetime: int) -> None:
        self.files = folder / "files"
        self.lifetime = lifetime
        try:
            is_new = not folder.exists()
            self.files.mkdir(parents=True, exist_ok=True)
            if is_new:  # prompts and pictures are nobody else's on this machine
                folder.chmod(0o700)
            self.files.chmod(0o700)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise SettingsError(f"Cannot write to the data directory {folder}: {error.strerror}.") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise AlreadyTaken(
                f"Another flux-local server uses the data directory {folder}. Stop it, or choose another --data-dir."
            ) from None

    def close(self) -> None:
        os.close(self._lock)

    def save(self, data: bytes, extension: str) -> str:
        """Writes a file that a crash cannot leave half done; returns its name.

        Raises:
            StorageFull: no space, or the disk failed.
        """
        name = f"{secrets.token_urlsafe(24)}.{extension}"
        partial = self.files / f".{name}"
        try:
            with partial.open("wb") as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
            partial.rename(self.files / name)
            self._sync_folder()
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise StorageFull(
                "The server cannot store the picture. Ask for response_format=b64_json, or free space on the server."
            ) from error
        return name

    def renew(self, names: Iterable[str]) -> None:
        """Has files expire together, counted from now: an answer's first picture may be much older than its last."""
        for name in names:
            with contextlib.suppress(OSError):
                os.utime(self.files / name)

    def find(self, name: str) -> Path:
        """Raises `NotFound` for anything that is not the name of a file that has not expired."""
        if NAME.fullmatch(name):
            path = self.files / name
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime < self.lifetime:
                    return path
        raise gone()

    def load(self, name: str) -> bytes:
        """Raises `NotFound`, as `find`."""
        try:
            return self.find(name).read_bytes()
        except OSError as error:  # it went meanwhile
            raise gone() from error

    def remove(self, name: str) -> None:
        """The file is gone afterwards, if it ever was there."""
        if NAME.fullmatch(name):
            (self.files / name).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Deletes what has expired, and what a crash left half written."""
        for path in self.files.iterdir():
            with contextlib.suppress(OSError):
                age = time.time() - path.stat().st_mtime
                if age > self.lifetime or (path.name.startswith(".") and age > 60):
                    path.unlink()

    def _sync_folder(self) -> None:
        descriptor = os.open(self.files, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def gone() -> NotFound:
    return NotFound("There is no such picture, or it has expired.")

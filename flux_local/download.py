"""`flux-local download`: a gated model from the hub → a folder that serves, whole, checked, resumed where it stopped.

Transport, tokens and resuming are `huggingface_hub`'s; what is wanted, whether it fits, whether it arrived as the hub
says, and what to do when it did not, is decided here. Knows nothing of how a model is loaded.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flux_local import weights
from flux_local.errors import WeightsError

REPOSITORY = "black-forest-labs/FLUX.1-Krea-dev"
SUFFIXES = frozenset({".json", ".txt", ".model", ".safetensors"})
SPARE = 1 << 30
"""Bytes to leave free on the disk."""
TRIES = 2
"""Of a file that arrived with other bytes than the hub says."""

Report = Callable[[str, int], None]
"""Told of a file's name and of so many bytes more of it; fewer, where they have to come again."""


@dataclass(frozen=True)
class Plan:
    """What is to be fetched, and from which commit."""

    repository: str
    revision: str
    files: dict[str, weights.Recorded]
    page: str
    """Where a person accepts the model's licence."""
    whole: bool = True
    """Whether the files make up a model."""

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files.values())


class Denied(WeightsError):
    """The hub does not give the model to this token, or to nobody without one."""


def is_wanted(name: str) -> bool:
    """The licence, the index, and what the components' folders hold in the formats that are read here.

    Single-file copies of the weights, other frameworks' formats and pictures stay where they are.
    """
    if "/" not in name:
        return name == "model_index.json" or name.upper().startswith("LICENSE")
    return name.count("/") == 1 and Path(name).suffix in SUFFIXES


def plan(repository: str, revision: str | None, token: str | None, only: tuple[str, ...] = ()) -> Plan:
    """Asks the hub what there is, and whether this token may have it.

    Args:
        only: folders of it that are wanted; all, if none is named.

    Raises:
        Denied: the licence is not accepted, or the token is wrong or missing. WeightsError: no such repository, or one
            that holds no model of this kind, or no connection.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="flux-local")
    with Translated(repository, f"{api.endpoint}/{repository}", has_token=bool(token or default_token())):
        found = api.model_info(repository, revision=revision, files_metadata=True)
        api.auth_check(repository)
    files = {
        entry.rfilename: weights.Recorded(entry.size or 0, entry.lfs.sha256 if entry.lfs else None)
        for entry in found.siblings or ()
        if is_wanted(entry.rfilename)
    }
    if "model_index.json" not in files:
        raise WeightsError(f"{repository} holds no diffusers model: it has no model_index.json. Ask for another one.")
    if only:
        files = {name: file for name, file in files.items() if name.partition("/")[0] in only}
    return Plan(repository, found.sha or "main", files, f"{api.endpoint}/{repository}", whole=not only)


def default_token() -> str | None:
    """The token that the environment or `hf auth login` has left, if any."""
    from huggingface_hub import get_token

    return get_token()


def missing(plan: Plan, folder: Path) -> list[str]:
    """The files that are not there in their full size."""
    return [name for name, file in plan.files.items() if not has_size(folder / name, file.size)]


def has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def check_room(plan: Plan, folder: Path) -> None:
    """Raises `WeightsError` unless what is missing fits on the folder's disk."""
    there = folder
    while not there.exists():
        there = there.parent
    needed = sum(plan.files[name].size for name in missing(plan, folder)) + SPARE
    free = shutil.disk_usage(there).free
    if needed > free:
        raise WeightsError(
            f"The disk of {folder} has {free / 1e9:.1f} GB free; {needed / 1e9:.1f} GB are needed. "
            "Free some, or give another place with --to."
        )


def fetch(plan: Plan, folder: Path, token: str | None, report: Report = lambda name, count: None) -> None:
    """Fetches what is missing, checks every byte against the hub's figures, and writes a model's manifest.

    A second call goes on where the first one stopped.

    Raises:
        As `plan`; WeightsError, also where a file is not what the hub says, twice.
    """
    check_room(plan, folder)
    for name, file in plan.files.items():
        for attempt in range(TRIES):
            if not has_size(folder / name, file.size):
                fetch_file(plan, name, folder, token, report)
            else:
                report(name, file.size)
            if matches(folder / name, file):
                break
            report(name, -file.size)
            (folder / name).unlink(missing_ok=True)
            if attempt == TRIES - 1:
                raise WeightsError(
                    f"{name} arrived {TRIES} times with other bytes than {plan.repository} says it has, and was "
                    "deleted. A proxy on the way may change files; try another network."
                )
    if plan.whole:
        weights.write_manifest(folder, plan.repository, plan.revision, plan.files)
        weights.write_info(folder)
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def fetch_file(plan: Plan, name: str, folder: Path, token: str | None, report: Report) -> None:
    from huggingface_hub import hf_hub_download

    with Translated(plan.repository, plan.page, has_token=bool(token or default_token()), folder=folder):
        hf_hub_download(
            plan.repository, name, revision=plan.revision, local_dir=folder, token=token, library_name="flux-local",
            tqdm_class=meter(name, report), force_download=not (folder / name).exists(),
        )  # fmt: skip


def matches(path: Path, recorded: weights.Recorded) -> bool:
    """Whether a file has the recorded size and, where there is one, hash."""
    return has_size(path, recorded.size) and recorded.sha256 in (None, sha256_of(path))


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def meter(name: str, report: Report) -> Any:
    """A class with as much of tqdm's interface as the hub's library uses, that reports to `report`."""

    class Meter:
        _lock = threading.RLock()

        def __init__(self, *_: object, total: int | None = None, initial: int = 0, **__: object) -> None:
            self.total, self.n = total, initial
            report(name, initial)

        def update(self, count: float | None = 1) -> None:
            self.n += int(count or 0)
            report(name, int(count or 0))

        def __enter__(self) -> Meter:
            return self

        def __exit__(self, *_: object) -> None:
            self.close()

        def close(self) -> None:
            pass

        def refresh(self, *_: object, **__: object) -> None:
            pass

        set_description = set_postfix_str = refresh

        @classmethod
        def get_lock(cls) -> threading.RLock:
            return cls._lock

        @classmethod
        def set_lock(cls, lock: Any) -> None:
            cls._lock = lock

    return Meter


class Translated:
    """Turns what the hub's library raises into a `WeightsError` that says what to do."""

    def __init__(self, repository: str, page: str, has_token: bool, folder: Path | None = None) -> None:
        self.repository, self.page, self.has_token, self.folder = repository, page, has_token, folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, Exception) or isinstance(error, WeightsError):
            return
        raise self.translation(error) from error

    def translation(self, error: Exception) -> WeightsError:
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

        response = getattr(error, "response", None)
        status = response.status_code if response is not None else 0
        if status == 401 and self.has_token:
            return Denied("The hub does not know this token. Make a new one with read access, and set HF_TOKEN to it.")
        if isinstance(error, GatedRepoError) or status in (401, 403):
            accept = f"Open {self.page} with a browser, sign in and accept the licence"
            if self.has_token:
                return Denied(
                    f"The account of this token may not have {self.repository} yet. {accept}; then run this again."
                )
            return Denied(
                f"{self.repository} is only given to accounts that accepted its licence. {accept}; make a token with "
                "read access there, set HF_TOKEN to it, and run this again."
            )
        if isinstance(error, RepositoryNotFoundError):
            return WeightsError(f"The hub has no {self.repository}. Check the name.")
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return WeightsError(
                f"The disk of {self.folder} is full. Free some, and run this again: it goes on where it stopped."
            )
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS):
            return WeightsError(
                f"Cannot write to {self.folder}: {os.strerror(error.errno)}. Give another place with --to."
            )
        if isinstance(error, HfHubHTTPError) and status:
            return WeightsError(
                f"The hub answered {status} for {self.repository}. Run this again later: it goes on where it stopped."
            )
        return WeightsError(
            f"The connection to the hub failed ({type(error).__name__}). Run this again: it goes on where it stopped."
        )


def altered(folder: Path, report: Report = lambda name, count: None) -> Iterable[str]:
    """The files of the folder's manifest whose bytes are not those recorded, one by one as they are read."""
    for name, recorded in weights.manifest(folder).items():
        if not matches(folder / name, recorded):
            yield name
        report(name, recorded.size)

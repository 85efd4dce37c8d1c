"""`flux-local download`: a gated model from the hub → a folder that serves, whole, checked, resumed where it stopped.

What the hub has, and who may have it, `huggingface_hub` finds out. The files themselves are fetched here, into parts
that outlive the process: the library throws away what it has of a file when it is interrupted, and a shard has 10 GB.
Knows nothing of how a model is loaded.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import httpx

import flux_local
from flux_local import weights
from flux_local.errors import WeightsError

SUFFIXES = frozenset({".json", ".txt", ".model", ".safetensors"})
SPARE = 1 << 30
"""Bytes to leave free on the disk."""
TRIES = 2
"""Of a file that arrived with other bytes than the hub says."""
RETRIES = 5
"""Of a connection that brings nothing, with pauses of 1, 2, 4, 8 and 16 seconds."""
TIMEOUT = httpx.Timeout(30.0, connect=15.0)
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses that go away."""

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
    url: str
    """That the files' names are under."""
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
    page, revision = f"{api.endpoint}/{repository}", found.sha or "main"
    return Plan(repository, revision, files, page, f"{page}/resolve/{revision}/", whole=not only)


def default_token() -> str | None:
    """The token that the environment or `hf auth login` has left, if any."""
    from huggingface_hub import get_token

    return get_token()


def missing(plan: Plan, folder: Path) -> list[str]:
    """The files that are not there in their full size."""
    return [name for name, file in plan.files.items() if not has_size(folder / name, file.size)]


def has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def part_of(path: Path, recorded: weights.Recorded) -> Path:
    """Where a file's bytes are until it is whole: another place for other bytes."""
    return path.with_name(f"{path.name}.{(recorded.sha256 or 'small')[:12]}.part")


def size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def check_room(plan: Plan, folder: Path) -> None:
    """Raises `WeightsError` unless what is missing fits on the folder's disk."""
    there = folder
    while not there.exists():
        there = there.parent
    absent = {name: plan.files[name] for name in missing(plan, folder)}
    needed = sum(file.size - size_of(part_of(folder / name, file)) for name, file in absent.items()) + SPARE
    free = shutil.disk_usage(there).free
    if needed > free:
        raise WeightsError(
            f"The disk of {folder} has {free / 1e9:.1f} GB free; {needed / 1e9:.1f} GB are needed. "
            "Free some, or give another place with --to."
        )


def fetch(plan: Plan, folder: Path, token: str | None, report: Report = lambda name, count: None) -> None:
    """Fetches what is missing, checks every byte against the hub's figures, and writes a model's manifest.

    A second call goes on where the first one stopped, however that ended.

    Raises:
        As `plan`; WeightsError, also where a file is not what the hub says, twice.
    """
    with Translated(plan.repository, plan.page, has_token=bool(token or default_token()), folder=folder):
        check_room(plan, folder)
        with client(plan, token) as hub:
            for name in plan.files:
                bring(plan, name, folder, hub, report)
        if plan.whole:
            weights.write_manifest(folder, plan.repository, plan.revision, plan.files)
            weights.write_info(folder)


def client(plan: Plan, token: str | None) -> httpx.Client:
    headers = {"user-agent": f"flux-local/{flux_local.__version__}"}
    if token := token or default_token():
        headers["authorization"] = f"Bearer {token}"  # httpx leaves it out where a redirect leads to another host
    return httpx.Client(base_url=plan.url, headers=headers, timeout=TIMEOUT, follow_redirects=True)


def bring(plan: Plan, name: str, folder: Path, hub: httpx.Client, report: Report) -> None:
    """One file, checked; fetched once more if its bytes are wrong."""
    path, file = folder / name, plan.files[name]
    for _ in range(TRIES):
        if has_size(path, file.size):
            report(name, file.size)
        else:
            fetch_file(plan, name, path, hub, report)
        if matches(path, file):
            return
        report(name, -file.size)
        path.unlink(missing_ok=True)
    raise WeightsError(
        f"{name} arrived {TRIES} times with other bytes than {plan.repository} says it has, and was deleted. "
        "A proxy on the way may change files; try another network."
    )


def fetch_file(plan: Plan, name: str, path: Path, hub: httpx.Client, report: Report) -> None:
    """Brings a file from the hub's cache on this machine, or over the network from where its part ends."""
    file = plan.files[name]
    part = part_of(path, file)
    path.parent.mkdir(parents=True, exist_ok=True)
    for other in path.parent.glob(f"{path.name}.*.part"):
        if other != part:
            other.unlink()
    if (cached := in_cache(plan, name)) is not None and has_size(cached, file.size):
        part.unlink(missing_ok=True)
        shutil.copyfile(cached, part)
        report(name, file.size)
    else:
        if file.sha256 is None or size_of(part) > file.size:  # small enough to begin anew, or nobody knows what it is
            part.unlink(missing_ok=True)
        part.touch()  # an empty file needs no more
        report(name, size_of(part))
        failures = 0
        while size_of(part) < file.size:
            before = size_of(part)
            try:
                transfer(hub, name, part, file, report)
            except (httpx.TransportError, httpx.HTTPStatusError) as error:
                if isinstance(error, httpx.HTTPStatusError) and error.response.status_code not in TRANSIENT:
                    raise
                failures = 1 if size_of(part) > before else failures + 1
                if failures > RETRIES:
                    raise
                time.sleep(2.0 ** (failures - 1))
    os.replace(part, path)


def transfer(hub: httpx.Client, name: str, part: Path, file: weights.Recorded, report: Report) -> None:
    """Adds to a part what comes over one connection.

    Raises:
        httpx.TransportError: it broke. httpx.HTTPStatusError: the hub refused.
    """
    start = size_of(part)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with hub.stream("GET", quote(name), headers=headers) as response:
        response.raise_for_status()
        if start and response.status_code != 206:  # a server that knows no ranges sends all of it
            report(name, -start)
            start = 0
        with part.open("r+b" if start else "wb") as out:
            out.seek(start)
            for chunk in response.iter_bytes():
                out.write(chunk)
                report(name, len(chunk))
                if out.tell() > file.size:
                    return  # not what was promised, as its hash will tell
    if size_of(part) < file.size:
        raise httpx.RemoteProtocolError("the connection ended early")


def in_cache(plan: Plan, name: str) -> Path | None:
    """The file in the hub library's own cache, from an earlier `hf download`."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(plan.repository, name, revision=plan.revision)
    return Path(found) if isinstance(found, str) else None


def matches(path: Path, recorded: weights.Recorded) -> bool:
    """Whether a file has the recorded size and, where there is one, hash."""
    return has_size(path, recorded.size) and recorded.sha256 in (None, sha256_of(path))


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        from huggingface_hub.errors import (
            GatedRepoError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        response = getattr(error, "response", None)
        status = response.status_code if response is not None else 0
        if isinstance(error, GatedRepoError):
            return self.denied()
        if isinstance(error, RepositoryNotFoundError):
            return WeightsError(f"The hub has no {self.repository}, or it is private. Check the name.")
        if isinstance(error, RevisionNotFoundError):
            return WeightsError(f"{self.repository} has no such revision. Check --revision, or leave it out.")
        if status == 403 or (status == 401 and not self.has_token):
            return self.denied()
        if status == 401:
            return Denied("The hub does not know this token. Make a new one with read access, and set HF_TOKEN to it.")
        if isinstance(error, OfflineModeIsEnabled):
            return WeightsError("HF_HUB_OFFLINE is set, so that nothing can be downloaded. Unset it for this command.")
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return WeightsError(
                f"The disk of {self.folder} is full. Free some, and run this again: it goes on where it stopped."
            )
        if isinstance(error, OSError) and error.errno is not None and self.folder is not None:
            return WeightsError(
                f"Cannot write to {self.folder}: {os.strerror(error.errno)}. Give another place with --to."
            )
        if status:
            return WeightsError(
                f"The hub answered {status} for {self.repository}. Run this again later: it goes on where it stopped."
            )
        return WeightsError(
            f"The connection to the hub failed ({type(error).__name__}). Run this again: it goes on where it stopped."
        )

    def denied(self) -> Denied:
        accept = f"Open {self.page} with a browser, sign in and accept the licence"
        if self.has_token:
            return Denied(
                f"This token may not read {self.repository}. {accept}, and give a fine-grained token leave to read "
                "public gated repositories; then run this again."
            )
        return Denied(
            f"{self.repository} is only given to accounts that accepted its licence. {accept}; make a token with "
            "read access there, set HF_TOKEN to it, and run this again."
        )


def altered(folder: Path, report: Report = lambda name, count: None) -> Iterable[str]:
    """The files of the folder's manifest whose bytes are not those recorded, one by one as they are read."""
    for name, recorded in weights.manifest(folder).items():
        if not matches(folder / name, recorded):
            yield name
        report(name, recorded.size)

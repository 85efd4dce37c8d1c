"""`flux-local doctor`: everything that a start depends on, each with a verdict and what mends it.

Makes the data directory if it is not there, and changes nothing else.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from flux_local import weights
from flux_local.config import Settings, check_open
from flux_local.download import altered
from flux_local.errors import AlreadyTaken, FluxError, WeightsError

ROOM = 1 << 30
"""Bytes that the data directory's disk should have free."""
PATIENCE = 2.0
"""Seconds for what listens at the server's address to say what it is."""
WAITING = ("not_ready", "draining", "engine_restarting")
"""Codes of errors of a flux-local server that lives and is not ready."""


@dataclass(frozen=True)
class Verdict:
    """`good`, `slow` (it works, but not as fast as it could) or `bad` (a server would not start).

    What a running server of these settings has taken is good.
    """

    name: str
    verdict: str
    text: str


def examine(settings: Settings, whole: bool = False) -> Iterator[Verdict]:
    """All verdicts, as they are found.

    Args:
        whole: read every byte of the weights and compare it with what the download recorded.
    """
    found = check("weights", lambda: of_weights(settings))
    yield found
    if whole:
        yield check("hashes", lambda: of_hashes(settings))
    yield check("safety checker", lambda: of_safety(settings))
    running = of_server(settings) if is_taken(settings) else None
    yield check("data directory", lambda: of_data(settings, running is not None))
    yield Verdict("address", "good", running.text) if running else check("address", lambda: of_address(settings))
    for name in settings.device_list():
        of_this = list(of_device(name, settings.fp8_attention))
        yield from of_this
        if found.verdict != "good" or of_this[0].verdict != "good":
            continue
        if running:
            yield Verdict(f"memory {name}", "good", running.memory)
        else:
            yield check(f"memory {name}", partial(of_memory, settings, name))


def check(name: str, look: Callable[[], str]) -> Verdict:
    """Good with what was seen, or bad with the error, which says what to do next."""
    try:
        return Verdict(name, "good", look())
    except FluxError as error:
        return Verdict(name, "bad", error.message)


def of_weights(settings: Settings) -> str:
    path = weights.find(settings.model)
    weights.verify(path)
    return f"{weights.info(path).name}, {weights.identify(path).nbytes / 1e9:.2f} GB in {path}"


def of_hashes(settings: Settings) -> str:
    folder = weights.find(settings.model)
    recorded = weights.manifest(folder)
    if not recorded:
        return "nothing to compare with: the folder was not made by `flux-local download`"
    if wrong := list(altered(folder)):
        raise WeightsError(
            f"{', '.join(wrong)}: not as downloaded. Delete that and run `{weights.download_again(folder)}`."
        )
    return f"{len(recorded)} files are as they were downloaded"


def of_safety(settings: Settings) -> str:
    folder = settings.safety_folder()
    return "none: pictures are not looked at" if folder is None else f"looks at every picture, from {folder}"


def is_taken(settings: Settings) -> bool:
    """Whether a server uses the data directory."""
    from flux_local.store import Store

    try:
        Store(Path(settings.data_dir).expanduser(), settings.url_lifetime).close()
    except FluxError as error:
        return isinstance(error, AlreadyTaken)
    return False


@dataclass(frozen=True)
class Running:
    """A flux-local server at the address of these settings: what it says of itself, and of its memory."""

    text: str
    memory: str


def of_server(settings: Settings) -> Running | None:
    import httpx

    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    url = f"http://{f'[{host}]' if ':' in host else host}:{settings.port}"
    try:
        said = httpx.get(f"{url}/ready", timeout=PATIENCE, trust_env=False).json()
        if said.get("status") == "ready":
            return Running(
                f"flux-local serves {said['model']} at {url}: ready", f"{said['memory']}, as the running server has it"
            )
        if said["error"]["code"] in WAITING:
            return Running(f"flux-local answers at {url}: {said['error']['message']}", "the running server has it")
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError, AttributeError):
        pass  # nothing answers, or something else does
    return None


def of_data(settings: Settings, running: bool) -> str:
    from flux_local.store import Store

    folder = Path(settings.data_dir).expanduser()
    if not running:
        Store(folder, settings.url_lifetime).close()
    by = ", in use by the running server" if running else ""
    free = shutil.disk_usage(folder).free
    low = "; that is little: free some, or lower --url-lifetime" if free < ROOM else ""
    return f"{folder}{by}, {free / 1e9:.1f} GB free{low}"


def of_address(settings: Settings) -> str:
    from flux_local.server import bind

    check_open(settings)
    keys = len(settings.keys())
    bind(settings.host, settings.port).close()
    return f"{settings.host} port {settings.port} is free; API keys: {keys or 'none, open to whoever reaches it'}"


def of_memory(settings: Settings, asked: str) -> str:
    """How the model would be laid out."""
    from flux_local.engine_process import pick_device
    from flux_local.model import memory
    from flux_local.model.fp8 import has_products

    memory.free()
    path = weights.find(settings.model)
    precisions: memory.Precisions = "full" if settings.reference else settings.precisions
    sizes, largest = memory.Sizes.of(weights.identify(path)), weights.info(path).canvas.max_area
    device = pick_device(asked)
    room, host_room = memory.room(device), memory.host_room(memory.sharing(device, settings.device_list()))
    emulated = not has_products(device)
    return str(memory.plan(sizes, room, precisions, settings.tier(), largest, emulated, host_room))


def of_device(asked: str, fp8_attention: bool) -> Iterator[Verdict]:
    from flux_local.engine_process import pick_device
    from flux_local.model import device

    try:
        name = pick_device(asked)
        yield Verdict(f"device {asked}", "good", device.describe(name))
    except FluxError as error:
        yield Verdict(f"device {asked}", "bad", error.message)
        return
    wanted = device.quantised_attention(name) if fp8_attention else []
    without = "slow" if any(finding.good for finding in wanted) else "bad"
    for finding in (*device.findings(name), *wanted):
        text = f"relative error {finding.error:.1e}" if finding.good else f"not used: {finding.reason}"
        lacking = without if finding in wanted else "slow"
        yield Verdict(finding.name, "good" if finding.good else lacking, text)

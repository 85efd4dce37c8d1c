"""What the host has of memory: the machine, and the container or service that this process is part of.

Where a control group has a limit, the kernel ends processes that go over it, however much the machine has free. Knows
nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
OWN_GROUPS = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")
FILES = {
    "": ("memory.max", "memory.current", ("inactive_file", "active_file")),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
}
"""By controller, of which cgroup v2 names none: limit, use, and what of that is the cache of files, which gives way."""


def total() -> int:
    """Bytes that there are for this process and all beside it."""
    return min([of_machine("MemTotal"), *(limit for limit, _ in limits())])


def available() -> int:
    """Bytes of those that are free, or would be if they were wanted."""
    return min([of_machine("MemAvailable"), *(max(0, limit - used) for limit, used in limits())])


def of_machine(name: str) -> int:
    """Bytes, by the kernel's name for them in /proc/meminfo."""
    for line in MEMINFO.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(name)


def limits() -> Iterator[tuple[int, int]]:
    """Limit and use of each control group that this process is in and that has a limit, in bytes.

    A container may see its own group as the root while it is told the path that the machine knows it by: folders that
    are not there are passed over.
    """
    try:
        lines = OWN_GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for controller in {"", "memory"} & set(controllers.split(",")):
            base = GROUPS / controller
            own = base / path.lstrip("/")
            for group in (own, *own.parents):
                if group.is_relative_to(base) and (found := of_group(group, *FILES[controller])):
                    yield found


def of_group(group: Path, limit: str, use: str, caches: tuple[str, ...]) -> tuple[int, int] | None:
    """Limit and use; None without a limit, or without such a group."""
    try:
        most = (group / limit).read_text().strip()
        if most == "max":
            return None
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached = sum(int(stat.get(name, 0)) for name in caches)
        return int(most), max(0, int((group / use).read_text()) - cached)
    except OSError:
        return None

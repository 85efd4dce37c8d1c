"""The host memory that a process holds for itself."""

from __future__ import annotations

import threading
from pathlib import Path


def own_memory() -> int:
    """Bytes of this process that no file backs."""
    return 1024 * int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])


class Watch:
    """The most of its own memory that this process has while the block runs, above what it had before."""

    def __enter__(self) -> Watch:
        self.before = self.most = own_memory()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.look)
        self.thread.start()
        return self

    def look(self) -> None:
        while not self.done.wait(0.01):
            self.most = max(self.most, own_memory())

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    @property
    def held(self) -> int:
        return self.most - self.before

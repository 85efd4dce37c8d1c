"""Files behind URLs, without a server."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flux_local.errors import AlreadyTaken, NotFound, SettingsError, StorageFull
from flux_local.store import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path, lifetime=1000)
    yield store
    store.close()


def test_what_was_saved_is_there_under_a_name_nobody_guesses(store: Store) -> None:
    names = {store.save(b"data", "png") for _ in range(20)}
    assert len(names) == 20
    for name in names:
        assert len(name) == 36
        assert store.load(name) == b"data"


def test_what_is_renewed_expires_with_the_rest(store: Store) -> None:
    first, last = store.save(b"first", "png"), store.save(b"last", "png")
    past = time.time() - 990
    os.utime(store.files / first, (past, past))
    store.renew([first, last, "gone.png"])
    ages = [time.time() - (store.files / name).stat().st_mtime for name in (first, last)]
    assert max(ages) < 5


@pytest.mark.parametrize("name", ["", "lock", "../lock", ".x", "a" * 32 + ".exe", "a" * 32 + ".png", "a/b.png"])
def test_nothing_else_can_be_read(store: Store, name: str) -> None:
    with pytest.raises(NotFound):
        store.load(name)


def test_files_expire_and_are_swept(store: Store) -> None:
    name, kept = store.save(b"old", "png"), store.save(b"new", "png")
    past = time.time() - 1001
    os.utime(store.files / name, (past, past))
    with pytest.raises(NotFound):
        store.load(name)
    half = store.files / ".half.png"
    half.write_bytes(b"x")
    os.utime(half, (past + 900, past + 900))
    store.sweep()
    assert [path.name for path in store.files.iterdir()] == [kept]


def test_a_full_disk_leaves_nothing_behind(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFull):
        store.save(b"data", "png")
    assert list(store.files.iterdir()) == []


def test_one_server_a_folder(store: Store, tmp_path: Path) -> None:
    with pytest.raises(AlreadyTaken):
        Store(tmp_path, 1000)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError):
        Store(tmp_path / "file" / "x", 1000)

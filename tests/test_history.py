"""The history without a server: a disk that goes bad while it is in use, and what an earlier flux-local wrote."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import time
from pathlib import Path

import pytest

from flux_local.errors import NotFound, StorageFull
from flux_local.history import Entry, History, Reply, Status


def new(id: str, status: Status = "queued", work: bytes | None = None, **params: str) -> Entry:
    return Entry(id=id, owner="", route="generations", status=status, created=time.time(), params=dict(params),
                 work=work)  # fmt: skip


def test_a_promise_and_what_a_repeat_of_it_is_answered_are_kept_together_or_not_at_all(tmp_path: Path) -> None:
    async def run() -> None:
        history = History(tmp_path, 1000)
        reply = Reply("", "generations", "key", "a", "f", 202, {}, b"{}")
        await history.add(new("a", work=b"work"), reply)
        assert await history.reply("", "generations", "key") == reply
        await history._run(lambda c: c.execute("DROP TABLE replies"))
        with pytest.raises(StorageFull):
            await history.add(new("b", work=b"work"), reply)
        assert [entry.id for entry in await history.unfinished()] == ["a"]
        await history.add(new("c", work=b"work"))
        assert [entry.id for entry in await history.unfinished()] == ["a", "c"], "the next one is none the worse"
        history.close()

    asyncio.run(run())


def test_a_file_that_is_damaged_while_in_use_is_told_as_what_it_is(tmp_path: Path) -> None:
    async def run() -> None:
        history = History(tmp_path, 1000)
        for number in range(100):
            await history.add(new(f"r{number}", "running", prompt="x" * 500))
        await history._run(lambda c: c.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall())
        path = tmp_path / "history.sqlite3"
        with path.open("r+b") as file:
            file.seek(4096)
            file.write(os.urandom(path.stat().st_size - 4096))
        await history._run(lambda c: c.execute("PRAGMA shrink_memory").fetchall())
        for use in (history.get("r3", ""), history.finish("r9", "failed"), history.page("", 10)):
            with pytest.raises(StorageFull) as caught:
                await use
            assert isinstance(caught.value.__cause__, sqlite3.DatabaseError)
        history.close()

    asyncio.run(run())


def test_a_history_of_before_is_read_and_counts_who_takes_up_its_promises(tmp_path: Path) -> None:
    async def run() -> None:
        history = History(tmp_path, 1000)
        for id in ("a", "b"):
            await history.add(new(id, work=b"work"))
        history.close()
        with contextlib.closing(sqlite3.connect(tmp_path / "history.sqlite3")) as tables:
            tables.executescript(
                "ALTER TABLE requests DROP COLUMN resumed; ALTER TABLE requests DROP COLUMN pictures;"
                "PRAGMA user_version = 1;"
            )
        history = History(tmp_path, 1000)
        assert [entry.resumed for entry in await history.unfinished()] == [0, 0]
        for _ in range(2):
            await history.take_up("a")
        assert [entry.resumed for entry in await history.unfinished()] == [2, 0]
        await history.put_down()
        assert [entry.resumed for entry in await history.unfinished()] == [0, 0]
        history.close()

    asyncio.run(run())


def test_what_has_expired_is_not_there_though_nobody_has_swept(tmp_path: Path) -> None:
    async def run() -> None:
        history = History(tmp_path, 1000)
        for id in ("old", "new"):
            await history.add(new(id, "running"))
            await history.finish(id, "succeeded", {"created": 1, "data": []})
        await history._run(lambda c: c.execute("UPDATE requests SET finished = finished - 1001 WHERE id = 'old'"))
        assert [entry.id for entry in await history.page("", 10)] == ["new"]
        with pytest.raises(NotFound):
            await history.get("old", "")
        history.close()

    asyncio.run(run())


def test_a_page_of_requests_reads_no_pictures(tmp_path: Path) -> None:
    async def run() -> None:
        history = History(tmp_path, 1000)
        data = [{"b64_json": "A" * 1000, "seed": 1}, {"url": "x", "seed": 2}]
        for id in ("a", "b"):
            await history.add(new(id, "running"))
            await history.finish(id, "succeeded", {"created": 1, "data": data})
        await history._run(  # as a version before wrote it
            lambda c: c.execute("UPDATE requests SET response = pictures, pictures = NULL WHERE id = 'a'")
        )
        listed = await history._run(lambda c: c.execute("SELECT response FROM requests WHERE id = 'b'").fetchone())
        assert "AAA" not in listed[0]
        for entry in await history.page("", 10):
            assert entry.response == {"created": 1, "data": [{"seed": 1}, {"url": "x", "seed": 2}]}
        for id in ("a", "b"):
            assert (await history.get(id, "")).response == {"created": 1, "data": data}
        history.close()

    asyncio.run(run())

"""Requests and what became of them, in SQLite, by one thread on one connection.

Every commit outlives the process (WAL). What has been promised to a client that does not wait is flushed to the disk
before the promise is given, so that it outlives the machine's power too.

Knows nothing of pictures or HTTP: parameters, results and errors are JSON that it keeps.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from flux_local.errors import NotFound, StartError, StorageFull

Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]
FINAL: tuple[Status, ...] = ("succeeded", "failed", "cancelled")
T = TypeVar("T")

REPLY_LIFETIME = 86_400
"""Seconds for which an `Idempotency-Key` is remembered, unless what was answered goes before that."""
VERSION = 3
"""Of the tables; kept in the database as `user_version`."""

log = logging.getLogger("flux_local.history")

SCHEMA = """
CREATE TABLE IF NOT EXISTS requests (
    id       TEXT PRIMARY KEY,
    owner    TEXT NOT NULL,
    route    TEXT NOT NULL,
    status   TEXT NOT NULL,
    created  REAL NOT NULL,
    finished REAL,
    params   TEXT NOT NULL,
    response TEXT,
    error    TEXT,
    files    TEXT NOT NULL DEFAULT '[]',
    work     BLOB,
    resumed  INTEGER NOT NULL DEFAULT 0,
    pictures TEXT
);
CREATE TABLE IF NOT EXISTS replies (
    owner       TEXT NOT NULL,
    route       TEXT NOT NULL,
    key         TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    status      INTEGER NOT NULL,
    headers     TEXT NOT NULL,
    body        BLOB NOT NULL,
    created     REAL NOT NULL,
    request     TEXT NOT NULL,
    PRIMARY KEY (owner, route, key)
);
CREATE INDEX IF NOT EXISTS by_owner ON requests (owner, created DESC);
CREATE INDEX IF NOT EXISTS by_request ON replies (request);
CREATE INDEX IF NOT EXISTS by_age ON replies (created);
"""
COLUMNS = "id, owner, route, status, created, finished, params, {response}, error, files, {work}, resumed"
"""Of a row. Of its `response` pictures as text are left out; the whole is in `pictures`, where it has any."""
WHOLE = COLUMNS.format(response="COALESCE(pictures, response)", work="work")
SHOWN = COLUMNS.format(response="COALESCE(pictures, response)", work="NULL")
"""Without its work, which may be megabytes that nobody looks at."""
LISTED = COLUMNS.format(response="response", work="NULL")
"""Nor its pictures."""

KEPT = "(finished IS NULL OR finished >= ?)"
"""Not expired."""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A row. Times are Unix seconds; `work` is what is needed to do it again, None where nobody would wait for it;
    `resumed`: how many processes have taken it up from one before, since the last that ended in order."""

    id: str
    owner: str
    route: str
    status: Status
    created: float
    params: dict[str, Any]
    finished: float | None = None
    response: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    files: list[str] = []
    work: bytes | None = None
    resumed: int = 0


class Reply(msgspec.Struct, frozen=True):
    """An answer that is given again to a repeated request: one of the same owner, route and `key`.

    `fingerprint`: of what was asked. `request`: the id.
    """

    owner: str
    route: str
    key: str
    request: str
    fingerprint: str
    status: int
    headers: dict[str, str]
    body: bytes


class History:
    """All requests of the last `lifetime` seconds.

    Args:
        folder: the server's data directory, which this process has locked.
    """

    def __init__(self, folder: Path, lifetime: int) -> None:
        self.lifetime = lifetime
        self.reply_lifetime = min(lifetime, REPLY_LIFETIME)
        self._thread = ThreadPoolExecutor(1, "history")
        self._connection = self._thread.submit(self._open, folder / "history.sqlite3").result()

    def _open(self, path: Path) -> sqlite3.Connection:
        """The database; one that cannot be read is put aside, for pictures do not depend on it.

        Raises:
            StartError: the disk is full, the database's files cannot be written, or a later flux-local wrote them.
        """
        try:
            return self._connect(path)
        except sqlite3.OperationalError as error:
            raise StartError(
                f"Cannot open the request history {path} ({error}). Free space there, mend its permissions, or choose "
                "another --data-dir."
            ) from error
        except sqlite3.DatabaseError as error:
            aside = path.with_suffix(f".corrupt-{int(time.time())}")
            path.rename(aside)
            log.error("the request history cannot be read (%s): what was promised is lost; it is kept as %s until you "
                      "delete it", error, aside)  # fmt: skip
            return self._connect(path)

    def _connect(self, path: Path) -> sqlite3.Connection:
        path.touch(0o600)
        path.chmod(0o600)  # SQLite's other files have the same
        connection = sqlite3.connect(path, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            if connection.execute("PRAGMA quick_check").fetchone() != ("ok",):
                raise sqlite3.DatabaseError("quick_check failed")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version > VERSION:
                raise StartError(
                    f"The request history {path} is of a later flux-local. Start that, or choose another --data-dir."
                )
            if version < 1:
                connection.execute("DROP TABLE IF EXISTS replies")  # did not say whose they were
            columns = {row[1] for row in connection.execute("PRAGMA table_info(requests)")}
            for name, kind in (("resumed", "INTEGER NOT NULL DEFAULT 0"), ("pictures", "TEXT")):
                if columns and name not in columns:
                    connection.execute(f"ALTER TABLE requests ADD COLUMN {name} {kind}")
            connection.executescript(f"{SCHEMA} PRAGMA user_version = {VERSION};")
        except (sqlite3.DatabaseError, StartError):
            connection.close()
            raise
        return connection

    async def _run(self, action: Callable[[sqlite3.Connection], T], flushed: bool = False) -> T:
        def act(connection: sqlite3.Connection) -> T:
            if not flushed:
                return action(connection)
            connection.execute("PRAGMA synchronous = FULL")
            try:
                return action(connection)
            finally:
                connection.execute("PRAGMA synchronous = NORMAL")

        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, act, self._connection)
        except sqlite3.DatabaseError as error:
            if type(error) not in (sqlite3.OperationalError, sqlite3.DatabaseError):  # the others are our own mistakes
                raise
            raise StorageFull(
                "The server cannot use its request history. Free space on the server, or start it again."
            ) from error

    async def add(self, new: Entry, reply: Reply | None = None) -> None:
        """A new request; with `work`, a promise. With what a repeat of it will be answered, or not at all."""
        row = (new.id, new.owner, new.route, new.status, new.created, json.dumps(new.params), new.work)

        def insert(connection: sqlite3.Connection) -> None:
            connection.execute("BEGIN IMMEDIATE")
            try:
                connection.execute(
                    "INSERT INTO requests (id, owner, route, status, created, params, work)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?)",
                    row,
                )
                if reply is not None:
                    keep(connection, reply)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # a full disk has ended it already
                    connection.execute("ROLLBACK")
                raise

        await self._run(insert, flushed=new.work is not None)

    async def finish(
        self,
        id: str,
        status: Status,
        response: dict[str, Any] | None = None,
        error: dict[str, Any] | None = None,
        files: list[str] | None = None,
    ) -> bool:
        """Gives a request its one final state; False if it has one already or is gone."""
        now = time.time()

        def update(connection: sqlite3.Connection) -> bool:
            listed = response and without_pictures(response)
            row = (status, now, listed and json.dumps(listed), json.dumps(response) if response != listed else None,
                   error and json.dumps(error), json.dumps(files or []), id)  # fmt: skip
            done = connection.execute(
                "UPDATE requests SET status = ?, finished = ?, response = ?, pictures = ?, error = ?, files = ?,"
                " work = NULL WHERE id = ? AND status IN ('queued', 'running')",
                row,
            )
            return done.rowcount == 1

        return await self._run(update)

    async def get(self, id: str, owner: str) -> Entry:
        """A request without its work. Raises `NotFound` unless the request is there and the owner's."""
        found = await self._run(
            lambda c: [
                entry(row)
                for row in c.execute(
                    f"SELECT {SHOWN} FROM requests WHERE id = ? AND owner = ? AND {KEPT}", (id, owner, self._oldest())
                )
            ]
        )
        if not found:
            raise NotFound("There is no such request, or it has expired.")
        return found[0]

    async def page(self, owner: str, limit: int, after: str | None = None) -> list[Entry]:
        """The owner's newest requests, newest first, without their work and without pictures as text; or those after
        the one with this id.

        Raises:
            NotFound: no such request of this owner.
        """

        def select(connection: sqlite3.Connection) -> list[Entry] | None:
            last = (float("inf"), 0)
            if after is not None:
                last = connection.execute(
                    "SELECT created, rowid FROM requests WHERE id = ? AND owner = ?", (after, owner)
                ).fetchone()
                if last is None:
                    return None
            rows = connection.execute(
                f"SELECT {LISTED} FROM requests WHERE owner = ? AND (created, rowid) < (?, ?) AND {KEPT}"
                " ORDER BY created DESC, rowid DESC LIMIT ?",
                (owner, *last, self._oldest(), limit),
            )
            return [entry(row, listed=True) for row in rows]

        found = await self._run(select)
        if found is None:
            raise NotFound("There is no request with the id in 'after', or it has expired.", param="after")
        return found

    async def unfinished(self) -> list[Entry]:
        """What an earlier process left without a final state, in the order it came."""
        rows = await self._run(
            lambda c: c.execute(
                f"SELECT {WHOLE} FROM requests WHERE status IN ('queued', 'running') ORDER BY created"
            ).fetchall()
        )
        return [entry(r) for r in rows]

    async def take_up(self, id: str) -> bool:
        """Counts that a process takes up what another one promised; on the disk before it does. False if it is gone."""
        return await self._run(
            lambda c: c.execute("UPDATE requests SET resumed = resumed + 1 WHERE id = ?", (id,)).rowcount == 1,
            flushed=True,
        )

    async def put_down(self) -> None:
        """The process ends in order: what it leaves was not the end of it."""
        await self._run(lambda c: c.execute("UPDATE requests SET resumed = 0 WHERE resumed > 0 AND work IS NOT NULL"))

    async def remove(self, id: str) -> None:
        """Forgets a request and what a repeat of it would be answered."""
        await self._run(lambda c: c.execute("DELETE FROM replies WHERE request = ?", (id,)))
        await self._run(lambda c: c.execute("DELETE FROM requests WHERE id = ?", (id,)))

    async def reply(self, owner: str, route: str, key: str) -> Reply | None:
        """What was answered under the key, unless that has expired."""
        row = (owner, route, key, time.time() - self.reply_lifetime)
        found = await self._run(
            lambda c: c.execute(
                "SELECT request, fingerprint, status, headers, body FROM replies"
                " WHERE owner = ? AND route = ? AND key = ? AND created > ?",
                row,
            ).fetchone()
        )
        return found and Reply(owner, route, key, found[0], found[1], found[2], json.loads(found[3]), found[4])

    async def keep_reply(self, reply: Reply) -> None:
        await self._run(lambda c: keep(c, reply), flushed=True)

    def _oldest(self) -> float:
        """When what expires now was finished."""
        return time.time() - self.lifetime

    async def sweep(self) -> None:
        """Forgets what has expired."""
        oldest = self._oldest()
        old_reply = time.time() - self.reply_lifetime
        await self._run(lambda c: c.execute("DELETE FROM replies WHERE created < ?", (old_reply,)))
        await self._run(lambda c: c.execute("DELETE FROM requests WHERE finished < ?", (oldest,)))

    def close(self) -> None:
        self._thread.submit(self._connection.close).result()
        self._thread.shutdown()


def keep(connection: sqlite3.Connection, reply: Reply) -> None:
    row = (reply.owner, reply.route, reply.key, reply.fingerprint, reply.status, json.dumps(reply.headers), reply.body,
           time.time(), reply.request)  # fmt: skip
    connection.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)


def without_pictures(response: dict[str, Any]) -> dict[str, Any]:
    """A response without its pictures' own bytes, of which a page of entries may have gigabytes."""
    data = [{name: value for name, value in item.items() if name != "b64_json"} for item in response["data"]]
    return {**response, "data": data}


def entry(row: tuple[Any, ...], listed: bool = False) -> Entry:
    """
    Args:
        listed: without pictures, though an earlier version kept them in `response`.
    """
    id, owner, route, status, created, finished, params, response, error, files, work, resumed = row
    response = response and json.loads(response)
    return Entry(
        id=id,
        owner=owner,
        route=route,
        status=status,
        created=created,
        finished=finished,
        params=json.loads(params),
        response=without_pictures(response) if response and listed else response,
        error=error and json.loads(error),
        files=json.loads(files),
        work=work,
        resumed=resumed,
    )

"""The workers of one host: a memory map in the runtime folder.

LMDB's transactions are exact and cost about a microsecond when nothing is synced to a disk, which
nothing here needs to be: after a crash of the machine nobody is left whose limits these were.  A
worker that is killed in the middle of one leaves nothing behind, and its lock is free.

LMDB waits for its lock as long as it takes.  So ours is taken first, which can be waited for with
an end: a worker that is stopped while it holds it must not stop all the others.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import attrs
import lmdb
import orjson
import trio

from citadel_gateway.io.store.base import Ahead, Buckets, Grants, StoreUnavailable
from citadel_gateway.policy.board import Board, News, Statement
from citadel_gateway.policy.rate_limit import Allowance, Refusal, take
from citadel_gateway.policy.shares import Cap, Need, Share

_SIZE = 64 * 2**20  # bytes of address space; what is not used takes no memory
_AGAIN = 1.0  # seconds between two attempts to open it
_FORGETS = 30.0
_SLICE = 500  # buckets looked at in one transaction
_TRY = fcntl.LOCK_EX | fcntl.LOCK_NB
_TAT = struct.Struct("<d")
_BUCKET, _CAP, _BOARD = b"bucket:", b"cap:", b"board"


@attrs.define(eq=False)
class LmdbStore:
    """A folder that all workers have open.

    :param patience: seconds to wait for somebody else's transaction.
    """

    folder: Path
    patience: float
    clock: Callable[[], float] = time.monotonic  # one for all processes of a host
    is_far: bool = attrs.field(default=False, init=False)
    every: float = attrs.field(default=0.25, init=False)
    _map: lmdb.Environment | None = attrs.field(default=None, init=False)
    _lock: int = attrs.field(default=-1, init=False)

    def now(self) -> float:
        return self.clock()

    def open(self) -> None:
        """Raises :class:`StoreUnavailable`."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.folder.stat().st_uid != os.geteuid():
                raise PermissionError(f"{self.folder} belongs to somebody else")
            self._lock = os.open(self.folder / "turn", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._map = self._open_map()
        except (OSError, lmdb.Error) as exc:
            self.close()
            raise StoreUnavailable(str(exc)) from exc

    def _open_map(self) -> lmdb.Environment:
        folder = self.folder / "map"
        try:
            return _environment(folder)
        except (lmdb.InvalidError, lmdb.CorruptedError, lmdb.VersionMismatchError):
            # The machine went down, or another version was here: there is nothing to save.
            shutil.rmtree(folder, ignore_errors=True)
            return _environment(folder)

    def close(self) -> None:
        if self._map is not None:
            self._map.close()
            self._map = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def take_nowait(self, buckets: Buckets, ahead: Ahead = (), /) -> Allowance | Refusal:
        if self._map is None:
            raise StoreUnavailable("it is not open")
        self._acquire()  # as in `_turn`, which would cost as much again as all of this
        try:
            txn = self._map.begin(write=True)
            now = self.clock()
            for _, bucket in buckets:
                if (known := txn.get(_BUCKET + bucket.key)) is not None:
                    bucket.learn(_TAT.unpack(known)[0], now)
            result = take(buckets, now, ahead)
            if type(result) is Refusal:
                txn.abort()
                return result
            for _, bucket in buckets:
                txn.put(_BUCKET + bucket.key, _TAT.pack(bucket.tat))
            txn.commit()
        except lmdb.Error as exc:
            raise StoreUnavailable(str(exc)) from exc
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)
        return result

    async def take(self, buckets: Buckets, ahead: Ahead = (), /) -> Allowance | Refusal:
        await trio.lowlevel.checkpoint()
        return self.take_nowait(buckets, ahead)

    async def meet(self, statement: Statement) -> News:
        await trio.lowlevel.checkpoint()
        now = self.clock()
        with self._turn() as txn:
            known = txn.get(_BOARD)
            board = Board() if known is None else Board(**orjson.loads(known))
            news = board.meet(statement, now)
            txn.put(_BOARD, orjson.dumps(attrs.asdict(board, recurse=False)))
        return news

    async def report(self, member: str, lease: float, needs: Mapping[str, Need]) -> Grants:
        await trio.lowlevel.checkpoint()
        now = self.clock()
        grants: Grants = {}
        with self._turn() as txn:
            for name, need in needs.items():
                key = _CAP + name.encode()
                cap = _cap(txn.get(key)) or Cap()
                grants[name] = cap.report(member, need, lease, now)
                txn.put(key, orjson.dumps(attrs.asdict(cap)))
        return grants

    async def leave(self, member: str, caps: Sequence[str]) -> None:
        await trio.lowlevel.checkpoint()
        with self._turn() as txn:
            for name in caps:
                key = _CAP + name.encode()
                if (cap := _cap(txn.get(key))) is not None:
                    cap.leave(member)
                    txn.put(key, orjson.dumps(attrs.asdict(cap)))

    async def run(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> NoReturn:
        """Open it, trying again if need be, and forget full buckets, as they say nothing."""
        try:
            while self._map is None:
                with suppress(StoreUnavailable):
                    self.open()
                task_status.started()
                task_status = trio.TASK_STATUS_IGNORED
                await trio.sleep(_AGAIN if self._map is None else 0.0)
            while True:
                await trio.sleep(_FORGETS)
                await self._forget_full()
        finally:
            self.close()

    async def _forget_full(self) -> None:
        key: bytes | None = _BUCKET
        while key is not None:
            try:
                key = self._forget_some(key)
            except StoreUnavailable:
                return
            await trio.lowlevel.checkpoint()

    def _forget_some(self, start: bytes) -> bytes | None:
        """Look at some buckets from *start* on; returns where to go on."""
        now = self.clock()
        with self._turn() as txn, txn.cursor() as cursor:
            more = cursor.set_range(start)
            for _ in range(_SLICE):
                if not more or not bytes(cursor.key()).startswith(_BUCKET):
                    return None
                is_full = _TAT.unpack(cursor.value())[0] <= now
                more = cursor.delete() if is_full else cursor.next()
            return bytes(cursor.key()) if more else None

    @contextmanager
    def _turn(self) -> Iterator[lmdb.Transaction]:
        """A transaction, and nobody else's.  Raises :class:`StoreUnavailable`."""
        if self._map is None:
            raise StoreUnavailable("it is not open")
        self._acquire()
        try:
            with self._map.begin(write=True) as txn:
                yield txn
        except lmdb.Error as exc:
            raise StoreUnavailable(str(exc)) from exc
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def _acquire(self) -> None:
        give_up_at = None
        while True:
            try:
                fcntl.flock(self._lock, _TRY)
                return
            except BlockingIOError:
                now = time.monotonic()
                give_up_at = give_up_at or now + self.patience
                if now >= give_up_at:
                    raise StoreUnavailable("another process holds its lock") from None
                time.sleep(0)  # let it finish: it needs microseconds


def _environment(folder: Path) -> lmdb.Environment:
    return lmdb.open(
        str(folder),
        map_size=_SIZE,
        mode=0o600,
        sync=False,
        metasync=False,
        writemap=True,
        map_async=True,
        max_spare_txns=1,
    )


def _cap(kept: bytes | memoryview | None) -> Cap | None:
    if kept is None:
        return None
    fields = orjson.loads(kept)
    shares = {member: Share(**share) for member, share in fields["shares"].items()}
    return Cap(fields["lost_at"] or 0.0, shares)

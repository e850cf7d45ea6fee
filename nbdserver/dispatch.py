"""Requests become volume calls and replies.

A batch is answered in one pass: what the volume can do at once (`read_now`, `write_now`) goes into a reply area that is
reused for every batch, and only what must wait becomes a task. Replies leave in any order (proto.md, "Ordering of
messages and writes").
Every request gets exactly one reply, except that two kinds get none and the connection ends instead: what meets
Stopping, and changes that were dropped because the peer has hung up. Clients hand an error on to their users; after a
close they connect again and repeat the request.
Spec: proto.md, "Request types", "Error values", "Structured reply types".
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from time import perf_counter_ns
from typing import Any, Final, NamedTuple, Protocol

from nbdserver.buffers import HEAD_BYTES, Buffer, BufferPool
from nbdserver.chunks import SPARSE_BYTES_MIN, damaged, sparse
from nbdserver.exports import STATUS_EXTENTS_MAX, ExtentQuery
from nbdserver.failures import SPACE_TAKING, error_value
from nbdserver.meters import Meter
from nbdserver.slow import SlowWatch
from nbdserver.transmission import Request
from nbdserver.wire import replies as wire
from nbdserver.wire.constants import Command, CommandFlag, ErrorValue
from nbdserver.wire.requests import decode_status_payload
from objstore import errors
from objstore.stages import stage
from objstore.units import KIB
from objstore.volume.base import REQUEST_BYTES_MAX, Extent, Limiter, Volume

log = logging.getLogger(__name__)

BATCH_REQUESTS_MAX: Final = 256
"""Requests answered in one pass."""
BATCH_READ_BYTES_MAX: Final = 256 * KIB
"""Data of one pass. A longer read is a pass of its own, in a buffer of its own. More than 32 reads of 4 KiB, and small
enough for a core's second-level cache."""
REPLY_AREA_BYTES: Final = BATCH_READ_BYTES_MAX + BATCH_REQUESTS_MAX * wire.HEADER_BYTES_MAX
DAMAGED_RANGES_MAX: Final = 64
"""With more bad ranges than this a read fails as a whole."""
FLUSHES_JOINED_MAX: Final = 256
ZEROS: Final = memoryview(bytes(BATCH_READ_BYTES_MAX))

_FUA: Final = int(CommandFlag.FUA)
_PAYLOAD_LEN: Final = int(CommandFlag.PAYLOAD_LEN)
_READ: Final = int(Command.READ)
_WRITE: Final = int(Command.WRITE)

FLAGS_ALLOWED: Final = {
    Command.READ: CommandFlag.FUA | CommandFlag.DF,
    Command.WRITE: CommandFlag.FUA,
    Command.FLUSH: CommandFlag.FUA,
    Command.TRIM: CommandFlag.FUA,
    Command.CACHE: CommandFlag.FUA,
    Command.WRITE_ZEROES: CommandFlag.FUA | CommandFlag.NO_HOLE | CommandFlag.FAST_ZERO,
    Command.BLOCK_STATUS: CommandFlag.FUA | CommandFlag.REQ_ONE,
}
"""Commands that have replies. FUA is accepted on all of them; DF only with chunked replies; PAYLOAD_LEN comes on top
for WRITE and BLOCK_STATUS with extended headers."""
CHANGING: Final = frozenset((Command.WRITE, Command.TRIM, Command.WRITE_ZEROES))
LIMITED: Final = {
    int(Command.READ): (False, True),
    int(Command.WRITE): (True, True),
    int(Command.TRIM): (True, False),
    int(Command.WRITE_ZEROES): (True, False),
    int(Command.CACHE): (False, True),
}
"""What the limits of a volume count: whether it is a write, and whether its length counts or only that it is one."""


class Outbox(Protocol):
    """Where replies go: the sending half of a connection."""

    def put(self, views: Sequence[memoryview | bytes], buffer: Buffer | None = None) -> None:
        """Queue views to be sent in order; `buffer` returns to the pool when all of them have left."""
        ...

    def put_area(self, length: int) -> None:
        """Send the first `length` bytes of the reply area, which is free again on return."""
        ...

    def alive(self) -> bool:
        """False: the peer has hung up, and what it asked for must not happen any more."""
        ...

    def task_ended(self) -> None:
        """A task of this connection has queued its reply."""
        ...

    def finish(self) -> None:
        """Take no more requests; end the connection when everything has been answered and sent."""
        ...


RHYTHM_MIN: Final = 4
"""A client that has sent so many flushes, each behind exactly one other request, is expected to send one behind the
next request too. If it doesn't, one sync was for nothing, and the counting begins anew."""
FLUSHES_REPEATED_MAX: Final = 3
"""More flushes than that for one and the same state come from a client that repeats a flush until it is answered (fio
sends 20 times as many as it needs); while they wait, its connection is not read."""


class FlushGroup(NamedTuple):
    """A flush under way: `Volume.flush_state` when it began, and who waits for it (cookie, offset, taken at)."""

    state: int
    waiting: list[tuple[int, int, int]]


class Dispatch:
    """The requests of one connection.

    area: REPLY_AREA_BYTES, shared by all connections of the loop; only `run` writes into it, and `run` does not wait.
    contexts: id of each selected metadata context, and what answers for it. meter: counts what is done; slow: looks
    for slow requests; None = nobody does.
    Every attribute is changed in the event loop only; tasks own their buffers until they end.
    """

    def __init__(
        self,
        volume: Volume,
        replies: wire.Replies,
        outbox: Outbox,
        pool: BufferPool,
        area: memoryview,
        *,
        extended: bool,
        read_only: bool = False,
        contexts: Sequence[tuple[int, ExtentQuery]] = (),
        meter: Meter | None = None,
        slow: SlowWatch | None = None,
    ) -> None:
        self.held_bytes = 0
        """Data of the requests that tasks are working on."""
        self.cautious = False
        """The peer may be gone: no write happens before `Outbox.alive` has been asked."""
        self.request_count = 0
        self.error_count = 0
        self._volume = volume
        self._read_only = read_only or volume.read_only
        self._replies = replies
        self._outbox = outbox
        self._pool = pool
        self._area = area
        self._extended = extended
        self._contexts = dict(contexts)
        self._meter = meter
        self._slow = slow
        self._began = 0
        """When the batch at hand was taken (perf_counter_ns)."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._hurried = False
        self._flush_group: FlushGroup | None = None
        """The youngest flush under way."""
        self._last_flush = 0
        """`request_count` when the last flush came."""
        self._rhythm = 0
        """Flushes that came without a break, each behind exactly one other request."""
        self._loop = asyncio.get_running_loop()
        self._plain_write_flags = _PAYLOAD_LEN if extended else 0
        self._flags_allowed = {int(command): int(flags) for command, flags in FLAGS_ALLOWED.items()}
        if not replies.chunked:
            self._flags_allowed[_READ] &= ~int(CommandFlag.DF)
        if extended:
            self._flags_allowed[_WRITE] |= _PAYLOAD_LEN
            self._flags_allowed[Command.BLOCK_STATUS] |= _PAYLOAD_LEN

    @property
    def in_flight(self) -> int:
        """Requests that tasks are working on."""
        return len(self._tasks)

    async def settle(self) -> None:
        """Wait until no task is left; their replies are queued (or dropped with the connection)."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    def hurry(self) -> None:
        """The server is to close: nothing waits because of the volume's limits any more."""
        self._hurried = True
        if self._volume.limiter is not None:
            self._volume.limiter.dismiss(self, go=True)

    def drop_limited(self) -> None:
        """The peer is gone: what waits because of the volume's limits is not done any more."""
        if self._volume.limiter is not None:
            self._volume.limiter.dismiss(self, go=False)

    def cancel(self) -> None:
        """Give up the requests in flight; they get no reply."""
        for task in self._tasks:
            task.cancel()

    def refusal(self, command: int, flags: int, offset: int, length: int) -> tuple[ErrorValue, str] | None:
        """Why a request is refused before anything is done for it; None = it may be tried."""
        allowed = self._flags_allowed.get(command)
        if allowed is None:
            return ErrorValue.EINVAL, f"unknown command {command}"
        if flags & ~allowed:
            return ErrorValue.EINVAL, f"flags {flags & ~allowed:#x} do not belong to command {command}"
        if command == _WRITE and self._extended and not flags & _PAYLOAD_LEN:
            return ErrorValue.EINVAL, "a write with extended headers needs PAYLOAD_LEN"
        volume = self._volume
        if command in CHANGING and self._read_only:
            return ErrorValue.EPERM, "the export is read-only"
        if command == Command.FLUSH:
            return None
        if command == Command.BLOCK_STATUS:
            if not self._contexts:
                return ErrorValue.EINVAL, "no metadata context was selected"
            if flags & _PAYLOAD_LEN:
                return None
            if not length:
                return ErrorValue.EINVAL, "block status of nothing"
        if offset + length > volume.size_bytes:
            value = ErrorValue.ENOSPC if command in SPACE_TAKING else ErrorValue.EINVAL
            return value, f"past the end of the export offset={offset} length={length} size={volume.size_bytes}"
        if command == _READ and length > REQUEST_BYTES_MAX:
            return ErrorValue.EINVAL, f"a read is at most {REQUEST_BYTES_MAX} bytes, not {length}"
        return None

    @property
    def repeating(self) -> bool:
        """The client repeats a flush that is under way; it has nothing else to say."""
        group = self._flush_group
        return group is not None and len(group.waiting) > FLUSHES_REPEATED_MAX

    def refuses(self, command: int, flags: int, offset: int, length: int) -> bool:
        """The payload of this request need not be kept: it will be refused, or the command has no long payload."""
        return command != _WRITE or self.refusal(command, flags, offset, length) is not None

    def run(self, batch: list[Request]) -> None:
        """Answer a batch as far as that is possible at once, and begin the rest. Payloads are borrowed until return."""
        volume = self._volume
        size_bytes = volume.size_bytes
        limiter = None if self._hurried else volume.limiter
        read_now = volume.read_now
        write_now = None if self._read_only or self.cautious else volume.write_now
        replies = self._replies
        put_data = replies.put_data
        header_bytes = replies.data_header_bytes
        sparse_bytes_min = SPARSE_BYTES_MIN if replies.chunked else REQUEST_BYTES_MAX
        plain_write_flags = self._plain_write_flags
        area = self._area
        at = reads = writes = read_bytes = written_bytes = 0
        began = self._began = perf_counter_ns()
        self.request_count += len(batch)
        for request in batch:
            command, flags, cookie, offset, length, payload, buffer = request
            if limiter is not None and not self._may_go(limiter, command, length):
                self._begin(request, limiter)
                continue
            try:
                if command == _READ:
                    if not flags and 0 < length <= BATCH_READ_BYTES_MAX and offset + length <= size_bytes:
                        data_at = at + header_bytes
                        end = data_at + length
                        zeros = read_now(offset, length, area[data_at:end])
                        if zeros == length:
                            at += self._put_zeros(area, at, cookie, offset, length)
                            reads += 1
                            read_bytes += length
                            continue
                        if 0 <= zeros < sparse_bytes_min:
                            put_data(area, at, cookie, offset, length)
                            at = end
                            reads += 1
                            read_bytes += length
                            continue
                    elif length > BATCH_READ_BYTES_MAX and not flags and self._read_large(cookie, offset, length):
                        reads += 1
                        read_bytes += length
                        continue
                elif (
                    command == _WRITE
                    and flags == plain_write_flags
                    and write_now is not None
                    and payload is not None
                    and offset + length <= size_bytes
                    and write_now(offset, payload)
                ):
                    if buffer is not None:
                        self._pool.release(buffer)
                    at += replies.put_done(area, at, cookie, offset)
                    writes += 1
                    written_bytes += length
                    continue
            except Exception as error:  # noqa: BLE001 - nothing that a volume raises may end the loop's callback
                if buffer is not None:
                    self._pool.release(buffer)
                self._fail(error, command, cookie, offset)
                continue
            self._begin(request)
        if at:
            self._outbox.put_area(at)
        meter = self._meter
        if meter is not None:
            took = perf_counter_ns() - began
            if reads:
                meter.batch(_READ, reads, read_bytes, took)
            if writes:
                meter.batch(_WRITE, writes, written_bytes, took)
        if self._rhythm >= RHYTHM_MIN and self.request_count == self._last_flush + 1:
            self._volume.sync_soon()

    def _may_go(self, limiter: Limiter, command: int, length: int) -> bool:
        if command not in LIMITED:
            return True
        write, bytes_count = LIMITED[command]
        return limiter.take(write=write, length_bytes=length if bytes_count else 0)

    def _put_zeros(self, area: memoryview, at: int, cookie: int, offset: int, length: int) -> int:
        """The reply to a read of nothing but zeros; returns its length."""
        if self._replies.chunked:
            return self._replies.put_hole(area, at, cookie, offset, length)
        header_bytes = self._replies.data_header_bytes
        self._replies.put_data(area, at, cookie, offset, length)
        area[at + header_bytes : at + header_bytes + length] = ZEROS[:length]
        return header_bytes + length

    def _read_large(self, cookie: int, offset: int, length: int) -> bool:
        """Answer a long read at once, out of a buffer of its own; False: not possible, nothing done."""
        if length > REQUEST_BYTES_MAX or offset + length > self._volume.size_bytes:
            return False
        buffer = self._pool.take(length)
        if buffer is None:
            return False
        try:
            zeros = self._volume.read_now(offset, length, buffer.data[:length])
        except BaseException:
            self._pool.release(buffer)
            raise
        chunked = self._replies.chunked
        if zeros < 0 or (zeros >= SPARSE_BYTES_MIN and zeros < length and chunked) or (zeros == length and not chunked):
            self._pool.release(buffer)
            return False
        if zeros == length:
            self._pool.release(buffer)
            header = bytearray(wire.HEADER_BYTES_MAX)
            used = self._replies.put_hole(memoryview(header), 0, cookie, offset, length)
            self._outbox.put((bytes(header[:used]),))
        else:
            self._put_buffer(buffer, cookie, offset, length)
        return True

    def _put_buffer(self, buffer: Buffer, cookie: int, offset: int, length: int) -> None:
        """Queue the data in `buffer` as the answer to a read, its header in the room in front."""
        start = HEAD_BYTES - self._replies.data_header_bytes
        self._replies.put_data(buffer.whole, start, cookie, offset, length)
        self._outbox.put((buffer.whole[start : HEAD_BYTES + length],), buffer)

    def _begin(self, request: Request, limiter: Limiter | None = None) -> None:
        """Refuse a request or give it to a task. limiter: whose leave it has to wait for."""
        command, flags, cookie, offset, length, payload, buffer = request
        refused = self.refusal(command, flags, offset, length)
        if refused is None and command == _WRITE and payload is None:
            refused = ErrorValue.EIO, "the export changed while the payload was dropped"
        if refused is not None:
            if buffer is not None:
                self._pool.release(buffer)
            self._refuse(cookie, offset, *refused)
            return
        if command == Command.FLUSH:
            self._begin_flush(cookie, offset)
            return
        copied_bytes = 0
        if payload is not None and buffer is None:
            payload = memoryview(bytes(payload))
            copied_bytes = length
            self._pool.charge(copied_bytes)
        if command == _READ or payload is not None:
            self.held_bytes += length
        request = (command, flags, cookie, offset, length, payload, buffer)
        self._start(self._answer(request, copied_bytes, self._began, limiter))

    def _begin_flush(self, cookie: int, offset: int) -> None:
        """Answer a flush at once if nothing awaits durability; let it share the flush under way if nothing changed
        since that began (fio repeats a flush until it is answered); else begin one."""
        self._rhythm = self._rhythm + 1 if self.request_count == self._last_flush + 2 else 0
        self._last_flush = self.request_count
        state = self._volume.flush_state()
        group = self._flush_group
        if not state:
            self._done(cookie, offset)
            if self._meter is not None:
                self._meter.batch(Command.FLUSH, 1, 0, perf_counter_ns() - self._began)
        elif group is not None and group.state == state and len(group.waiting) < FLUSHES_JOINED_MAX:
            group.waiting.append((cookie, offset, self._began))
        else:
            group = self._flush_group = FlushGroup(state, [(cookie, offset, self._began)])
            self._start(self._flush(group))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._outbox.task_ended()

    async def _answer(self, request: Request, copied_bytes: int, began: int, limiter: Limiter | None) -> None:
        """Do one request that may wait, and queue its reply. began: when it was taken."""
        command, _, cookie, offset, length, payload, buffer = request
        done_bytes = 0
        stages = None if self._slow is None else self._slow.begin()
        try:
            if limiter is not None:
                write, bytes_count = LIMITED[command]
                with stage("limit"):
                    goes = await limiter.wait(self, write=write, length_bytes=length if bytes_count else 0)
                if not goes:
                    self._outbox.finish()
                    return
            await _PERFORM[command](self, request)
            done_bytes = length
        except Exception as error:  # noqa: BLE001 - whatever it is, the request gets its reply
            self._fail(error, command, cookie, offset)
        finally:
            self._count(command, done_bytes, began)
            if self._slow is not None and stages is not None:
                self._slow.end(command, offset, length, began, stages)
            if buffer is not None:
                self._pool.release(buffer)
            if copied_bytes:
                self._pool.discharge(copied_bytes)
            if command == _READ or payload is not None:
                self.held_bytes -= length

    def _fail(self, error: Exception, command: int, cookie: int, offset: int) -> None:
        """Answer a request with the error that it met, unless no answer is better than an error."""
        dropped = isinstance(error, errors.InvalidRequest) and command in CHANGING and not self._outbox.alive()
        if dropped or isinstance(error, errors.Stopping):
            self._outbox.finish()
            return
        self._refuse(cookie, offset, error_value(error, command), str(error))
        if isinstance(error, errors.Fenced):
            self._outbox.finish()

    def _refuse(self, cookie: int, offset: int, value: ErrorValue, message: str) -> None:
        """Answer a request with an error."""
        self.error_count += 1
        if self._meter is not None:
            self._meter.error(value.name)
        self._outbox.put((self._replies.error(cookie, offset, value, message),))

    def _count(self, command: int, length: int, began: int) -> None:
        """A request that was taken at `began` has been answered, or dropped with its connection."""
        if self._meter is not None:
            self._meter.one(command, length, perf_counter_ns() - began)

    def _done(self, cookie: int, offset: int) -> None:
        self._outbox.put((self._replies.done(cookie, offset),))

    async def _write(self, request: Request) -> None:
        _, flags, cookie, offset, _, payload, _ = request
        assert payload is not None
        await self._volume.write(offset, payload, fua=bool(flags & _FUA), alive=self._outbox.alive)
        self._done(cookie, offset)

    async def _flush(self, group: "FlushGroup") -> None:
        """Do one flush and answer everyone who shares it."""
        stages = None if self._slow is None else self._slow.begin()
        try:
            await self._volume.flush()
        except Exception as error:  # noqa: BLE001 - whatever it is, each of them gets its reply
            for cookie, offset, _ in group.waiting:
                self._fail(error, Command.FLUSH, cookie, offset)
        else:
            for cookie, offset, _ in group.waiting:
                self._done(cookie, offset)
        finally:
            for _, _, began in group.waiting:
                self._count(Command.FLUSH, 0, began)
            if self._slow is not None and stages is not None:
                self._slow.end(Command.FLUSH, 0, 0, group.waiting[0][2], stages)
            if self._flush_group is group:
                self._flush_group = None

    async def _trim(self, request: Request) -> None:
        _, flags, cookie, offset, length, _, _ = request
        await self._volume.trim(offset, length, fua=bool(flags & _FUA), alive=self._outbox.alive)
        self._done(cookie, offset)

    async def _cache(self, request: Request) -> None:
        _, _, cookie, offset, length, _, _ = request
        await self._volume.cache(offset, length)
        self._done(cookie, offset)

    async def _write_zeroes(self, request: Request) -> None:
        _, flags, cookie, offset, length, _, _ = request
        await self._volume.zero(
            offset,
            length,
            no_hole=bool(flags & CommandFlag.NO_HOLE),
            fast=bool(flags & CommandFlag.FAST_ZERO),
            fua=bool(flags & _FUA),
            alive=self._outbox.alive,
        )
        self._done(cookie, offset)

    async def _block_status(self, request: Request) -> None:
        _, flags, cookie, offset, length, payload, _ = request
        wanted: Sequence[int] = tuple(self._contexts)
        if flags & _PAYLOAD_LEN:
            length, wanted = self._status_filter(payload)
            if offset + length > self._volume.size_bytes:
                raise errors.InvalidRequest(f"past the end of the export offset={offset} length={length}")
        extents_max = 1 if flags & CommandFlag.REQ_ONE else STATUS_EXTENTS_MAX
        chunks = []
        for index, context_id in enumerate(wanted, start=1):
            query = self._contexts[context_id]
            extents = await query(self._volume, offset, length, extents_max)
            chunks.append(self._replies.status(cookie, offset, context_id, extents, done=index == len(wanted)))
        self._outbox.put(chunks)

    def _status_filter(self, payload: memoryview | None) -> tuple[int, Sequence[int]]:
        """Effect length and contexts out of the payload of a block status request."""
        if payload is None:
            raise errors.InvalidRequest("payload of a block status request is too long")
        try:
            length, wanted = decode_status_payload(payload)
        except ValueError as error:
            raise errors.InvalidRequest(str(error)) from error
        if not length or not wanted:
            raise errors.InvalidRequest("block status of nothing")
        if len(set(wanted)) != len(wanted) or not set(wanted) <= self._contexts.keys():
            raise errors.InvalidRequest("unknown or repeated metadata context id")
        return length, wanted

    async def _read(self, request: Request) -> None:
        _, flags, cookie, offset, length, _, _ = request
        if not length:
            self._done(cookie, offset)
            return
        with stage("memory"):
            buffer: Buffer | None = await self._pool.acquire(length)
        assert buffer is not None
        whole = bool(flags & CommandFlag.DF) or not self._replies.chunked
        into = buffer.data[:length]
        try:
            try:
                zeros = await self._volume.read(offset, length, into)
            except errors.Corrupt as error:
                if not self._replies.chunked or not 0 < len(error.bad) <= DAMAGED_RANGES_MAX:
                    raise
                self.error_count += 1
                if self._meter is not None:
                    self._meter.error(ErrorValue.EIO.name)
                views = damaged(self._replies, cookie, offset, into, error.bad, str(error), whole=whole)
                self._outbox.put(views, buffer)
                buffer = None
                return
            if zeros == length:
                _fill_zeros(into)
            if whole or zeros < min(length, SPARSE_BYTES_MIN):
                self._put_buffer(buffer, cookie, offset, length)
            else:
                extents = [Extent(length, hole=True, zero=True)]
                if zeros < length:
                    extents = await self._volume.extents(offset, length)
                self._outbox.put(sparse(self._replies, cookie, offset, into, extents), buffer)
            buffer = None
        finally:
            if buffer is not None:
                self._pool.release(buffer)


def _fill_zeros(into: memoryview) -> None:
    for at in range(0, len(into), len(ZEROS)):
        part = into[at : at + len(ZEROS)]
        part[:] = ZEROS[: len(part)]


_PERFORM: Final[dict[int, Callable[[Dispatch, Request], Coroutine[Any, Any, None]]]] = {
    Command.READ: Dispatch._read,
    Command.WRITE: Dispatch._write,
    Command.TRIM: Dispatch._trim,
    Command.CACHE: Dispatch._cache,
    Command.WRITE_ZEROES: Dispatch._write_zeroes,
    Command.BLOCK_STATUS: Dispatch._block_status,
}

"""Writes without a thread: they are calls of their zones like others, whatever becomes of them."""

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from objstore.backend.base import Handle, ZoneFailed
from objstore.backend.directory import DirectoryBackend
from objstore.errors import Busy, NoSpace
from objstore.log.writer import paged_memory
from objstore.replica import zone as zone_module
from objstore.replica.ring import ENTRIES, Request, Ring
from objstore.replica.zone import ThreadExecutor, Write
from tests.support.serving import eventually

PAGE = 4096
OUT = ZoneFailed("the zone is out of service")


class ScriptedRing:
    """A ring whose completions the test decides."""

    def __init__(self) -> None:
        self.eventfd = os.eventfd(0, os.EFD_NONBLOCK)
        self.requests: list[Request] = []
        self.takes = ENTRIES
        self.closed = False
        self._done: list[tuple[int, int]] = []

    def submit(self, requests: list[Request]) -> int:
        self.requests += requests[: self.takes]
        return min(len(requests), self.takes)

    def complete(self, request: Request, result: int) -> None:
        self._done.append((request.number, result))
        os.eventfd_write(self.eventfd, 1)

    def completed(self) -> list[tuple[int, int]]:
        os.eventfd_read(self.eventfd)
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def ring(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedRing]:
    scripted = ScriptedRing()
    monkeypatch.setattr(zone_module.Ring, "open", lambda: scripted)
    yield scripted
    os.close(scripted.eventfd)


@pytest.fixture
async def executor() -> AsyncIterator[ThreadExecutor]:
    made = ThreadExecutor()
    yield made
    made.close()


@pytest.fixture
def handle(tmp_path: Path) -> Iterator[Handle]:
    (tmp_path / "zone").mkdir()
    backend = DirectoryBackend(str(tmp_path / "zone"))
    made = backend.create("log/file", 4 * PAGE)
    yield made
    made.close()
    backend.close()


class Answers:
    """Collects what calls end with."""

    def __init__(self) -> None:
        self.all: list[Any] = []

    def __call__(self, result: object, error: BaseException | None) -> None:
        self.all.append(result if error is None else error)


def write(handle: Handle, done: Answers, *, zone: int = 0, at: int = 0, data: bytes = b"x" * PAGE) -> Write:
    return Write(zone, handle, at, memoryview(bytearray(data)), False, done)


def content(handle: Handle, length: int = PAGE) -> bytes:
    data = bytearray(length)
    handle.read(0, [memoryview(data)])
    return bytes(data)


async def test_the_kernel_itself_writes(executor: ThreadExecutor, handle: Handle) -> None:
    done = Answers()
    if executor.start_writes([write(handle, done)]) == [False]:
        pytest.skip("no io_uring here")
    assert executor.outstanding(0) == 1
    await eventually(lambda: bool(done.all))
    assert done.all == [None]
    assert content(handle) == b"x" * PAGE
    assert executor.outstanding(0) == 0


async def test_around_the_cache_where_the_handle_is_ready_for_it(executor: ThreadExecutor, handle: Handle) -> None:
    done = Answers()
    around = write(handle, done)._replace(around=True)
    assert executor.start_writes([around]) == [False]
    handle.open_around()
    if handle.begin_durable(0, PAGE, around=True) < 0 or Ring.open() is None:
        pytest.skip("no io_uring or no O_DIRECT here")
    assert executor.start_writes([write(handle, done, at=1)._replace(around=True)]) == [False], "not whole pages"
    view = paged_memory(PAGE)
    view[:] = b"y" * PAGE
    assert executor.start_writes([around._replace(view=view)]) == [True]
    await eventually(lambda: bool(done.all))
    assert done.all == [None]
    assert content(handle) == b"y" * PAGE


async def test_a_call_like_others(executor: ThreadExecutor, handle: Handle, ring: ScriptedRing) -> None:
    done = Answers()
    executor.poll(5.0)
    assert executor.start_writes([write(handle, done), write(handle, done, zone=1, at=PAGE)]) == [True, True]
    executor.poll(7.0)
    assert (executor.oldest(0), executor.oldest(1)) == (5.0, 5.0)
    ring.complete(ring.requests[1], PAGE)
    await eventually(lambda: len(done.all) == 1)
    assert (executor.oldest(0), executor.oldest(1)) == (5.0, None)
    ring.complete(ring.requests[0], PAGE)
    await eventually(lambda: len(done.all) == 2)
    assert done.all == [None, None]


async def test_errors_are_those_of_write_durable_and_final(
    executor: ThreadExecutor, handle: Handle, ring: ScriptedRing
) -> None:
    done = Answers()
    executor.start_writes([write(handle, done)])
    ring.complete(ring.requests[0], -errno.ENOSPC)
    await eventually(lambda: len(done.all) == 1)
    assert isinstance(done.all[0], NoSpace)
    executor.start_writes([write(handle, done)])
    ring.complete(ring.requests[1], -errno.EIO)
    await eventually(lambda: len(done.all) == 2)
    assert isinstance(done.all[1], ZoneFailed)
    assert executor.start_writes([write(handle, done)]) == [False]
    with pytest.raises(ZoneFailed):
        handle.sync()


@pytest.mark.parametrize("result", [-errno.EINVAL, -errno.EOPNOTSUPP, 100])
async def test_what_the_kernel_did_not_take_or_not_wholly_a_thread_does(
    executor: ThreadExecutor, handle: Handle, ring: ScriptedRing, result: int
) -> None:
    done = Answers()
    executor.start_writes([write(handle, done, data=b"t" * PAGE)])
    ring.complete(ring.requests[0], result)
    await eventually(lambda: bool(done.all))
    assert done.all == [None]
    assert content(handle) == b"t" * PAGE
    assert executor.outstanding(0) == 0


async def test_one_that_hangs_harms_nobody(executor: ThreadExecutor, handle: Handle, ring: ScriptedRing) -> None:
    done = Answers()
    executor.start_writes([write(handle, done)])
    executor.abandon(0, OUT, [handle])
    assert done.all == [OUT]
    assert executor.outstanding(0) == 1
    with pytest.raises(Busy):
        executor.readmit(0)
    assert executor.start_writes([write(handle, done)]) == [False], "the zone is out"
    assert content(handle) == bytes(PAGE), "the orphan is closed when the call has returned, not before"
    ring.complete(ring.requests[0], 1)
    await eventually(lambda: executor.outstanding(0) == 0)
    assert done.all == [OUT]
    executor.readmit(0)


async def test_as_many_as_the_ring_takes(executor: ThreadExecutor, handle: Handle, ring: ScriptedRing) -> None:
    done = Answers()
    ring.takes = 1
    assert executor.start_writes([write(handle, done), write(handle, done)]) == [True, False]
    ring.takes = ENTRIES
    assert executor.start_writes([write(handle, done)] * (ENTRIES - 1)) == [True] * (ENTRIES - 1)
    assert executor.start_writes([write(handle, done)]) == [False], "it is full"
    assert executor.outstanding(0) == ENTRIES


async def test_what_only_write_durable_can_do(executor: ThreadExecutor, handle: Handle, ring: ScriptedRing) -> None:
    done = Answers()
    read_only = write(handle, done)._replace(view=memoryview(b"x" * PAGE))
    assert executor.start_writes([read_only]) == [False]
    past = write(handle, done, at=4 * PAGE)
    assert executor.start_writes([past]) == [False]
    handle.truncate(2 * PAGE)
    assert executor.start_writes([write(handle, done)]) == [False], "its size is not durable yet"


async def test_closed(handle: Handle, ring: ScriptedRing) -> None:
    executor = ThreadExecutor()
    done = Answers()
    executor.start_writes([write(handle, done)])
    executor.close()
    assert ring.closed
    assert executor.start_writes([write(handle, done)]) == [False]
    ring.complete(ring.requests[0], PAGE)
    await asyncio.sleep(0)
    assert done.all == []

"""The ring against the kernel: what it writes, what it reports, what it keeps while the kernel works."""

import errno
import mmap
import os
import select
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from objstore.replica import ring as ring_module
from objstore.replica.ring import ENTRIES, Request, Ring

PAGE = 4096


@pytest.fixture
def ring() -> Iterator[Ring]:
    made = Ring.open()
    if made is None:
        pytest.skip("no io_uring here")
    yield made
    made.close()


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    opened = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield opened
    os.close(opened)


def wait(ring: Ring, count: int) -> dict[int, int]:
    """The next `count` completions."""
    found: dict[int, int] = {}
    poll = select.poll()
    poll.register(ring.eventfd, select.POLLIN)
    while len(found) < count:
        assert poll.poll(10_000), "no completion"
        found |= dict(ring.completed())
    return found


def test_what_is_submitted_is_written_where_it_belongs(ring: Ring, fd: int) -> None:
    pieces = {i: bytes([65 + i]) * (100 + i) for i in range(3)}
    requests = [Request(i, fd, i * 1000, memoryview(bytearray(piece))) for i, piece in pieces.items()]
    assert ring.submit(requests) == 3
    assert wait(ring, 3) == {i: len(piece) for i, piece in pieces.items()}
    assert all(os.pread(fd, len(piece), i * 1000) == piece for i, piece in pieces.items())
    assert ring.completed() == []


def test_the_queues_go_round(ring: Ring, fd: int) -> None:
    for turn in range(5):
        requests = [
            Request(turn * ENTRIES + i, fd, i * 8, memoryview(bytearray(b"%08d" % (turn * ENTRIES + i))))
            for i in range(ENTRIES)
        ]
        assert ring.submit(requests) == ENTRIES
        assert wait(ring, ENTRIES) == {request.number: 8 for request in requests}
    assert os.pread(fd, 8 * ENTRIES, 0) == b"".join(b"%08d" % (4 * ENTRIES + i) for i in range(ENTRIES))


def test_errors_are_those_of_the_write(ring: Ring, fd: int, tmp_path: Path) -> None:
    read_only = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        view = memoryview(bytearray(b"x"))
        assert ring.submit([Request(0, read_only, 0, view), Request(1, fd, 0, view)]) == 2
        assert wait(ring, 2) == {0: -errno.EBADF, 1: 1}
    finally:
        os.close(read_only)


def test_around_the_page_cache(ring: Ring, fd: int, tmp_path: Path) -> None:
    os.posix_fallocate(fd, 0, 4 * PAGE)
    try:
        direct = os.open(tmp_path / "file", os.O_RDWR | os.O_DIRECT)
    except OSError:
        pytest.skip("no O_DIRECT on this file system")
    try:
        view = memoryview(mmap.mmap(-1, PAGE))
        view[:] = b"d" * PAGE
        assert ring.submit([Request(7, direct, 2 * PAGE, view)]) == 1
        assert wait(ring, 1) == {7: PAGE}
        assert os.pread(fd, 4 * PAGE, 0) == bytes(2 * PAGE) + b"d" * PAGE + bytes(PAGE)
    finally:
        os.close(direct)


def test_memory_is_kept_as_long_as_the_kernel_may_read_it(ring: Ring, fd: int) -> None:
    memory = bytearray(b"x" * PAGE)
    assert ring.submit([Request(0, fd, 0, memoryview(memory))]) == 1
    with pytest.raises(BufferError):
        memory.clear()
    wait(ring, 1)
    memory.clear()


def test_what_the_kernel_does_not_take_is_given_back(ring: Ring, fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    views = [memoryview(bytearray(b"%d" % i)) for i in range(4)]
    requests = [Request(i, fd, i, view) for i, view in enumerate(views)]
    real = ring_module._syscall

    def takes_one(number: int, *arguments: int) -> int:
        return int(real(number, arguments[0], 1, *arguments[2:]))

    with monkeypatch.context() as patched:
        patched.setattr(ring_module, "_syscall", takes_one)
        assert ring.submit(requests) == 1
    assert wait(ring, 1) == {0: 1}
    with monkeypatch.context() as patched:
        patched.setattr(ring_module, "_syscall", lambda *_: -1)
        assert ring.submit(requests[1:]) == 0
    assert ring.submit(requests[3:]) == 1
    assert wait(ring, 1) == {3: 1}
    assert os.pread(fd, 4, 0) == b"0\0\0" + b"3"


def test_closed_with_something_under_way_it_stays(fd: int) -> None:
    ring = Ring.open()
    if ring is None:
        pytest.skip("no io_uring here")
    assert ring.submit([Request(0, fd, 0, memoryview(bytearray(b"x")))]) == 1
    ring.close()
    ring.close()
    left = weakref.ref(ring)
    del ring
    kept = left()
    assert kept is not None
    ring_module._LEFT.remove(kept)


def test_without_anything_under_way_its_descriptors_go() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        ring = Ring.open()
        if ring is None:
            pytest.skip("no io_uring here")
        ring.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring_module.platform, "machine", lambda: "riscv64")
    assert Ring.open() is None


@pytest.mark.parametrize("refused", [ring_module._SETUP, ring_module._REGISTER])
def test_a_kernel_that_refuses_leaves_nothing_open(refused: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ring_module._syscall
    monkeypatch.setattr(ring_module, "_syscall", lambda number, *rest: -1 if number == refused else real(number, *rest))
    before = sorted(os.listdir("/proc/self/fd"))
    assert Ring.open() is None
    assert len(os.listdir("/proc/self/fd")) == len(before)

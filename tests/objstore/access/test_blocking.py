"""The blocking facade and its file object."""

import asyncio
import errno
import inspect
import io
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import objstore
from objstore import Connection, Corrupt, InvalidRequest, OutOfRange, VdiFile, VdiHandle, blocking
from objstore.access import file as access_file
from objstore.access.blocking import BlockingConnection, BlockingVdi
from tests.objstore.access.conftest import serving

MIB = 1 << 20


@pytest.fixture(params=[False, True], ids=["inside", "background"])
def store(request: pytest.FixtureRequest, zones: list[Path]) -> Iterator[BlockingConnection]:
    with blocking.connect(zones, create=True, background=request.param) as store:
        yield store


@pytest.fixture
def vdi(store: BlockingConnection) -> Iterator[BlockingVdi]:
    store.create("disk", MIB)
    with store.open("disk") as vdi:
        yield vdi


def public(kind: type) -> dict[str, Callable[..., Any]]:
    return {name: value for name, value in inspect.getmembers(kind, callable) if not name.startswith("_")}


@pytest.mark.parametrize(("ours", "theirs"), [(BlockingVdi, VdiHandle), (BlockingConnection, Connection)])
def test_the_names_and_parameters_are_the_same(ours: type, theirs: type) -> None:
    extra = {"file"} if ours is BlockingVdi else {"wait"}
    assert public(ours).keys() - extra == public(theirs).keys()
    for name, method in public(theirs).items():
        wanted = str(inspect.signature(method).replace(return_annotation=None)).replace("VdiHandle", "BlockingVdi")
        assert str(inspect.signature(public(ours)[name]).replace(return_annotation=None)) == wanted, name


def test_the_life_of_a_store(store: BlockingConnection) -> None:
    store.create("a", MIB, copies=1)
    store.create("b", MIB)
    assert [vdi.name for vdi in store.vdis()] == ["a", "b"]
    with store.open("a") as vdi:
        assert vdi.write(10, b"hello", writeback=True) == 5
        assert vdi.writev([(100, 2), (200, 2)], [b"w", b"xyz"]) == 4
        vdi.flush()
        assert vdi.read(9, 7) == b"\0hello\0"
        into = bytearray(4)
        assert vdi.readv([(100, 2), (200, 2)], [into]) == 4
        assert into == b"wxyz"
        vdi.zero(0, 4096)
        vdi.discard(0, MIB)
        assert [extent.hole for extent in vdi.map()] == [True]
        with pytest.raises(OutOfRange):
            vdi.read(MIB, 1)
    assert vdi.closed
    with pytest.raises(InvalidRequest, match="closed"):
        vdi.write(0, b"stale")
    assert store.info("a").attached == 0
    assert store.damage("a").ranges == []
    assert store.set_copies("a", 2).copies == 2
    assert store.status().vdis == 2
    assert [zone.number for zone in store.zones()] == [0, 1]
    assert store.change_zones("set-weight", "0", weight=2.0)[0].weight == 2.0
    assert store.set_recovery_rate(MIB).bytes_per_second_max == MIB
    store.start_scrub()
    while store.scrub().running or store.recovery().running:
        store.wait(0.01)
    store.delete("b")
    assert [vdi.name for vdi in store.vdis()] == ["a"]


INTERRUPTED = """
import asyncio, os, signal, sys, threading
from objstore import blocking

waits = threading.Event()

async def call():
    waits.set()
    await asyncio.sleep(300)

def interrupt():
    waits.wait()
    os.kill(os.getpid(), signal.SIGINT)

with blocking.connect(sys.argv[2:], create=True, background=sys.argv[1] == "background") as store:
    threading.Thread(target=interrupt).start()
    try:
        store._runner.run(call())
    except KeyboardInterrupt:
        print(store.create("disk", 1 << 20).name)
"""


@pytest.mark.parametrize("where", ["inside", "background"])
def test_ctrl_c_ends_the_call_and_not_the_connection(zones: list[Path], where: str) -> None:
    """In a process of its own: what a signal does here depends on the tests before."""
    command = [sys.executable, "-c", INTERRUPTED, where, *map(str, zones)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "disk\n"), done.stderr


def test_no_thread_of_the_facades_own(zones: list[Path]) -> None:
    """Zones have threads; the loop has one only if that was asked for."""
    with blocking.connect(zones, create=True):
        assert "objstore" not in {thread.name for thread in threading.enumerate()}
    with blocking.connect(zones, background=True):
        assert "objstore" in {thread.name for thread in threading.enumerate()}
    assert "objstore" not in {thread.name for thread in threading.enumerate()}


def test_threads_may_share_a_connection_with_a_loop_in_the_background(zones: list[Path]) -> None:
    with blocking.connect(zones, create=True, background=True) as store:
        store.create("disk", MIB)
        with store.open("disk") as vdi:
            threads = [threading.Thread(target=vdi.write, args=(n * 1000, bytes([n + 1]) * 1000)) for n in range(20)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert vdi.read(0, 20_000) == b"".join(bytes([n + 1]) * 1000 for n in range(20))


def test_what_was_written_is_there_in_the_next_life(zones: list[Path]) -> None:
    with blocking.connect(zones, create=True) as store:
        store.create("disk", MIB)
        with store.open("disk") as vdi:
            vdi.write(0, b"kept", writeback=True)
    with blocking.connect(zones) as store, store.open("disk", read_only=True) as vdi:
        assert vdi.read(0, 5) == b"kept\0"
    store.close()


def test_a_server_is_reached_as_well(zones: list[Path], socket_path: Path) -> None:
    """The server runs in a thread of its own here."""
    started, stop = threading.Event(), threading.Event()

    async def serve() -> None:
        async with serving(zones, socket_path):
            started.set()
            await asyncio.to_thread(stop.wait)

    server = threading.Thread(target=asyncio.run, args=(serve(),))
    server.start()
    started.wait()
    try:
        with blocking.connect(socket=socket_path) as store:
            store.create("disk", 4 * MIB)
            with store.open("disk") as vdi, vdi.file() as file:
                file.write(b"through a socket")
                file.seek(0)
                assert file.readall() == b"through a socket".ljust(4 * MIB, b"\0")
                assert [(extent.length_bytes, extent.hole) for extent in vdi.map(0, 8192)] == [
                    (4096, False),
                    (4096, True),
                ]
    finally:
        stop.set()
        server.join()


def test_a_connection_that_fails_leaves_nothing_behind(zones: list[Path]) -> None:
    for background in (False, True):
        with pytest.raises(objstore.Unavailable):
            blocking.connect(zones, background=background)
    assert "objstore" not in {thread.name for thread in threading.enumerate()}


# -- the file object ----------------------------------------------------------------------------------------------


def test_a_vdi_is_a_file(vdi: BlockingVdi) -> None:
    file = vdi.file()
    assert isinstance(file, io.RawIOBase)
    assert file.readable()
    assert file.writable()
    assert file.seekable()
    assert file.name == "disk"
    assert file.seek(0, io.SEEK_END) == MIB
    assert file.read(10) == b""
    assert file.seek(-4, io.SEEK_END) == MIB - 4
    assert file.write(b"abcdef") == 4
    with pytest.raises(OSError, match="the end of VDI 'disk'") as info:
        file.write(b"x")
    assert info.value.errno == errno.ENOSPC
    assert file.write(b"") == 0
    file.seek(MIB - 6)
    assert file.readall() == b"\0\0abcd"
    assert file.tell() == MIB
    assert file.seek(5 * MIB) == 5 * MIB
    assert file.read(3) == b""
    assert file.truncate(MIB) == MIB
    for wrong in (lambda: file.truncate(5), lambda: file.seek(-1), lambda: file.seek(0, 9)):
        with pytest.raises(OSError, match=r"keeps its|seek to") as info:
            wrong()
        assert info.value.errno == errno.EINVAL
    file.flush()
    file.close()
    file.flush()
    with pytest.raises(ValueError, match="closed"):
        file.read(1)
    assert vdi.read(MIB - 4, 4) == b"abcd"


def test_buffered_and_copied(vdi: BlockingVdi) -> None:
    with io.BufferedRandom(vdi.file()) as buffered:
        for number in range(1000):
            buffered.write(b"%07d\n" % number)
        buffered.seek(8 * 500)
        assert buffered.readline() == b"0000500\n"
        buffered.seek(0)
        copy = io.BytesIO()
        shutil.copyfileobj(buffered, copy)
    assert len(copy.getvalue()) == MIB
    assert copy.getvalue()[8 * 999 : 8 * 1000 + 1] == b"0000999\n\0"
    with pytest.raises(ValueError, match="closed"):
        buffered.read(1)


def test_a_file_over_a_read_only_vdi(store: BlockingConnection) -> None:
    store.create("disk", MIB)
    with store.open("disk", read_only=True) as vdi, vdi.file() as file:
        assert not file.writable()
        assert file.read(3) == b"\0\0\0"
        with pytest.raises(OSError, match="read only") as info:
            file.write(b"x")
        assert info.value.errno == errno.EROFS
        assert isinstance(info.value.__cause__, objstore.ReadOnly)


def test_damage_is_an_io_error_of_a_file() -> None:
    class Damaged:
        name, size_bytes, read_only, closed = "disk", MIB, False, False

        def readinto(self, offset_bytes: int, buffer: object) -> int:
            raise Corrupt("no zone has it", [(0, 4096)])

        def write(self, offset_bytes: int, data: object) -> int:
            raise objstore.NoSpace("full")

        def flush(self) -> None:
            raise objstore.Unavailable("gone")

    file = VdiFile(Damaged())
    for number, work in (
        (errno.EIO, lambda: file.read(1)),
        (errno.ENOSPC, lambda: file.write(b"x")),
        (errno.EIO, file.flush),
    ):
        with pytest.raises(OSError, match=r"no zone|full|gone") as info:
            work()
        assert info.value.errno == number
    with pytest.raises(OSError, match="gone"):
        file.close()
    assert file.closed
    assert access_file.VdiFile is VdiFile

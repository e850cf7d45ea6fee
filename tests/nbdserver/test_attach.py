"""`attach` without a kernel: what is said to it and understood of it, and what the agent does about lost connections.

With a kernel: tests/guests/test_attach.py.
"""

import asyncio
import socket
import struct
import threading
from argparse import ArgumentParser, Namespace
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdserver.attach import agent as agent_module
from nbdserver.attach import command, netlink
from nbdserver.attach.agent import Agent
from nbdserver.attach.errors import GAVE_UP, AttachError
from nbdserver.attach.handshake import Export, Place, Refused, ask, connect, identity_of, parse_place
from nbdserver.attach.netlink import Kernel, attributes, read_dead_links, unpack_messages
from objstore.units import MIB
from objstore.volume.base import VolumeInfo
from objstore.volume.memory import MemorySource, MemoryVolume
from tests.nbdserver.volumes import until
from tests.support.our_server import OurServed, serve_source
from tests.support.serving import Disk

# -- places and handshake ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("disk", Place("disk", path="/run/sheepfold/sheepfold.sock")),
        ("nbd://host/disk", Place("disk", host="host")),
        ("nbd://[::1]:7/a%2Fb", Place("a/b", host="::1", port=7)),
        ("nbd+unix:///my%20disk@tag?socket=/run/x%20y", Place("my disk@tag", path="/run/x y")),
        ("nbd+unix:///?socket=/s", Place("", path="/s")),
    ],
)
def test_where_an_export_is(text: str, place: Place) -> None:
    assert parse_place(text) == place


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("nbds://host/disk", "no TLS"),
        ("nbd:///disk", "no NBD URI"),
        ("nbd+unix:///disk", "no NBD URI"),
        ("nbd://host:99999/disk", "no NBD URI"),
        ("http://host/disk", "no NBD URI"),
    ],
)
def test_what_is_no_place(text: str, reason: str) -> None:
    with pytest.raises(AttachError, match=reason) as caught:
        parse_place(text)
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("description", "identity"),
    [
        ("writeback, 3 copies, identity 0a:1:2:0", "0a:1:2:0"),
        ("writeback, 3 copies", ""),
        ("a disk, identity of nobody", ""),
        ("x, identity " + "a" * 129, ""),
        ("x, identity ", ""),
        ("x, identity é", ""),
    ],
)
def test_the_identity_is_at_the_end_of_the_description(description: str, identity: str) -> None:
    assert identity_of(description) == identity


class KnownSource(MemorySource):
    """Volumes that say which disk they are."""

    identity = "store:1:1:0"

    def peek(self, name: str) -> VolumeInfo | None:
        info = super().peek(name)
        return None if info is None else info._replace(identity=self.identity)


@asynccontextmanager
async def serving(directory: Path, size_bytes: int = MIB) -> AsyncIterator[tuple[OurServed, KnownSource, Place]]:
    source = KnownSource({"disk": MemoryVolume("disk", size_bytes)})
    async with serve_source(source, [Disk("disk", size_bytes)], directory) as served:
        yield served, source, Place("disk", path=served.address.removeprefix("unix://"))


async def test_a_connection_for_the_kernel(tmp_path: Path) -> None:
    """It says size, flags and identity, and takes simple requests; asking says the same."""
    async with serving(tmp_path) as (_, source, place):
        sock, export = await asyncio.to_thread(connect, place)
        with sock:
            assert (export.size_bytes, export.identity) == (MIB, source.identity)
            assert export == await asyncio.to_thread(ask, place)
            sock.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 7, 0, 512))
            reply = await asyncio.to_thread(sock.recv, 16 + 512, socket.MSG_WAITALL)
            assert reply[:16] == struct.pack(">IIQ", 0x67446698, 0, 7)


async def test_an_export_that_is_not_there(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, _, place):
        with pytest.raises(Refused) as caught:
            await asyncio.to_thread(connect, place._replace(name="other"))
        assert caught.value.unknown
    with pytest.raises(OSError, match=r".*"):
        await asyncio.to_thread(connect, place)


@pytest.mark.parametrize("greeting", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"NBDMAGICIHAVEOPT\0\0"])
def test_what_is_no_nbd_server(tmp_path: Path, greeting: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        place = Place("disk", path=str(tmp_path / "s"))
        accepted: list[socket.socket] = []

        def answer() -> None:
            accepted.append(listener.accept()[0])
            accepted[0].sendall(greeting)
            accepted[0].shutdown(socket.SHUT_WR)

        server = threading.Thread(target=answer)
        server.start()
        with pytest.raises(ConnectionError):
            connect(place)
        server.join()
        accepted[0].close()


# -- netlink: a decoder of the test's own, from linux/netlink.h and linux/nbd-netlink.h ------------------------------


def decode(data: bytes) -> dict[int, bytes]:
    found = {}
    while data:
        length, kind = struct.unpack("=HH", data[:4])
        found[kind & 0x7FFF] = data[4:length]
        data = data[(length + 3) // 4 * 4 :]
    return found


class FakeNetlink:
    """The kernel's end: keeps what it is sent, answers what it is told to."""

    def __init__(self, answers: Sequence[bytes]) -> None:
        self.answers = list(answers)
        self.sent: list[tuple[int, int, dict[int, bytes]]] = []

    def send(self, data: bytes) -> None:
        length, family, flags, self.sequence, _ = struct.unpack("=IHHII", data[:16])
        assert (length, flags) == (len(data), 5), "a request that wants an acknowledgement"
        command, version, _ = struct.unpack("=BBH", data[16:20])
        assert version == 1
        self.sent.append((family, command, decode(data[20:])))

    def recv(self, _size: int) -> bytes:
        body = self.answers.pop(0)
        kind, rest = struct.unpack("=H", body[:2])[0], body[2:]
        return struct.pack("=IHHII", 16 + len(rest), kind, 0, self.sequence, 0) + rest

    def close(self) -> None:
        pass


def acknowledged(error: int = 0) -> bytes:
    return struct.pack("=Hi", 2, -error) + bytes(16)


def generic(family: int, body: bytes) -> bytes:
    return struct.pack("=HBBH", family, 1, 1, 0) + body


GROUPS = netlink.attribute(1, netlink.text(1, "nbd_mc_group") + netlink.u32(2, 9))
FAMILY = generic(16, netlink.attribute(1, struct.pack("=H", 33)) + netlink.attribute(7, GROUPS))


def kernel(monkeypatch: pytest.MonkeyPatch, *answers: bytes) -> tuple[Kernel, FakeNetlink]:
    fake = FakeNetlink([FAMILY, acknowledged(), *answers])
    monkeypatch.setattr(netlink, "_netlink", lambda: fake)
    return Kernel(), fake


def test_a_device_is_connected_as_the_kernel_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, fake = kernel(monkeypatch, generic(33, netlink.u32(1, 5)), acknowledged())
    assert driver.group == 9
    index = driver.connect(
        None, [11, 12], Export(1 << 40, 0x16D, ""), "a:1", block_bytes=4096, timeout_seconds=7, dead_seconds=70
    )
    assert index == 5
    family, number, sent = fake.sent[-1]
    assert (family, number) == (33, 1)
    assert sent.pop(10) == b"a:1\0"
    items = sent.pop(7)
    wide = {kind: struct.unpack("=Q", value)[0] for kind, value in sent.items()}
    assert wide == {2: 1 << 40, 3: 4096, 4: 7, 5: 0x16D, 8: 70}
    assert items == b"".join(struct.pack("=HHHHI", 12, 0x8001, 8, 1, descriptor) for descriptor in (11, 12))


def test_other_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    item = netlink.attribute(1, netlink.u32(1, 3) + netlink.attribute(2, b"\1"))
    status = generic(33, netlink.attribute(9, item))
    driver, fake = kernel(
        monkeypatch, acknowledged(), acknowledged(), status, acknowledged(), acknowledged(2), acknowledged(22)
    )
    driver.reconfigure(3, [8], 1 << 33, "id")
    family, number, sent = fake.sent[-1]
    assert (family, number, sent[1], sent[2], sent[10]) == (
        33,
        3,
        struct.pack("=I", 3),
        struct.pack("=Q", 1 << 33),
        b"id\0",
    )
    driver.disconnect(3)
    assert fake.sent[-1] == (33, 2, {1: struct.pack("=I", 3)})
    assert driver.connected(3)
    assert fake.sent[-1][1] == 5
    assert not driver.connected(4), "no such device"
    with pytest.raises(OSError, match="Invalid argument"):
        driver.disconnect(3)


@given(st.binary(max_size=200))
def test_bytes_that_mean_nothing_are_values_or_a_valueerror(data: bytes) -> None:
    for decoder in (attributes, unpack_messages):
        try:
            list(decoder(data))  # type: ignore[operator]
        except (ValueError, struct.error):
            pass


def dead_link(index: int) -> bytes:
    body = struct.pack("=BBH", 4, 1, 0) + netlink.u32(1, index)
    return struct.pack("=IHHII", 16 + len(body), 33, 0, 0, 0) + body


def test_dead_links_are_counted_one_by_one() -> None:
    ours, kernels = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, kernels:
        ours.setblocking(False)
        assert read_dead_links(ours) == []
        for index in (3, 3, 0):
            kernels.send(dead_link(index))
        assert read_dead_links(ours) == [3, 3, 0]


# -- the agent ---------------------------------------------------------------------------------------------------------


class FakeKernel:
    """A driver with one device."""

    group = 0

    def __init__(self) -> None:
        self.here = True
        self.looks = 0
        self.calls: list[tuple[Any, ...]] = []

    def connected(self, index: int) -> bool:
        assert index == 3
        self.looks += 1
        return self.here

    def reconfigure(self, index: int, descriptors: Sequence[int], size_bytes: int, identifier: str) -> None:
        self.calls.append((len(descriptors), size_bytes, identifier))

    def disconnect(self, index: int) -> None:
        self.here = False


class World:
    """An agent with all that it talks to."""

    def __init__(self, places: Sequence[Place], monkeypatch: pytest.MonkeyPatch, dead_seconds: float) -> None:
        mine, self.links = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        mine.setblocking(False)
        monkeypatch.setattr(agent_module, "dead_links", lambda group: mine)
        monkeypatch.setattr(agent_module, "LOOK_SECONDS", 0.01)
        monkeypatch.setattr(agent_module, "RETRY_SECONDS", (0.01, 0.02))
        monkeypatch.setattr(agent_module, "REFRESH_SECONDS", 0.0)
        self.stop, self.stopped = socket.socketpair()
        self.kernel = FakeKernel()
        self.said: list[str] = []
        kernel: Any = self.kernel
        self.agent = Agent(kernel, places, dead_seconds=dead_seconds, say=self.said.append)
        self.agent.take(3, Export(MIB, 0, KnownSource.identity), "backend", connections=2)

    def run(self) -> "asyncio.Future[int]":
        return asyncio.get_running_loop().run_in_executor(None, self.agent._run, self.stopped)

    def close(self) -> None:
        self.agent.close()
        for sock in (self.links, self.stop, self.stopped):
            sock.close()


@pytest.fixture
def worlds(monkeypatch: pytest.MonkeyPatch) -> Any:
    made: list[World] = []

    def make(*places: Place, dead_seconds: float = 60.0) -> World:
        made.append(World(places, monkeypatch, dead_seconds))
        return made[-1]

    yield make
    for one in made:
        one.close()


async def test_lost_connections_are_replaced_one_for_one(tmp_path: Path, worlds: Any) -> None:
    async with serving(tmp_path) as (_, _, place):
        world = worlds(Place("disk", path=str(tmp_path / "nowhere")), place)
        running = world.run()
        for index in (3, 7, 3):
            world.links.send(dead_link(index))
        await until(lambda: len(world.kernel.calls) == 2)
        assert world.kernel.calls == [(1, MIB, "backend")] * 2
        await until(lambda: "all connections are there again" in world.said)
        world.stop.send(b"x")
        assert await running == 0
        assert world.kernel.here, "a signal leaves the device alone"


async def test_a_server_that_comes_back_later(tmp_path: Path, worlds: Any) -> None:
    world = worlds(Place("disk", path=str(tmp_path / "nbd.sock")))
    running = world.run()
    world.links.send(dead_link(3))
    await until(lambda: world.said)
    assert not world.kernel.calls
    async with serving(tmp_path):
        await until(lambda: world.kernel.calls)
    world.kernel.here = False
    assert await running == 0


@pytest.mark.parametrize("what", ["identity", "size"])
async def test_another_disk_is_not_gone_on_with(tmp_path: Path, worlds: Any, what: str) -> None:
    async with serving(tmp_path, MIB if what == "identity" else MIB // 2) as (_, source, place):
        if what == "identity":
            source.identity = "store:1:1:2"
        world = worlds(place)
        running = world.run()
        world.links.send(dead_link(3))
        assert await running == GAVE_UP
    assert not world.kernel.here
    assert world.kernel.calls == []
    assert "given up" in world.said[-1]


async def test_without_any_server_it_is_given_up_in_the_end(tmp_path: Path, worlds: Any) -> None:
    world = worlds(Place("disk", path=str(tmp_path / "nowhere")), dead_seconds=0.05)
    running = world.run()
    for _ in range(2):
        world.links.send(dead_link(3))
    assert await running == GAVE_UP
    assert not world.kernel.here


async def test_one_connection_that_is_left_keeps_the_device(tmp_path: Path, worlds: Any) -> None:
    world = worlds(Place("disk", path=str(tmp_path / "nowhere")), dead_seconds=0.0)
    running = world.run()
    world.links.send(dead_link(3))
    await until(lambda: world.said)
    looks = world.kernel.looks
    await until(lambda: world.kernel.looks > looks + 5)
    assert world.kernel.here
    world.kernel.here = False
    assert await running == 0


async def test_a_new_size_is_passed_on(tmp_path: Path, worlds: Any) -> None:
    async with serving(tmp_path, 3 * MIB) as (_, _, place):
        world = worlds(place)
        running = world.run()
        await until(lambda: world.kernel.calls)
        assert world.kernel.calls == [(0, 3 * MIB, "backend")]
        world.kernel.here = False
        assert await running == 0


# -- the commands ------------------------------------------------------------------------------------------------------


def parsed(*words: str) -> Namespace:
    parser = ArgumentParser()
    command.add_attach(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("disk", "/dev/sda"), "no device"),
        (("disk", "--connections", "0"), "0 connections"),
        (("disk", "--connections", "17"), "17 connections"),
        (("disk", "--block-size", "8192"), "block size 8192"),
        (("disk", "--timeout", "0"), "--timeout 0"),
        (("disk", "--dead-timeout", "0"), "--dead-timeout 0"),
        (("nbds://host/disk",), "no TLS"),
    ],
)
async def test_arguments_that_are_refused(
    monkeypatch: pytest.MonkeyPatch, worlds: Any, tmp_path: Path, words: tuple[str, ...], reason: str
) -> None:
    worlds(Place("disk"))  # an agent's socket without netlink
    monkeypatch.setattr(command, "Kernel", FakeKernelWithClose)
    with pytest.raises(AttachError, match=reason) as caught:
        command.attach(parsed(*words))
    assert caught.value.code == 2


class FakeKernelWithClose(FakeKernel):
    """What `attach` opens and closes."""

    def close(self) -> None:
        self.here = False

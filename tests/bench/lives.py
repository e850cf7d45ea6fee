"""The cases about the life of a VDI: snapshots, clones, discarding and deleting large ones, a store of very many."""

import asyncio
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import uvloop

import objstore
from nbdserver.control_client import ControlClient
from objstore import blocking
from tests.bench import fio, probe
from tests.bench.copies import control, settle
from tests.bench.servers import REPOSITORY, ZONES, Server

GIB: Final = 1 << 30
MIB: Final = 1 << 20
TIB: Final = 1 << 40
WRITTEN_BYTES: Final = GIB
SIZES: Final = {"1 GiB": GIB, "1 TiB": TIB}
SCATTER: Final = {"rw": "randwrite", "bs": "4k", "iodepth": "32", "end_fsync": "1"}
"""The map of a disk that was written so is as large as can be: nearly each write has a region of its own."""
WRITE: Final = {"rw": "randwrite", "bs": "4k", "iodepth": "32"}
READ: Final = {"rw": "randread", "bs": "4k", "iodepth": "32"}
FILL: Final = {"rw": "write", "bs": "1m", "iodepth": "8", "end_fsync": "1"}
CHAIN: Final = 32
CHAIN_BLOCKS: Final = 256
"""Blocks that each clone of a chain is given of its own."""
LARGE_BYTES: Final = 2 * TIB
VDI_BYTES: Final = GIB
BLOCK_BYTES: Final = 4096
MAKERS: Final = 16


def _pause_free(server: Server) -> None:
    server.flush()
    settle(server)
    server.rest()


@contextmanager
def _scattered(server: Server, size_bytes: int) -> Iterator[ControlClient]:
    """The server with a VDI of that size in which 1 GiB of single blocks is written, at rest."""
    former, server.size_bytes = server.size_bytes, size_bytes
    try:
        server.wipe()
        server.start()
        fio.run(server, {**SCATTER, "size": str(size_bytes), "io_size": str(WRITTEN_BYTES)})
        _pause_free(server)
        with closing(control(server)) as client:
            yield client
    finally:
        server.stop()
        server.size_bytes = former


@dataclass
class SnapshotResult:
    """Seconds by size of the VDI: a flush, a snapshot and a clone of the VDI right behind a flush; of a first snapshot,
    before which nothing of the map was ever written, by itself. Requests a second before and right after a snapshot."""

    flush: dict[str, list[float]] = field(default_factory=dict)
    snapshot: dict[str, list[float]] = field(default_factory=dict)
    clone: dict[str, list[float]] = field(default_factory=dict)
    before: dict[str, list[float]] = field(default_factory=dict)
    after: dict[str, list[float]] = field(default_factory=dict)


def snapshots(server: Server, rounds: int, seconds: float) -> SnapshotResult:
    """Of a VDI of 1 GiB and of one of 1 TiB, 1 GiB written in either."""
    result = SnapshotResult()
    runtime = {"time_based": "1", "runtime": f"{round(seconds * 1000)}ms"}
    for name, size in SIZES.items():
        lists = [
            kind.setdefault(name, [])
            for kind in (result.flush, result.snapshot, result.clone, result.before, result.after)
        ]
        flush, snapshot, clone, before, after = lists
        with _scattered(server, size) as client:
            load = {**WRITE, **runtime, "size": str(size)}
            for number in range(rounds):
                tag = f"t{number}"
                before.append(fio.run(server, load).requests_per_second)
                server.flush()
                flush.append(_seconds(server.flush))
                snapshot.append(_seconds(lambda tag=tag: _snapshot(client, server, tag)))  # type: ignore[misc]
                after.append(fio.run(server, load).requests_per_second)
                _pause_free(server)
                clone.append(_seconds(lambda: client.clone(server.kind.export, "copy", copies=None, mode=None)))
                client.delete_vdi("copy")
                client.delete_snapshot(f"{server.kind.export}@{tag}")
                _pause_free(server)
    return result


def _snapshot(client: ControlClient, server: Server, tag: str) -> None:
    client.create_snapshot(server.kind.export, tag, skip_unchanged=False, protected=False)


def _seconds(what: Callable[[], object]) -> float:
    began = time.monotonic()
    what()
    return time.monotonic() - began


@dataclass
class ChainResult:
    """Requests a second of each round."""

    flat: list[float] = field(default_factory=list)
    chain: list[float] = field(default_factory=list)


def chain(server: Server, rounds: int, seconds: float) -> ChainResult:
    """Random reads of a VDI, and of the last of 32 clones of one another of which each has written a little."""
    server.wipe()
    server.start()
    size = server.size_bytes
    fio.run(server, {**FILL, "size": str(size)})
    server.flush()
    dice = random.Random(1)
    name = server.kind.export
    with closing(control(server)) as client:
        for number in range(CHAIN):
            made = f"clone-{number}"
            client.clone(name, made, copies=None, mode=None)
            with probe.Probe(server.socket, made, timeout_seconds=120) as disk:
                disk.flush()
                for _ in range(CHAIN_BLOCKS):
                    disk.write(dice.randrange(size // BLOCK_BYTES) * BLOCK_BYTES, dice.randbytes(BLOCK_BYTES))
                disk.flush()
            name = made
    result = ChainResult()
    load = {**READ, "time_based": "1", "runtime": f"{round(seconds * 1000)}ms", "size": str(size)}
    settle(server)
    server.rest()
    deep = {**load, "uri": f"nbd+unix:///{name}?socket={server.socket}"}
    for each in (load, deep):  # what they read is in the page cache from here on
        fio.run(server, {**each, "rw": "read", "bs": "1m"})
    for number in range(rounds):
        for each, values in ((load, result.flat), (deep, result.chain))[:: -1 if number % 2 else 1]:
            values.append(fio.run(server, each).requests_per_second)
    server.stop()
    return result


@dataclass
class DiscardResult:
    """Seconds of each round."""

    discard: list[float] = field(default_factory=list)
    delete: list[float] = field(default_factory=list)


def discard(server: Server, rounds: int) -> DiscardResult:
    """Discard all of a VDI of 2 TiB in which 1 GiB is scattered; scatter it again; delete the VDI."""
    result = DiscardResult()
    scatter = {**SCATTER, "size": str(LARGE_BYTES), "io_size": str(WRITTEN_BYTES)}
    for _ in range(rounds):
        with _scattered(server, LARGE_BYTES) as client:
            with (
                blocking.connect(socket=f"{server.socket}.control") as store,
                store.open(server.kind.export) as vdi,
            ):
                result.discard.append(_seconds(lambda vdi=vdi: _discard(vdi)))  # type: ignore[misc]
            _pause_free(server)
            fio.run(server, scatter)
            server.flush()
            result.delete.append(_seconds(lambda client=client: client.delete_vdi(server.kind.export)))  # type: ignore[misc]
    return result


def _discard(vdi: blocking.BlockingVdi) -> None:
    vdi.discard(0, vdi.size_bytes)
    vdi.flush()


@dataclass
class ManyResult:
    """Of a store of many VDIs. Seconds of each round: from start to first read, `sheepfold vdi list` as a command and
    its answer by the control socket alone, NBD_OPT_LIST, NBD_OPT_INFO of a VDI that nobody has open; bytes of memory in
    the end. opened: VDIs whose log was open then."""

    start: list[float] = field(default_factory=list)
    command: list[float] = field(default_factory=list)
    listing: list[float] = field(default_factory=list)
    exports: list[float] = field(default_factory=list)
    info: list[float] = field(default_factory=list)
    rss_bytes: list[int] = field(default_factory=list)
    opened: int = 0


def many(server: Server, rounds: int, vdis: int, snapshots_each: int) -> ManyResult:
    """1,000 VDIs with 10 snapshots each: starting, listing, memory."""
    server.wipe()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_make_many([server.data / zone for zone in ZONES], server.kind.export, vdis, snapshots_each))
    settle(server)
    result = ManyResult()
    command = [sys.executable, "-m", "nbdserver", "vdi", "list", "--json", "--zone", str(server.data / ZONES[0])]
    for _ in range(rounds):
        result.start.append(server.start())
        result.exports.append(_seconds(lambda: probe.exports(server.socket)))
        result.info.append(_seconds(lambda: probe.info(server.socket, name_of(vdis - 1))))
        result.command.append(
            _seconds(lambda: subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, check=True))
        )
        with closing(control(server)) as client:
            result.listing.append(_seconds(client.vdis))
            result.opened = sum(vdi.state != "closed" for vdi in client.vdis())
        result.rss_bytes.append(server.rss_bytes()[1])
        server.stop()
    return result


def name_of(number: int) -> str:
    """The VDIs of `many`."""
    return f"vdi-{number:04d}"


async def _make_many(zones: list[Path], first: str, vdis: int, snapshots_each: int) -> None:
    data = random.Random(1).randbytes(BLOCK_BYTES)
    async with objstore.connect(zones, create=True) as store:
        await store.create(first, VDI_BYTES)
        left = iter(range(vdis))

        async def make() -> None:
            for number in left:
                name = name_of(number)
                await store.create(name, VDI_BYTES)
                async with store.open(name) as vdi:
                    await vdi.flush()
                    for snapshot in range(snapshots_each):
                        await vdi.write(snapshot * MIB, data)
                        await store.create_snapshot(name, f"s{snapshot}")

        await asyncio.gather(*(make() for _ in range(MAKERS)))

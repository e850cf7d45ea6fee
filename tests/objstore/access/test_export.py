"""Snapshots from one store into another: whole, as differences, cut short, damaged, on the wrong disk."""

import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

import objstore
from objstore import Busy, Connection, Exists, FormatError, InvalidRequest, NotFound, Suspended, blocking
from objstore.check.check import check_store, zones_of
from objstore.volume.base import Extent
from tests.objstore.check.stores import faults

MIB = 1 << 20
B = 4096
SIZE = 6 * MIB


@pytest.fixture
async def source(tmp_path: Path) -> AsyncIterator[Connection]:
    async with objstore.connect([tmp_path / "source"], create=True) as source:
        await source.create("disk", SIZE, mode="writethrough")
        yield source


async def stream_of(store: Connection, since: str, snapshot: str) -> bytes:
    return b"".join([piece async for piece in store.export_diff(since, snapshot)])


def pieces(data: bytes, step: int = 100_000) -> Iterator[bytes]:
    for at in range(0, len(data), step):
        yield data[at : at + step]


async def contents(store: Connection, name: str) -> tuple[bytes, list[Extent]]:
    async with store.open(name, read_only=True) as vdi:
        return await vdi.read(0, vdi.size_bytes), [extent async for extent in vdi.map()]


async def scribble(store: Connection, rng: random.Random, requests: int, *, size: int = SIZE) -> None:
    async with store.open("disk") as vdi:
        for _ in range(requests):
            length = rng.choice((1, 512, B, 9 * B, 100 * B))
            offset = rng.randrange(0, size - length) // 512 * 512
            what = rng.random()
            if what < 0.15:
                await vdi.discard(offset, length)
            elif what < 0.3:
                await vdi.zero(offset, length, no_hole=what < 0.2)
            else:
                await vdi.write(offset, (rng.randbytes(64) * (length // 64 + 1))[:length], writeback=True)


async def refused(store: Connection, name: str = "disk") -> None:
    """Nobody takes what is half imported for whole."""
    assert (await store.info(name)).importing
    with pytest.raises(Suspended, match="half of what is imported"):
        await store.open(name)
    with pytest.raises(Suspended, match="half of what is imported"):
        await store.create_snapshot(name, "t")
    with pytest.raises(Suspended, match="half of what is imported"):
        await store.clone(name, "clone")


async def test_a_chain_of_snapshots(source: Connection, store: Connection) -> None:
    """Random changes, sizes up and down; every snapshot in the copy is the one in the source, holes included."""
    rng = random.Random(1)
    before, sizes = "", (SIZE, SIZE, SIZE + 3 * MIB + 512, SIZE + 3 * MIB + 512, 2 * MIB + 512, SIZE)
    for turn, size in enumerate(sizes):
        now = (await source.info("disk")).size_bytes
        if size != now:
            await source.resize("disk", size, force=True)
            await source.resume("disk")
        await scribble(source, rng, 30, size=size)
        await source.create_snapshot("disk", f"t{turn}")
        made = await store.import_diff(pieces(await stream_of(source, before, f"disk@t{turn}")))
        before = f"disk@t{turn}"
        assert (made.name, made.size_bytes) == (before, size)
        assert (await store.info("disk")).importing == ""
        assert await contents(store, "disk") == await contents(source, before)
    for turn in range(len(sizes)):
        assert await contents(store, f"disk@t{turn}") == await contents(source, f"disk@t{turn}")
    copy = await store.info("disk")
    assert (copy.mode, copy.size_bytes, copy.suspended) == ("writethrough", SIZE, "")
    # Steps may be left out, and what was imported can be exported again: it is the same.
    whole = await stream_of(store, "disk@t1", "disk@t5")
    await source.create("other", MIB)
    with pytest.raises(InvalidRequest, match="has no snapshot with the contents"):
        await source.import_diff(pieces(whole), "other")


async def test_back_to_where_it_came_from(source: Connection, store: Connection) -> None:
    """A copy is changed elsewhere and comes back: the store that it came from knows the base by its identity."""
    rng = random.Random(2)
    await scribble(source, rng, 20)
    await source.create_snapshot("disk", "a")
    await store.import_diff(pieces(await stream_of(source, "", "disk@a")))
    await scribble(store, rng, 20)
    await store.create_snapshot("disk", "b")
    await source.import_diff(pieces(await stream_of(store, "disk@a", "disk@b")), tag="back", protected=True)
    assert await contents(source, "disk") == await contents(store, "disk@b")
    (back,) = [snapshot async for snapshot in source.snapshots("disk") if snapshot.tag == "back"]
    assert back.protected


async def test_where_it_does_not_belong(source: Connection, store: Connection) -> None:
    rng = random.Random(3)
    for tag in "abc":
        await scribble(source, rng, 10)
        await source.create_snapshot("disk", tag)
    first = await stream_of(source, "", "disk@a")
    second, third = await stream_of(source, "disk@a", "disk@b"), await stream_of(source, "disk@b", "disk@c")
    with pytest.raises(NotFound):
        await store.import_diff(pieces(second))
    await store.import_diff(pieces(first))
    with pytest.raises(Exists, match="there is a VDI 'disk' already"):
        await store.import_diff(pieces(first))
    with pytest.raises(InvalidRequest, match="has no snapshot with the contents"):
        await store.import_diff(pieces(third))
    async with store.open("disk") as vdi:
        with pytest.raises(Busy, match="attached"):
            await store.import_diff(pieces(second))
        await vdi.write(0, b"local change")
    with pytest.raises(InvalidRequest, match="has changed since disk@a"):
        await store.import_diff(pieces(second))
    await store.rollback("disk@a")
    with pytest.raises(Exists, match="there is a snapshot disk@a already"):
        await store.import_diff(pieces(second), tag="a")
    await refused(store)
    assert (await store.import_diff(pieces(second), tag="z")).name == "disk@z"
    assert await contents(store, "disk") == await contents(source, "disk@b")
    with pytest.raises(Exists, match="already, as a snapshot"):
        await store.import_diff(pieces(second))
    with pytest.raises(InvalidRequest, match="no snapshot, and only what stays"):
        await stream_of(source, "disk@a", "disk")
    await store.import_diff(pieces(first), "another")
    assert await contents(store, "another") == await contents(source, "disk@a")


async def test_what_is_cut_short_or_damaged_is_never_taken_for_whole(source: Connection, store: Connection) -> None:
    rng = random.Random(4)
    await scribble(source, rng, 10)
    await source.create_snapshot("disk", "a")
    await scribble(source, rng, 10)
    await source.create_snapshot("disk", "b")
    whole, more = await stream_of(source, "", "disk@a"), await stream_of(source, "disk@a", "disk@b")
    for data, other in ((whole, more), (more, whole)):
        for end in (len(data) - 1, len(data) - 32, len(data) // 2, len(data) // 3):
            with pytest.raises(FormatError, match="before its end"):
                await store.import_diff(pieces(data[:end]))
            await refused(store)
        damaged = bytearray(data)
        damaged[len(data) * 2 // 3] ^= 1
        with pytest.raises(FormatError, match="damaged"):
            await store.import_diff(pieces(bytes(damaged)))
        await refused(store)
        with pytest.raises((Busy, InvalidRequest, NotFound)):
            await store.import_diff(pieces(other))
        made = await store.import_diff(pieces(data))
        assert await contents(store, "disk") == await contents(source, made.name)
        assert await contents(store, made.name) == await contents(source, made.name)
    for data in (b"", b"no stream at all" * 1000, whole[:10], whole[:40]):
        with pytest.raises(FormatError):
            await store.import_diff(pieces(data), "never")
    with pytest.raises(NotFound):
        await store.info("never")


async def test_what_was_begun_is_given_up(source: Connection, store: Connection) -> None:
    rng = random.Random(5)
    await scribble(source, rng, 10)
    await source.create_snapshot("disk", "a")
    await scribble(source, rng, 10)
    await source.create_snapshot("disk", "b")
    whole, more = await stream_of(source, "", "disk@a"), await stream_of(source, "disk@a", "disk@b")
    with pytest.raises(FormatError):
        await store.import_diff(pieces(whole[:-1]))
    await store.delete("disk")
    await store.import_diff(pieces(whole))
    with pytest.raises(FormatError):
        await store.import_diff(pieces(more[:-1]))
    undo = await store.rollback("disk@a")
    assert undo.tag.startswith("unfinished-import-")
    assert await contents(store, "disk") == await contents(source, "disk@a")
    await store.import_diff(pieces(more))
    assert await contents(store, "disk") == await contents(source, "disk@b")


async def test_after_a_restart_in_the_middle(source: Connection, tmp_path: Path) -> None:
    """Half imported stays half imported; and the independent reader finds nothing wrong with the store."""
    rng = random.Random(6)
    await scribble(source, rng, 10)
    await source.create_snapshot("disk", "a")
    whole = await stream_of(source, "", "disk@a")
    zones = [tmp_path / "x", tmp_path / "y"]
    async with objstore.connect(zones, create=True) as store:
        with pytest.raises(FormatError):
            await store.import_diff(pieces(whole[: len(whole) // 2]))
    assert not faults(check_store(zones_of(zones)))
    async with objstore.connect(zones) as store:
        await refused(store)
        await store.import_diff(pieces(whole))
    assert not faults(check_store(zones_of(zones)))
    async with objstore.connect(zones) as store:
        assert await contents(store, "disk") == await contents(source, "disk@a")
        (found,) = [snapshot async for snapshot in store.snapshots("disk")]
        (original,) = [snapshot async for snapshot in source.snapshots("disk")]
        assert found.identity == original.identity


async def test_only_what_has_changed_is_sent(source: Connection) -> None:
    async with source.open("disk") as vdi:
        await vdi.write(0, random.Random(7).randbytes(4 * MIB))
    await source.create_snapshot("disk", "a")
    async with source.open("disk") as vdi:
        await vdi.write(MIB, b"x" * B)
        await vdi.discard(2 * MIB, MIB)
    await source.create_snapshot("disk", "b")
    assert len(await stream_of(source, "", "disk@a")) > 4 * MIB
    assert len(await stream_of(source, "disk@a", "disk@b")) < B + 1000


def test_blocking(tmp_path: Path) -> None:
    with blocking.connect([tmp_path / "a"], create=True) as one, blocking.connect([tmp_path / "b"], create=True) as two:
        one.create("disk", MIB)
        with one.open("disk") as vdi:
            vdi.write(100, b"data")
        one.create_snapshot("disk", "s")
        assert two.import_diff(one.export_diff("", "disk@s"), "copy").name == "copy@s"
        with two.open("copy") as vdi:
            assert vdi.read(98, 8) == b"\0\0data\0\0"

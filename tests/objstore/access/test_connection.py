"""Connections: what they say of a store, and how they begin and end."""

import asyncio
import os
from pathlib import Path

import pytest

import objstore
from objstore import Busy, Connection, Exists, InvalidRequest, NotFound

MIB = 1 << 20


async def names(store: Connection) -> list[str]:
    return [vdi.name async for vdi in store.vdis()]


async def test_the_life_of_a_vdi(store: Connection) -> None:
    assert await names(store) == []
    made = await store.create("b é", MIB, copies=1, mode="unsafe")
    assert (made.name, made.size_bytes, made.copies, made.mode) == ("b é", MIB, 1, "unsafe")
    await store.create("a", 2 * MIB, prealloc=True)
    assert await names(store) == ["a", "b é"]
    assert (await store.info("b é")).vdi_id == made.vdi_id
    with pytest.raises(Exists, match="'a' already"):
        await store.create("a", MIB)
    with pytest.raises(InvalidRequest, match="impossible"):
        await store.create("c", 0)
    assert (await store.set_copies("b é", 2)).copies == 2
    assert (await store.damage("a")).ranges == []
    async with store.open("a") as vdi:
        assert (await store.info("a")).attached == 1
        with pytest.raises(Busy, match="'a' is attached"):
            await store.delete("a")
        assert [extent.zero for extent in [one async for one in vdi.map()]] == [True]
    await store.delete("a")
    with pytest.raises(NotFound, match="'a'"):
        await store.info("a")
    assert await names(store) == ["b é"]


async def test_the_store(store: Connection) -> None:
    status = await store.status()
    assert (status.health, status.vdis) == ("ok", 0)
    zones = await store.zones()
    assert [zone.number for zone in zones] == [0, 1]
    assert (await store.change_zones("set-weight", "1", weight=3.0))[1].weight == 3.0
    with pytest.raises(InvalidRequest):
        await store.change_zones("paint", "1")
    assert not (await store.recovery()).problems
    assert (await store.set_recovery_rate(8 * MIB)).bytes_per_second_max == 8 * MIB
    assert (await store.start_scrub()).copies_bad == 0
    while (await store.scrub()).running:  # noqa: ASYNC110 - a server is asked as well
        await asyncio.sleep(0.01)
    assert (await store.scrub()).finished is not None


async def test_a_store_keeps_what_it_was_given(zones: list[Path]) -> None:
    async with objstore.connect(zones, create=True) as store:
        await store.create("disk", MIB)
        async with store.open("disk") as vdi:
            await vdi.write(5, b"kept", writeback=True)
    async with objstore.connect(zones[:1]) as store, store.open("disk") as vdi:
        assert await vdi.read(4, 6) == b"\0kept\0"
    async with objstore.connect(zones, read_only=True) as store:
        assert await names(store) == ["disk"]
        with pytest.raises(objstore.ReadOnly):
            await store.open("disk")


async def test_closing_a_connection_closes_its_handles(zones: list[Path]) -> None:
    store = await objstore.connect(zones, create=True)
    await store.create("disk", MIB)
    vdi = await store.open("disk")
    await store.close()
    await store.close()
    assert vdi.closed
    with pytest.raises(InvalidRequest, match="closed"):
        await vdi.write(0, b"stale")
    with pytest.raises(objstore.Stopping):
        await store.open("disk")


async def test_zones_that_are_in_use(zones: list[Path]) -> None:
    async with objstore.connect(zones, create=True):
        with pytest.raises(Busy, match=f'"pid":{os.getpid()}'):
            await objstore.connect(zones)
        with pytest.raises(InvalidRequest, match=f"process {os.getpid()}, which has no control socket"):
            objstore.control_socket(zones[0])
    assert objstore.control_socket(zones[0]) is None


async def test_what_connect_refuses(zones: list[Path]) -> None:
    with pytest.raises(InvalidRequest, match="connect to what"):
        await objstore.connect()
    with pytest.raises(InvalidRequest, match="give a socket alone"):
        await objstore.connect(zones, socket="/x")
    with pytest.raises(objstore.Unavailable, match="zones are missing"):
        await objstore.connect(zones)
    zones[0].mkdir()
    with pytest.raises(NotFound, match="no zone of a store"):
        await objstore.connect(zones[:1])


def test_every_public_name_is_there() -> None:
    for name in objstore.__all__:
        assert getattr(objstore, name) is not None
    with pytest.raises(AttributeError, match="'nothing'"):
        objstore.nothing  # noqa: B018

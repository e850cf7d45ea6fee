"""Attributes of VDIs, in this process and behind a server."""

import asyncio
from pathlib import Path

import pytest

import objstore
from objstore import Connection, Exists, InvalidRequest, NoSpace, NotFound

MIB = 1 << 20


async def names(store: Connection) -> list[str]:
    return [key async for key in store.attributes("disk")]


@pytest.fixture
async def disk(store: Connection) -> Connection:
    await store.create("disk", MIB)
    return store


async def test_scenario_45_values_are_exact_and_then_missing(disk: Connection) -> None:
    store = disk
    values = {"a": b"", "b/c %2F é": bytes(range(256)), "long": b"\0" * (64 << 10), "z" * 256: b"x"}
    for key, value in values.items():
        await store.set_attribute("disk", key, value)
    assert await names(store) == sorted(values)
    for key, value in values.items():
        assert await store.get_attribute("disk", key) == value
    await store.set_attribute("disk", "a", b"replaced")
    assert await store.get_attribute("disk", "a") == b"replaced"
    await store.delete_attribute("disk", "a")
    for work in (store.get_attribute("disk", "a"), store.delete_attribute("disk", "a")):
        with pytest.raises(NotFound, match="VDI 'disk' has no attribute 'a'"):
            await work
    for work in (store.get_attribute("no", "a"), store.set_attribute("no", "a", b"x")):
        with pytest.raises(NotFound, match="no VDI 'no'"):
            await work


async def test_scenario_44_exactly_one_of_many_wins(disk: Connection) -> None:
    tries = [disk.set_attribute("disk", "lock", b"%d" % n, exclusive=True) for n in range(20)]
    results = await asyncio.gather(*tries, return_exceptions=True)
    (winner,) = (n for n, result in enumerate(results) if result is None)
    assert sum(isinstance(result, Exists) for result in results) == 19
    assert await disk.get_attribute("disk", "lock") == b"%d" % winner
    await disk.delete_attribute("disk", "lock")
    await disk.set_attribute("disk", "lock", b"again", exclusive=True)


async def test_they_are_gone_with_the_vdi(disk: Connection) -> None:
    await disk.set_attribute("disk", "a", b"x")
    await disk.delete("disk")
    await disk.create("disk", MIB)
    assert await names(disk) == []


async def test_limits(disk: Connection) -> None:
    for key in ("", "x" * 257, "é" * 129, "line\nbreak", "nul\0"):
        with pytest.raises(InvalidRequest, match="attribute name"):
            await disk.set_attribute("disk", key, b"")
    with pytest.raises(InvalidRequest, match="at most 65536"):
        await disk.set_attribute("disk", "a", bytes((64 << 10) + 1))
    for n in range(15):
        await disk.set_attribute("disk", f"{n}", bytes(64 << 10))
    with pytest.raises(NoSpace, match="more than 1048576 bytes"):
        await disk.set_attribute("disk", "15", bytes(64 << 10))
    await disk.set_attribute("disk", "14", b"")
    await disk.set_attribute("disk", "15", bytes(64 << 10))


async def test_they_outlive_restarts(zones: list[Path]) -> None:
    """In the catalog's log, and in the snapshot that the next start makes of it."""
    async with objstore.connect(zones, create=True) as store:
        await store.create("disk", MIB)
        await store.set_attribute("disk", "kept", b"\0\xff")
        await store.set_attribute("disk", "gone", b"x")
        await store.delete_attribute("disk", "gone")
    for _ in range(2):
        async with objstore.connect(zones) as store:
            assert await names(store) == ["kept"]
            assert await store.get_attribute("disk", "kept") == b"\0\xff"

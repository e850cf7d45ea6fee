"""Copies of sealed segments: what is found wrong, what can be put together again, what is lost."""

import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from crc32c import crc32c

from objstore.backend.directory import DirectoryBackend
from objstore.errors import Corrupt, NoSpace
from objstore.log.copies import heal, load_copy, look_through
from objstore.log.crcs import page_crcs
from objstore.log.segment import Segment
from objstore.log.tail import look_at
from objstore.units import BLOCK_BYTES
from tests.conftest import ExpectedWarnings
from tests.support.disks import ModelDisk
from tests.support.stepping import World, failing

ZONES = (0, 1, 2)


@pytest.fixture
async def disk() -> AsyncIterator[ModelDisk]:
    world = World(3)
    await world.open(create=True)
    disk = await ModelDisk(world).create(copies=3)
    for _ in range(20):
        await disk.churn(3, blocks_max=8)
        disk.vdi.disk.writer.cut()
    disk.vdi.disk.writer.finish_segment()
    await disk.vdi.flush()
    await disk.vdi.disk.writer.sealed_below(disk.vdi.disk.writer.next_number)
    yield disk
    await world.kill()


def pick(disk: ModelDisk) -> Segment:
    """A sealed segment with several records."""
    return max(disk.vdi.disk.segments.values(), key=lambda segment: segment.live)


def files(disk: ModelDisk, segment: Segment) -> list[bytes]:
    return [bytes(disk.world.storages[zone].objects[segment.name]) for zone in ZONES]


async def test_the_crc_of_a_header_page_follows_from_the_one_in_it(disk: ModelDisk) -> None:
    backend = disk.world.backends[0]
    segment = pick(disk)
    directory = look_at(backend, disk.vdi.disk.env.store_id, segment.log, segment.number).directory
    assert directory is not None
    data = backend.get(segment.name)
    crcs = page_crcs(directory)
    assert len(directory.record_blocks) > 1
    for block in range(1, len(crcs)):
        assert crcs[block] == crc32c(data[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES])


async def test_whole_copies_are_left_alone(disk: ModelDisk) -> None:
    env = disk.vdi.disk.env
    for segment in disk.vdi.disk.segments.values():
        before = files(disk, segment)
        healed = await heal(env, segment, ZONES)
        assert (healed.bad, healed.repaired, healed.lost) == ({}, (), ())
        assert healed.read_bytes == 3 * segment.file_bytes
        assert files(disk, segment) == before
        assert not segment.pins


async def test_any_bit_of_a_copy_is_found_and_put_right(disk: ModelDisk) -> None:
    """Wherever it is: header, record header, data, directory, footer."""
    env, segment = disk.vdi.disk.env, pick(disk)
    whole = files(disk, segment)[0]
    directory = look_at(disk.world.backends[0], env.store_id, segment.log, segment.number).directory
    assert directory is not None
    body = len(directory.crcs) * BLOCK_BYTES
    table = len(whole) - 128 - 200
    dice = random.Random(3)
    for offset in (0, 20, BLOCK_BYTES, BLOCK_BYTES + 4000, body - 1, table, -128, -1, *dice.sample(range(body), 40)):
        zone = dice.choice(ZONES)
        disk.world.damage(segment.name, offset, zones=[zone])
        healed = await heal(env, segment, ZONES)
        assert (set(healed.bad), healed.repaired, healed.lost) == ({zone}, (zone,), ()), offset
        assert [data[:body] for data in files(disk, segment)] == [whole[:body]] * 3
        assert not (await heal(env, segment, ZONES)).bad
    await disk.check()


async def test_looking_alone_changes_nothing(disk: ModelDisk) -> None:
    segment = pick(disk)
    disk.world.damage(segment.name, 5000, zones=[1])
    before = files(disk, segment)
    healed = await heal(disk.vdi.disk.env, segment, ZONES, repair=False)
    assert (healed.bad, healed.repaired) == ({1: "1 blocks are damaged"}, ())
    assert files(disk, segment) == before


@pytest.mark.parametrize("what", ["missing", "cut", "empty", "another segment"])
async def test_a_copy_that_is_no_copy_is_replaced(disk: ModelDisk, what: str) -> None:
    env, segment = disk.vdi.disk.env, pick(disk)
    before = files(disk, segment)
    objects = disk.world.storages[2].objects
    if what == "missing":
        del objects[segment.name]
    elif what == "cut":
        del objects[segment.name][-BLOCK_BYTES:]
    elif what == "empty":
        objects[segment.name].clear()
    else:
        other = next(s for s in disk.vdi.disk.segments.values() if s.blocks == segment.blocks and s is not segment)
        objects[segment.name] = bytearray(objects[other.name])
    healed = await heal(env, segment, ZONES)
    assert (set(healed.bad), healed.repaired) == ({2}, (2,))
    assert files(disk, segment) == before


async def test_damage_in_different_places_of_all_copies_is_no_loss(disk: ModelDisk) -> None:
    env, segment = disk.vdi.disk.env, pick(disk)
    before = files(disk, segment)
    for zone in ZONES:
        for block in range(1 + zone, 16, 3):
            disk.world.damage(segment.name, block * BLOCK_BYTES + 8, zones=[zone])
    disk.world.damage(segment.name, 100, zones=[0])
    disk.world.damage(segment.name, -1, zones=[1])
    healed = await heal(env, segment, ZONES)
    assert (set(healed.bad), healed.repaired, healed.lost) == (set(ZONES), ZONES, ())
    assert files(disk, segment) == before


async def test_a_directory_that_no_zone_has_is_made_again(disk: ModelDisk) -> None:
    env, segment = disk.vdi.disk.env, pick(disk)
    before = files(disk, segment)
    disk.world.damage(segment.name, -100)
    disk.world.damage(segment.name, 2 * BLOCK_BYTES, zones=[0, 2])
    disk.world.damage(segment.name, BLOCK_BYTES + 16, zones=[1])
    healed = await heal(env, segment, ZONES)
    assert (set(healed.bad), set(healed.repaired), healed.lost) == (set(ZONES), set(ZONES), ())
    assert healed.directory is not None
    assert healed.directory.crc == segment.seal_crc
    assert files(disk, segment) == before


async def test_without_directory_and_record_headers_nothing_can_be_read(disk: ModelDisk) -> None:
    env, segment = disk.vdi.disk.env, pick(disk)
    disk.world.damage(segment.name, -1)
    disk.world.damage(segment.name, BLOCK_BYTES)
    healed = await heal(env, segment, ZONES)
    assert (set(healed.bad), healed.repaired, healed.lost, healed.directory) == (set(ZONES), (), None, None)


async def test_blocks_that_no_zone_has_are_named_and_nothing_is_written(disk: ModelDisk) -> None:
    env, segment = disk.vdi.disk.env, pick(disk)
    for block in (3, 7):
        disk.world.damage(segment.name, block * BLOCK_BYTES + 9)
    disk.world.damage(segment.name, 5 * BLOCK_BYTES, zones=[0])
    before = files(disk, segment)
    healed = await heal(env, segment, ZONES)
    assert (set(healed.bad), healed.repaired, healed.lost) == (set(ZONES), (), (3, 7))
    assert files(disk, segment) == before
    with pytest.raises(Corrupt, match="no zone has all"):
        await load_copy(env, segment, ZONES)


async def test_places_that_the_medium_cannot_read_cost_their_blocks_only(disk: ModelDisk) -> None:
    env, segment = disk.vdi.disk.env, pick(disk)
    before = files(disk, segment)
    for zone in ZONES:
        disk.world.backends[zone].unreadable = {(segment.name, (2 + zone) * BLOCK_BYTES)}
    healed = await heal(env, segment, ZONES)
    assert (set(healed.bad), healed.repaired, healed.lost) == (set(ZONES), ZONES, ())
    assert files(disk, segment) == before


async def test_a_zone_that_does_not_take_the_copy_keeps_what_it_had(
    disk: ModelDisk, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings.allow("a copy could not be written|is put out|is out of service")
    env, segment = disk.vdi.disk.env, pick(disk)
    disk.world.damage(segment.name, 5000, zones=[1])
    before = files(disk, segment)
    disk.world.backends[1].fault = failing("put", segment.name)
    healed = await heal(env, segment, ZONES)
    assert (set(healed.bad), healed.repaired) == ({1}, ())
    assert files(disk, segment) == before


async def test_readers_go_over_to_the_new_file(disk: ModelDisk, expected_warnings: ExpectedWarnings) -> None:
    expected_warnings.allow("checksum wrong")
    await disk.check()  # opens readers
    segment = pick(disk)
    for zone in ZONES:
        disk.world.damage(segment.name, 2 * BLOCK_BYTES + 1, zones=[zone])
        await disk.check()
        segment.pins += 1
        await heal(disk.vdi.disk.env, segment, ZONES)
        segment.unpin()
        assert not segment.replaced
    seen = disk.vdi.disk.env.bad_copies
    await disk.check()
    assert disk.vdi.disk.env.bad_copies == seen


async def test_load_copy_takes_the_first_whole_one(disk: ModelDisk) -> None:
    env, segment = disk.vdi.disk.env, pick(disk)
    whole = files(disk, segment)[0]
    disk.world.damage(segment.name, 5000, zones=[0])
    assert await load_copy(env, segment, ZONES) == whole
    assert await load_copy(env, segment, (2,)) == whole
    disk.world.damage(segment.name, 9000, zones=[1])
    assert await load_copy(env, segment, (0, 1)) == whole


async def test_reading_goes_around_the_cache(disk: ModelDisk, tmp_path: Path) -> None:
    """On a directory a copy is looked through as it is on the medium, in its real size."""
    env, segment = disk.vdi.disk.env, pick(disk)
    backend = DirectoryBackend(str(tmp_path))
    data = files(disk, segment)[0]
    backend.put(segment.name, data)
    look = (backend, env.store_id, segment.log, segment.number, segment.seal_crc)
    assert look_through(*look, len(data)).problem == ""
    assert look_through(*look, len(data) + BLOCK_BYTES).problem.startswith("its file has")
    image = memoryview(bytearray(len(data)))
    assert look_through(*look, len(data), image).problem == ""
    assert image == data
    backend.put(segment.name, data[:6000] + b"\xff" + data[6001:])
    assert look_through(*look, len(data)).bad == (1,)
    backend.close()


async def test_a_full_zone_takes_no_copy(disk: ModelDisk, expected_warnings: ExpectedWarnings) -> None:
    expected_warnings.allow("a copy could not be written")
    segment = pick(disk)

    def full(call: str, name: str) -> None:
        if call == "put":
            raise NoSpace("full")

    del disk.world.storages[0].objects[segment.name]
    disk.world.backends[0].fault = full
    healed = await heal(disk.vdi.disk.env, segment, ZONES)
    assert (set(healed.bad), healed.repaired) == ({0}, ())

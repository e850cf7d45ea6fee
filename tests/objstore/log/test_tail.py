"""The end of a log: which records count, when an end is damage, and what the copy of the end keeps."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from crc32c import crc32c

from objstore.backend.base import Backend
from objstore.errors import Corrupt
from objstore.format.record import Flag, Kind
from objstore.log import opening
from objstore.log.env import Env
from objstore.log.opening import LOOKS_AT_ONCE, SETTLED_SEGMENTS, Base, Head, Row, Tail, copy_rest, read_tail
from objstore.log.segment import log_folder, segment_name
from objstore.log.tail import durable_claim, look_at, records_from, seal_of
from objstore.log.writer import LogWriter
from objstore.units import BLOCK_BYTES
from tests.support.logs import LOG, operations_of, pattern, put, records_in, writer_on
from tests.support.stepping import STORE_ID, backend_of, executor_of, make_env, turns

HEAD = Head(1, (), 0, 0, False)
BASE = Base(0, 0, 0)


@asynccontextmanager
async def killed(env: Env) -> AsyncIterator[LogWriter]:
    """A writer whose process ends with the block: the zones keep what they have got."""
    kept: list[dict[str, bytearray]] = []
    async with writer_on(env) as writer:
        yield writer
        kept += [{n: bytearray(d) for n, d in backend_of(env, z.index).storage.objects.items()} for z in env.zones]
    for zone, objects in enumerate(kept):
        backend_of(env, zone).storage.objects = objects


async def three_records(env: Env) -> None:
    """Records of positions 1, 2, 3 in blocks 1, 3 and 5 of segment 0, all durable."""
    async with killed(env) as writer:
        for lba in range(3):
            await put(writer, lba)
            await writer.flush()


def image(env: Env, zone: int, number: int = 0) -> bytearray:
    return backend_of(env, zone).storage.objects[segment_name(LOG, number)]


def row(env: Env, number: int) -> Row:
    """How a head names a segment of all zones."""
    directory = look_at(backend_of(env, 0), STORE_ID, LOG, number).directory
    return Row(number, directory.crc if directory is not None else 0, tuple(zone.index for zone in env.zones))


def positions(tail: Tail) -> list[int]:
    return [record.header.position for record in tail.rest]


async def test_an_empty_log() -> None:
    tail = await read_tail(make_env(2), LOG, HEAD, BASE)
    assert (tail.sealed, tail.rest, tail.shown, tail.next_number) == ([], [], {}, 0)


async def test_records_are_taken_from_whichever_zone_has_them_whole() -> None:
    env = make_env(3)
    await three_records(env)
    image(env, 0)[1 * BLOCK_BYTES + 50] ^= 1
    image(env, 1)[4 * BLOCK_BYTES + 50] ^= 1
    del image(env, 2)[5 * BLOCK_BYTES :]
    assert positions(await read_tail(env, LOG, HEAD, BASE)) == [1, 2, 3]


@pytest.mark.parametrize("block", [5, 6])
async def test_the_last_record_may_be_torn(block: int) -> None:
    """Nothing behind it says that it was durable: a legal end."""
    env = make_env(2)
    await three_records(env)
    for zone in (0, 1):
        image(env, zone)[block * BLOCK_BYTES + 50] ^= 1
    assert positions(await read_tail(env, LOG, HEAD, BASE)) == [1, 2]


@pytest.mark.parametrize("block", [1, 2, 3, 4])
async def test_a_hole_in_what_was_durable_is_damage(block: int) -> None:
    env = make_env(2)
    async with killed(env) as writer:
        for lba in range(4):
            await put(writer, lba)
            await writer.flush()
    for zone in (0, 1):
        image(env, zone)[block * BLOCK_BYTES + 50] ^= 1
    with pytest.raises(Corrupt, match="ends before what was durable"):
        await read_tail(env, LOG, HEAD, BASE)


async def test_a_hole_before_anything_was_durable_is_the_end() -> None:
    """Records reach the disk in any order before a sync."""
    env = make_env(2)
    async with killed(env) as writer:
        for lba in range(4):
            await put(writer, lba)
            writer.cut()
        await turns()
    for zone in (0, 1):
        image(env, zone)[3 * BLOCK_BYTES + 50] ^= 1
    assert positions(await read_tail(env, LOG, HEAD, BASE)) == [1]


async def test_a_missing_segment_in_what_was_durable_is_damage() -> None:
    env = make_env(2)
    async with killed(env) as writer:
        for lba in range(30):
            await put(writer, lba, 20)
        await writer.flush()
    for zone in (0, 1):
        del backend_of(env, zone).storage.objects[segment_name(LOG, 3)]
    with pytest.raises(Corrupt, match="ends before what was durable"):
        await read_tail(env, LOG, HEAD, BASE)


async def test_segments_that_the_head_names_must_be_there() -> None:
    env = make_env(2)
    await three_records(env)
    with pytest.raises(Corrupt, match=r"segments that the head names are missing .*segments=\[7\]"):
        await read_tail(env, LOG, HEAD._replace(tail=(row(env, 0), Row(7, 1, (0, 1))), first_number=8), BASE)


async def test_a_record_that_has_the_right_place_and_the_wrong_past() -> None:
    """A leftover of another branch of the log, valid in itself, ends the chain."""
    env = make_env(1)
    await three_records(env)
    stored = bytes(image(env, 0))
    arguments = {"store_id": STORE_ID, "log": LOG, "number": 0}
    whole = list(records_from([stored], block=1, position=0, previous_crc=0, generation=1, **arguments))
    assert len(whole) == 3
    for wrong in ({"previous_crc": 1}, {"position": 1}, {"generation": 2}, {"block": 3}):
        start = {"block": 1, "position": 0, "previous_crc": 0, "generation": 1, **wrong}
        assert not list(records_from([stored], **start, **arguments))
    assert durable_claim([stored], generation=1, **arguments) == 2
    assert durable_claim([stored], generation=2, **arguments) == 0


async def test_segments_of_a_writer_that_was_never_committed_are_no_part_of_the_log() -> None:
    env = make_env(2)
    await three_records(env)
    tail = await read_tail(env, LOG, HEAD._replace(generation=2), BASE)
    assert not tail.rest
    assert tail.shown[0] == tail.empty[0] == (0, 1)
    tail = await read_tail(env, LOG, HEAD._replace(generation=2, tail=(row(env, 0),), first_number=1), BASE)
    assert positions(tail) == [1, 2, 3]


async def test_sealed_segments_are_kept_and_the_rest_is_copied() -> None:
    env = make_env(2)
    async with killed(env) as writer:
        for lba in range(10):
            await put(writer, lba, 20)
        await writer.sealed_below(writer.tail_number)
        await writer.flush()
        open_number = writer.tail_number
    tail = await read_tail(env, LOG, HEAD, BASE)
    assert [directory.segment for directory, _, _ in tail.sealed] == list(range(open_number))
    assert all(zones == (0, 1) for _, zones, _ in tail.sealed)
    assert positions(tail)[0] == tail.sealed[-1][0].last_position + 1
    everything = await read_tail(env, LOG, HEAD, BASE, copy_all=True)
    assert [record.header.position for record in everything.rest] == [1, 4, 7, 10]
    assert everything.rest[-1].header.last_position == 10


@asynccontextmanager
async def asked_for_seals(monkeypatch: pytest.MonkeyPatch, env: Env) -> AsyncIterator[dict[int, set[int]]]:
    """Zone -> segments whose seals an opening makes durable there."""
    synced: dict[int, set[int]] = {zone.index: set() for zone in env.zones}
    zone_of = {id(zone.backend): zone.index for zone in env.zones}

    def watched(backend: Backend, store_id: bytes, log: int, number: int, sync: bool) -> int | None:
        if sync:
            synced[zone_of[id(backend)]].add(number)
        return seal_of(backend, store_id, log, number, sync)

    with monkeypatch.context() as patches:
        patches.setattr(opening, "seal_of", watched)
        yield synced


async def test_seals_with_enough_written_behind_them_are_not_synced_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what may be in the page cache alone; a segment that was set aside and never used proves nothing."""
    env = make_env(2)
    async with killed(env) as writer:
        for lba in range(200):
            await put(writer, lba, 40)
        await writer.flush()
    async with asked_for_seals(monkeypatch, env) as synced:
        tail = await read_tail(env, LOG, HEAD, BASE)
    sealed = [directory.segment for directory, _, _ in tail.sealed]
    assert len(sealed) >= 150
    for zone in (0, 1):
        assert synced[zone] >= set(sealed[-SETTLED_SEGMENTS:])
        assert len(synced[zone]) <= SETTLED_SEGMENTS + 2 * LOOKS_AT_ONCE


async def test_what_was_written_behind_a_seal_in_other_zones_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zone 2 has a few early segments alone: however long the log of the others, its seals are synced."""
    env = make_env(3)
    early = SETTLED_SEGMENTS - 1
    async with writer_on(env, place=lambda number: (0, 2) if number < early else (0, 1)) as writer:
        for lba in range(120):
            await put(writer, lba, 40)
        await writer.flush()
        await writer.sealed_below(writer.tail_number)
        async with asked_for_seals(monkeypatch, env) as synced:
            tail = await read_tail(env, LOG, HEAD, BASE)
    assert len(tail.sealed) > 60
    assert synced[2] == set(range(early))
    assert 0 not in synced[0]


async def test_the_copy_of_the_end_keeps_every_operation() -> None:
    """Positions, flags, checksums and sources; and the log can be opened again from the copy alone."""
    env = make_env(2)
    moved = pattern(9, 2)
    async with killed(env) as writer:
        await put(writer, 5, 3)
        writer.append(Kind.TRIM, 100, 1 << 31)
        writer.append(Kind.ZERO, 7, 9)
        crcs = [crc32c(moved[:BLOCK_BYTES]), crc32c(moved[BLOCK_BYTES:])]
        writer.append(Kind.MOVE, 50, 2, moved, crcs=crcs, sources=[1 << 60, 5 << 50])
        await put(writer, 60, 2, flags=Flag.PART | Flag.FIRST)
        await put(writer, 62, 40, flags=Flag.LAST)
        await writer.flush()
    before = list(operations_of(records_in(env, 0)))
    tail = await read_tail(env, LOG, HEAD, BASE)
    executor_of(env).release(0, 1)
    writer = LogWriter(
        env, LOG, generation=2, copies=2, next_number=tail.next_number, position=0, previous_crc=0,
        place=lambda number: (0, 1), segment_bytes=env.settings.segment_bytes,
    )  # fmt: skip
    await copy_rest(writer, tail.rest)
    assert writer.position == tail.rest[-1].header.last_position == 6
    for zone in (0, 1):
        made = [n for n in backend_of(env, zone).storage.objects if n >= segment_name(LOG, tail.next_number)]
        assert look_at(backend_of(env, zone), STORE_ID, LOG, tail.next_number).directory is not None
        for name in [n for n in backend_of(env, zone).storage.objects if n.startswith(log_folder(LOG))]:
            if name not in made:
                del backend_of(env, zone).storage.objects[name]
        assert list(operations_of(records_in(env, zone))) == before
    await writer.close()


async def test_look_at_what_is_not_there_or_no_segment() -> None:
    env = make_env(1)
    backend = backend_of(env, 0)
    assert look_at(backend, STORE_ID, LOG, 0) == (None, None, 0)
    for size in (1, 100, BLOCK_BYTES, BLOCK_BYTES + 128, 20 * BLOCK_BYTES):
        backend.put(segment_name(LOG, 0), bytes(size))
        assert look_at(backend, STORE_ID, LOG, 0) == (None, None, size)

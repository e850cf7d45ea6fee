"""The writing end of a log: what a flush waits for, what an error ends, how segments follow each other."""

import asyncio
import random
from array import array

import pytest

from objstore.errors import NoSpace, StoreError, Unavailable
from objstore.format.record import RECORD_DATA_BLOCKS_MAX, Flag, Kind
from objstore.format.segment import decode_segment_header
from objstore.log.address import unpack
from objstore.log.env import BUFFER_BYTES
from objstore.log.segment import segment_name
from objstore.log.tail import look_at
from objstore.log.writer import PREPARED_MAX, SPLIT_BLOCKS_MIN, segment_blocks
from objstore.units import BLOCK_BYTES, KIB, MIB
from objstore.volume.settings import StoreSettings
from tests.conftest import ExpectedWarnings
from tests.support.logs import LOG, open_segment, operations_of, pattern, put, records_in, writer_on
from tests.support.stepping import STORE_ID, backend_of, executor_of, failing, make_env, turns

BIG = StoreSettings(segment_bytes=4 * MIB, dirty_age_seconds=60.0)


async def test_flush_waits_for_every_zone() -> None:
    env = make_env(3)
    async with writer_on(env) as writer:
        await put(writer, 7)
        executor_of(env).hold(2)
        flush = asyncio.create_task(writer.flush())
        await turns()
        assert not flush.done()
        assert writer.durable_upto == 0
        executor_of(env).release(2)
        await flush
        assert writer.durable_upto == writer.position == 1


async def test_zones_that_hold_nothing_of_the_log_are_not_waited_for() -> None:
    env = make_env(3)
    async with writer_on(env, place=lambda number: (0, 2)) as writer:
        executor_of(env).hold(1)
        await put(writer, 7)
        await writer.flush()
        assert not records_in(env, 1)
        assert len(records_in(env, 0)) == len(records_in(env, 2)) == 1


async def test_a_sync_issued_before_a_write_does_not_count_for_it() -> None:
    env = make_env(2)
    executor = executor_of(env)
    async with writer_on(env) as writer:
        await put(writer, 1)
        await turns()
        executor.hold(0, 1)
        first = asyncio.create_task(writer.flush())
        await turns()
        await put(writer, 2)
        second = asyncio.create_task(writer.flush())
        await turns()
        assert executor.waiting(0) == executor.waiting(1) == 1, "one job at a time"
        executor.step(0)
        executor.step(1)
        await turns()
        assert first.done()
        assert not second.done()
        assert writer.durable_upto == 1
        executor.release(0, 1)
        await second


async def test_syncs_of_one_zone_never_count_for_another() -> None:
    env = make_env(2)
    executor = executor_of(env)
    async with writer_on(env) as writer:
        await put(writer, 1)
        await writer.flush()
        executor.hold(1)
        for lba in range(5):
            await put(writer, lba)
            writer.request_sync()
            await turns()
        assert len(records_in(env, 0)) == 6
        assert writer.durable_upto == 1
        executor.release(1)
        await writer.flush()


async def test_a_single_write_is_made_durable_by_itself_only_where_nothing_older_is_unsynced() -> None:
    env = make_env(1)
    backend = backend_of(env, 0)
    async with writer_on(env) as writer:
        await put(writer, 1)
        await turns()
        backend.calls.clear()
        await writer.flush()
        assert [call for call, _, _ in backend.calls] == ["write_durable"]

        backend.calls.clear()
        await put(writer, 2)
        writer.cut()
        await turns()
        assert [call for call, _, _ in backend.calls] == ["write"], "handed over, not yet asked to be durable"
        await put(writer, 3)
        await writer.flush()
        assert [call for call, _, _ in backend.calls] == ["write", "write", "sync"]


async def test_every_unsynced_segment_is_synced_by_a_flush() -> None:
    env = make_env(1)
    backend = backend_of(env, 0)
    async with writer_on(env) as writer:
        await put(writer, 1)
        first = open_segment(writer).name
        writer.finish_segment()
        await turns()
        await put(writer, 2)
        second = open_segment(writer).name
        await turns()
        backend.calls.clear()
        await writer.flush()
        assert {name for call, name, _ in backend.calls if call == "sync"} == {first, second}


async def test_a_flush_up_to_the_middle_of_a_record() -> None:
    env = make_env(1)
    async with writer_on(env) as writer:
        for lba in range(4):
            await put(writer, lba)
        await writer.flush(2)
        assert writer.durable_upto == 4, "a record is durable as a whole"
        for lba in range(4):
            await put(writer, lba)
        writer.cut()
        await turns()
        await put(writer, 9)
        await writer.flush(6)
        assert writer.durable_upto == 8


async def test_flushes_end_in_the_order_of_their_positions() -> None:
    env = make_env(1)
    executor = executor_of(env)
    ended: list[int] = []

    async def flush(position: int) -> None:
        await writer.flush(position)
        ended.append(position)

    async with writer_on(env) as writer:
        await put(writer, 1)
        writer.cut()
        await turns()
        executor.hold(0)
        tasks = []
        for lba in range(2, 8):
            await put(writer, lba)
            writer.cut()
        for position in (6, 2, 4, 4, 1, 7, 3):
            tasks.append(asyncio.create_task(flush(position)))
            await turns()
        executor.release(0)
        await asyncio.gather(*tasks)
        assert ended == sorted(ended)
        await writer.flush(3)


@pytest.mark.parametrize("call", ["write", "write_durable", "sync"])
async def test_an_error_of_a_zone_is_final(call: str, expected_warnings: ExpectedWarnings) -> None:
    """No call is repeated, no flush succeeds, nothing more is taken, and what is in memory stays there."""
    expected_warnings.allow("log stopped")
    env = make_env(2)
    async with writer_on(env) as writer:
        await put(writer, 1)
        if call != "write_durable":
            writer.cut()
            await turns()
            await put(writer, 2)
            await put(writer, 3)
        await turns()
        backend_of(env, 1).fault = failing(call)
        with pytest.raises(Unavailable, match="zone zone1 failed"):
            await writer.flush()
        assert env.zones[1].error is not None
        await turns()
        before = list(backend_of(env, 1).calls)
        for _ in range(2):
            with pytest.raises(Unavailable):
                await writer.flush()
        with pytest.raises(Unavailable):
            writer.room(1)
        with pytest.raises(Unavailable):
            writer.room_for_batch(1)
        with pytest.raises(Unavailable):
            await writer.sealed_below(100)
        writer.request_sync()
        await turns()
        assert backend_of(env, 1).calls == before
        assert env.dirty_bytes == 0, "other logs don't wait for it"
        memory = open_segment(writer).memory
        assert memory is not None
        assert any(memory)


async def test_an_error_ends_every_flush_under_way(expected_warnings: ExpectedWarnings) -> None:
    expected_warnings.allow("log stopped")
    env = make_env(2)
    executor = executor_of(env)
    async with writer_on(env) as writer:
        await put(writer, 1)
        await turns()
        executor.hold(0, 1)
        flushes = [asyncio.create_task(writer.flush()) for _ in range(3)]
        sealed = asyncio.create_task(writer.sealed_below(50))
        await turns()
        backend_of(env, 0).fault = failing("write_durable")
        executor.step(0)
        results = await asyncio.gather(*flushes, sealed, return_exceptions=True)
        assert all(isinstance(result, Unavailable) for result in results)
        executor.release(0, 1)
        await turns()
        assert writer.durable_upto == 0


async def test_a_seal_is_written_only_after_its_body_was_synced_there() -> None:
    env = make_env(2)
    async with writer_on(env) as writer:
        await put(writer, 1)
        await put(writer, 2)
        name = open_segment(writer).name
        await turns()
        for zone in (0, 1):
            backend_of(env, zone).calls.clear()
        writer.finish_segment()
        await turns()
        await writer.flush()
        await turns()
        for zone in (0, 1):
            assert [call for call, found, _ in backend_of(env, zone).calls if found == name] == [
                "write",
                "sync",
                "write",
                "truncate",
            ]
        assert writer.unsealed, "the seal itself is not durable yet"
        await writer.sealed_below(writer.next_number)
        assert not writer.unsealed
        assert backend_of(env, 0).calls[-1][:2] == ("sync", name)


async def test_a_seal_without_a_synced_body_never_appears(expected_warnings: ExpectedWarnings) -> None:
    expected_warnings.allow("log stopped")
    env = make_env(1)
    async with writer_on(env) as writer:
        await put(writer, 1)
        writer.cut()
        await turns()
        backend_of(env, 0).fault = failing("sync")
        writer.finish_segment()
        await turns()
        assert look_at(backend_of(env, 0), STORE_ID, LOG, 0).directory is None


async def test_sealed_below_waits_for_every_zone() -> None:
    env = make_env(2)
    executor = executor_of(env)
    async with writer_on(env) as writer:
        await put(writer, 1)
        writer.finish_segment()
        executor.hold(1)
        sealed = asyncio.create_task(writer.sealed_below(1))
        await turns()
        assert not sealed.done()
        executor.release(1)
        await sealed
        await writer.sealed_below(0)
        await writer.sealed_below(1)


async def test_a_directory_says_what_the_records_say() -> None:
    env = make_env(1)
    async with writer_on(env) as writer:
        for lba in range(20):
            await put(writer, lba, 1 + lba % 3)
            if lba % 4 == 0:
                writer.cut()
        writer.append(Kind.TRIM, 100, 1 << 20)
        writer.finish_segment()
        await writer.flush()
        await writer.sealed_below(writer.next_number)
        seen = look_at(backend_of(env, 0), STORE_ID, LOG, 0)
        directory = seen.directory
        assert directory is not None
        assert seen.header is not None
        records = records_in(env, 0)
        assert (directory.first_position, directory.last_position) == (1, writer.position)
        assert directory.record_crcs.tolist() == [record.header.crc for record in records]
        assert directory.record_blocks.tolist() == [record.header.block for record in records]
        assert directory.words == array("Q", [word for record in records for word in record.header.words])
        assert directory.counts == array("I", [count for record in records for count in record.header.counts])
        assert directory.last_crc == writer.previous_crc
        for record in records:
            start = record.header.block
            assert directory.crcs[start] == 0
            assert directory.crcs[start + 1 : start + record.header.blocks] == record.header.crcs


async def test_records_form_a_chain_over_segments() -> None:
    """Positions without a gap, each header naming its predecessor's CRC, durable_upto never ahead of the truth."""
    env = make_env(2)
    dice = random.Random(4)
    written: list[tuple[int, int, bytes]] = []
    async with writer_on(env, position=41) as writer:
        for number in range(120):
            blocks = dice.randint(1, 30)
            await put(writer, number, blocks, seed=number + 1)
            written.append((number, blocks, bytes(pattern(number + 1, blocks))))
            if dice.random() < 0.2:
                await writer.flush()
        await writer.flush()
        assert len(backend_of(env, 0).storage.objects) > 10
        for zone in (0, 1):
            records = records_in(env, zone, position=41)
            assert [(lba, count, data) for _, _, lba, count, data, _ in operations_of(records)] == written
            position = 41
            for record in records:
                assert record.header.position == position + 1
                assert record.header.durable_upto <= position
                assert record.header.position_count == len(record.header.words)
                position = record.header.last_position
            assert records[-1].header.durable_upto > 41


async def test_entries_say_where_the_data_lies() -> None:
    env = make_env(1)
    async with writer_on(env) as writer:
        for lba in range(100):
            entry = await put(writer, lba, 1 + lba % 5)
            await writer.flush()
            log, number, block = unpack(entry)
            assert log == LOG
            stored = backend_of(env, 0).storage.objects[segment_name(log, number)]
            assert stored[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES] == pattern(lba + 1)[:BLOCK_BYTES]


async def test_one_block_writes_are_like_other_writes() -> None:
    env = make_env(1)
    async with writer_on(env) as writer:
        await writer.make_room(0)
        entries = []
        for lba in range(5):
            assert writer.room(1)
            entries.append(writer.append_block(lba, pattern(lba + 1)))
        assert [entry - entries[0] for entry in entries] == [0, 1, 2, 3, 4]
        await writer.flush()
        (record,) = records_in(env, 0)
        assert [(kind, flags, lba, count) for kind, flags, lba, count, _, _ in operations_of([record])] == [
            (Kind.WRITE, 0, lba, 1) for lba in range(5)
        ]


async def test_small_records_leave_their_buffer_and_large_ones_keep_it_until_durable() -> None:
    env = make_env(2, settings=BIG)
    executor = executor_of(env)
    async with writer_on(env) as writer:
        await put(writer, 1, 2)
        segment = open_segment(writer)
        executor.hold(0, 1)
        writer.cut()
        assert segment.memory is not None
        small = segment.memory[1]
        assert small is not None
        assert small.buffer is None
        assert len(small.view) == 3 * BLOCK_BYTES
        await put(writer, 10, 100)
        writer.cut()
        large = segment.memory[4]
        assert large is not None
        assert large.buffer is not None
        assert len(large.buffer) == BUFFER_BYTES
        assert large.view[BLOCK_BYTES:] == pattern(11, 100)
        executor.release(0)
        flush = asyncio.create_task(writer.flush())
        await turns()
        assert large.buffer is not None, "zone 1 has not got it"
        executor.release(1)
        await flush
        assert large.buffer is None
        assert not any(segment.memory)


async def test_dirty_bytes_count_what_is_not_durable() -> None:
    env = make_env(2)
    executor = executor_of(env)
    async with writer_on(env) as writer:
        await put(writer, 1, 3)
        assert env.dirty_bytes == writer.dirty_bytes == 4 * BLOCK_BYTES
        executor.hold(1)
        flush = asyncio.create_task(writer.flush())
        await turns()
        await put(writer, 9, 1)
        assert env.dirty_bytes == writer.dirty_bytes == 6 * BLOCK_BYTES
        executor.release(1)
        await flush
        assert env.dirty_bytes == writer.dirty_bytes == 2 * BLOCK_BYTES
        await writer.flush()
        assert env.dirty_bytes == writer.dirty_bytes == 0


async def test_data_that_nobody_flushes_goes_out_at_its_age() -> None:
    env = make_env(1, settings=StoreSettings(segment_bytes=256 * KIB, dirty_age_seconds=0.05))
    async with writer_on(env) as writer:
        await put(writer, 1)
        await env.dirty_room()
        await turns()
        assert writer.durable_upto == 1


async def test_no_checksum_is_computed_for_data_that_brings_its_own() -> None:
    env = make_env(1)
    async with writer_on(env) as writer:
        await writer.make_room(0)
        writer.append(Kind.MOVE, 5, 2, pattern(1, 2), crcs=[17, 18], sources=[1 << 50, 3 << 50])
        await writer.flush()
        stored = backend_of(env, 0).storage.objects[segment_name(LOG, 0)]
        assert not records_in(env, 0), "the wrong CRCs were written as given"
        assert stored[2 * BLOCK_BYTES : 4 * BLOCK_BYTES] == pattern(1, 2)


# -- room ---------------------------------------------------------------------------------------------------------


def test_size_of_segment_files() -> None:
    assert segment_blocks(256 * KIB) == 64 + 16
    assert segment_blocks(8 * MIB) == 2048 + 64
    assert segment_blocks(16 * MIB) == 4096, "the map has 12 bits for a block"


async def test_room_is_always_kept() -> None:
    """Whatever `room` grants, `append` takes, in any sequence, up to the last block of a segment."""
    env = make_env(1)
    dice = random.Random(8)
    async with writer_on(env) as writer:
        position = 0
        for number in range(600):
            blocks = dice.choice((0, 1, 1, 1, 2, 5, 17, 40, 64, 70, 200))
            granted = writer.room(blocks)
            assert granted <= max(1, blocks)
            if not granted:
                await writer.make_room(0)
                granted = writer.room(blocks)
            assert granted
            if blocks:
                writer.append(Kind.WRITE, number, granted, pattern(number, granted))
            else:
                writer.append(Kind.TRIM, number, 1 << 31)
            position += 1
            assert writer.position == position
            if dice.random() < 0.05:
                await writer.flush()
        await writer.flush()
        assert sum(1 for _ in operations_of(records_in(env, 0))) == position
        for number in range(open_segment(writer).number):
            stored = backend_of(env, 0).storage.objects[segment_name(LOG, number)]
            assert len(stored) <= segment_blocks(env.settings.segment_bytes) * BLOCK_BYTES
            directory = look_at(backend_of(env, 0), STORE_ID, LOG, number).directory
            assert directory is not None


async def test_room_in_whole_or_in_part() -> None:
    env = make_env(1, settings=BIG)
    async with writer_on(env) as writer:
        assert writer.room(1) == writer.room(0) == 0
        assert not writer.room_for_batch(1)
        await writer.make_room(0)
        assert writer.room(0) == 1
        assert writer.room(10_000) == RECORD_DATA_BLOCKS_MAX
        while (left := writer.room(RECORD_DATA_BLOCKS_MAX, whole=True)) == RECORD_DATA_BLOCKS_MAX:
            writer.append(Kind.WRITE, 0, left, pattern(1, left))
            if writer.segment is not None and writer.segment.number > 0:
                break
        await turns()
        assert writer.segment is not None


async def test_a_request_is_split_only_where_enough_of_it_goes() -> None:
    env = make_env(1, settings=BIG)
    async with writer_on(env) as writer:
        await writer.make_room(0)
        await turns()
        executor_of(env).hold(0)
        await put(writer, 0, 200)
        writer._prepared.clear()
        grants = []
        while granted := writer.room(256):
            grants.append(granted)
            writer.append(Kind.WRITE, 0, granted, pattern(1, granted))
        assert len(grants) >= 2
        assert grants[:-1] == [256] * (len(grants) - 1)
        assert grants[-1] >= SPLIT_BLOCKS_MIN
        assert writer.room(256, whole=True) == 0
        executor_of(env).release(0)


async def test_parts_keep_their_marks() -> None:
    env = make_env(1)
    async with writer_on(env) as writer:
        await put(writer, 1, 2, flags=Flag.PART | Flag.FIRST)
        await put(writer, 3, 2, flags=Flag.PART)
        await put(writer, 5, 2, flags=Flag.LAST)
        await writer.flush()
        assert [flags for _, flags, _, _, _, _ in operations_of(records_in(env, 0))] == [3, 1, 4]


async def test_numbers_of_segments_ascend_and_headers_name_their_place() -> None:
    env = make_env(2)
    async with writer_on(env, next_number=9) as writer:
        for lba in range(30):
            await put(writer, lba, 20)
        await writer.flush()
        names = [name for name in backend_of(env, 0).storage.objects if name.startswith("log/")]
        assert sorted(names)[0] == segment_name(LOG, 9)
        for name in names:
            page = backend_of(env, 1).storage.objects[name][:BLOCK_BYTES]
            number = int(name[-7:], 16)
            header = decode_segment_header(bytes(page), store_id=STORE_ID, log=LOG, segment=number)
            assert header.zones == tuple(zone.zone_id for zone in env.zones)
            assert header.generation == 1
            assert header.blocks == segment_blocks(env.settings.segment_bytes)


async def test_a_busy_log_has_more_segments_set_aside() -> None:
    env = make_env(1)
    async with writer_on(env) as writer:
        assert writer.prepared_target == 1
        for lba in range(40):
            await put(writer, lba, 60)
        assert 1 < writer.prepared_target <= PREPARED_MAX


async def test_full_zones_give_no_space_and_leave_nothing_behind() -> None:
    env = make_env(2)
    backend_of(env, 1).storage.capacity_bytes = 300 * KIB
    async with writer_on(env) as writer:
        with pytest.raises(NoSpace):
            await writer.make_room(0)
        await turns()
        assert not backend_of(env, 0).storage.objects
        assert not backend_of(env, 1).storage.objects
        assert writer.error is None
        backend_of(env, 1).storage.capacity_bytes = 4 * MIB
        await put(writer, 1)
        await writer.flush()


async def test_the_reserve_is_for_those_who_give_space_back() -> None:
    env = make_env(1)
    backend = backend_of(env, 0)
    backend.storage.capacity_bytes = 700 * KIB
    async with writer_on(env) as writer:
        with pytest.raises(NoSpace):
            await writer.make_room(500 * KIB)
        await writer.make_room(0)
        assert writer.room(0) == 1


async def test_who_needs_no_reserve_is_not_refused_because_of_anothers_attempt() -> None:
    """A trim waits for a segment while one with the reserve of client data is being tried and fails."""
    env = make_env(1)
    backend_of(env, 0).storage.capacity_bytes = 700 * KIB
    executor = executor_of(env)
    async with writer_on(env) as writer:
        executor.hold(0)
        data = asyncio.create_task(writer.make_room(500 * KIB))
        await turns()
        trim = asyncio.create_task(writer.make_room(0))
        await turns()
        executor.release(0)
        await trim
        assert writer.room(0) == 1
        results = await asyncio.gather(data, return_exceptions=True)
        assert results[0] is None or isinstance(results[0], NoSpace)


async def test_the_tail_begins_at_a_segment_that_is_still_being_made() -> None:
    """A checkpoint may begin just then; what goes into that segment later belongs to the tail."""
    env = make_env(1)
    executor = executor_of(env)
    async with writer_on(env) as writer:
        await writer.make_room(0)
        executor.hold(0)
        await put(writer, 1)
        await turns()
        writer.finish_segment()
        tail = writer.tail_number
        executor.release(0)
        await put(writer, 2)
        assert open_segment(writer).number == tail


async def test_a_zone_that_fails_while_a_segment_is_made_stops_the_log(expected_warnings: ExpectedWarnings) -> None:
    expected_warnings.allow("log stopped")
    env = make_env(2)
    async with writer_on(env) as writer:
        backend_of(env, 1).fault = failing("create")
        with pytest.raises(StoreError):
            await writer.make_room(0)
        assert isinstance(writer.error, Unavailable)
        await turns()
        assert not backend_of(env, 0).storage.objects


async def test_closing_removes_what_was_set_aside() -> None:
    env = make_env(2)
    async with writer_on(env) as writer:
        await put(writer, 1)
        await writer.flush()
        await turns()
        assert len(backend_of(env, 0).storage.objects) == 2
    assert list(backend_of(env, 0).storage.objects) == [segment_name(LOG, 0)]


async def test_a_record_cut_after_its_log_failed_is_not_counted_again(expected_warnings: ExpectedWarnings) -> None:
    expected_warnings.allow("log stopped")
    env = make_env(1)
    async with writer_on(env) as writer:
        await put(writer, 1)
        for block in range(30):  # too large to be copied out of its buffer
            await put(writer, block)
        assert env.dirty_bytes
        writer.fail(Unavailable("the zones are gone"))
        writer.cut()
        assert not env.dirty_bytes

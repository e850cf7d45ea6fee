"""Zones that fail, hang or fill up under a log: it goes on without them, and nothing is acknowledged too early."""

import asyncio
from collections.abc import Callable

import pytest

from objstore.backend.base import ZoneFailed
from objstore.errors import NoSpace, StoreError, Unavailable
from objstore.format.segment import decode_segment_header
from objstore.log.env import BUFFER_BYTES, Env
from objstore.log.segment import segment_name
from objstore.log.tail import look_at
from objstore.log.writer import UNSEALED_MAX, LogWriter
from objstore.units import BLOCK_BYTES, KIB, MIB
from objstore.volume.settings import StoreSettings
from tests.conftest import ExpectedWarnings
from tests.support.logs import LOG, open_segment, pattern, put, records_in, writer_on
from tests.support.membership import join
from tests.support.serving import eventually
from tests.support.stepping import STORE_ID, HandClock, backend_of, executor_of, failing, make_env, turns

PATIENT = StoreSettings(segment_bytes=256 * KIB, dirty_age_seconds=60.0, write_wait_seconds=600.0)
IMPATIENT = StoreSettings(segment_bytes=256 * KIB, dirty_age_seconds=60.0, write_wait_seconds=0.0)


@pytest.fixture(autouse=True)
def _failures_are_logged(expected_warnings: ExpectedWarnings) -> None:
    for text in ("is put out", "is out of service", "can't be done without", "log stopped", "waits for"):
        expected_warnings.allow(text)


def placed(env: Env, copies: int) -> Callable[[int], tuple[int, ...]]:
    """Places segments on the lowest zones in service."""
    return lambda number: tuple(sorted(env.in_service))[:copies]


def lbas_in(env: Env, zone: int) -> list[int]:
    """First blocks of the operations that a zone has whole, in log order."""
    return [word & (1 << 48) - 1 for record in records_in(env, zone) for word in record.header.words]


async def written(writer: LogWriter, *lbas: int) -> None:
    for lba in lbas:
        await put(writer, lba)
    await writer.flush()


async def finish(env: Env, writer: LogWriter) -> None:
    """Everything sealed, as before a checkpoint."""
    writer.finish_segment()
    await writer.flush()
    await writer.sealed_below(writer.next_number)


# -- what a flush waits for -------------------------------------------------------------------------------------------


async def test_a_flush_that_waits_for_a_hung_zone_ends_when_the_epoch_without_it_is_durable() -> None:
    env = make_env(3)
    membership = join(env, held=True)
    async with writer_on(env, place=placed(env, 3)) as writer:
        await written(writer, 1)
        executor_of(env).hold(2)
        await put(writer, 2)
        flush = asyncio.create_task(writer.flush())
        await turns()
        env.zone_failing(2, ZoneFailed("no answer"))
        await turns()
        assert not flush.done(), "the epoch is not durable yet"
        assert membership.asked == [frozenset({2})]
        membership.release()
        await flush
        assert lbas_in(env, 0) == lbas_in(env, 1) == [1, 2]
        assert lbas_in(env, 2) == [1]
        await written(writer, 3)
        assert lbas_in(env, 0) == lbas_in(env, 1) == [1, 2, 3]
        await finish(env, writer)


@pytest.mark.parametrize("call", ["write", "write_durable", "sync", "create", "truncate"])
async def test_a_zone_that_returns_an_error_is_put_out_and_no_client_sees_it(call: str) -> None:
    env = make_env(3)
    membership = join(env)
    async with writer_on(env, place=placed(env, 3)) as writer:
        await written(writer, 1)
        backend_of(env, 1).fault = failing(call, times=1)
        for lba in range(2, 8):
            await put(writer, lba)
            if call != "write_durable":
                writer.cut()
            await turns()
            await put(writer, lba)
            if call in ("create", "truncate"):
                writer.finish_segment()
            await writer.flush()
        assert membership.in_service == {0, 2}
        await finish(env, writer)
        assert lbas_in(env, 0) == lbas_in(env, 2) == [1, *(lba for lba in range(2, 8) for _ in "12")]
        calls = list(backend_of(env, 1).calls)
        await written(writer, 9)
        assert backend_of(env, 1).calls == calls, "nothing is written to a zone that failed"


async def test_nothing_counts_as_durable_before_the_epoch_is() -> None:
    env = make_env(2)
    membership = join(env, held=True)
    async with writer_on(env, place=placed(env, 2)) as writer:
        await written(writer, 1)
        backend_of(env, 1).fault = failing("write_durable")
        await put(writer, 2)
        flush = asyncio.create_task(writer.flush())
        await turns(200)
        assert not flush.done()
        assert writer.durable_upto == 1
        membership.release()
        await flush
        assert writer.durable_upto == 2


async def test_the_open_segment_is_sealed_where_it_stands_and_the_next_names_the_zones_in_service() -> None:
    env = make_env(3)
    join(env)
    async with writer_on(env, place=placed(env, 3)) as writer:
        await written(writer, 1)
        first = open_segment(writer)
        await put(writer, 2)
        env.zone_failing(2, ZoneFailed("input/output error"))
        await turns()
        assert first.sealed
        assert first.zones == (0, 1)
        await put(writer, 3)
        second = open_segment(writer)
        await finish(env, writer)
        for zone in (0, 1):
            directory = look_at(backend_of(env, zone), STORE_ID, LOG, first.number).directory
            assert directory is not None
            assert directory.last_position == 2
        page = bytes(backend_of(env, 0).storage.objects[second.name][:BLOCK_BYTES])
        header = decode_segment_header(page, store_id=STORE_ID, log=LOG, segment=second.number)
        assert header.zones == (env.zones[0].zone_id, env.zones[1].zone_id)


async def test_what_a_zone_has_sealed_stays_a_copy() -> None:
    env = make_env(2)
    join(env)
    async with writer_on(env, place=placed(env, 2)) as writer:
        await written(writer, 1)
        first = open_segment(writer)
        await finish(env, writer)
        await put(writer, 2)
        env.zone_failing(1, ZoneFailed("input/output error"))
        await turns()
        assert first.zones == (0, 1)
        assert env.serving(first.zones) == (0,)


async def test_a_segment_made_beside_a_slower_one_is_not_used_if_its_zone_goes_meanwhile() -> None:
    env = make_env(3)
    join(env)

    def place(number: int) -> tuple[int, ...]:
        return env.serving((0, 1) if number % 2 else (0, 2))

    async with writer_on(env, place=place) as writer:
        writer.prepared_target = 2
        executor_of(env).hold(1)
        room = asyncio.create_task(writer.make_room(0))
        await turns()
        env.zone_failing(2, ZoneFailed("input/output error"))
        await turns()
        executor_of(env).release(1)
        await room
        await written(writer, 1)
        assert open_segment(writer).zones == (0, 1)
        await finish(env, writer)


async def test_zones_that_fail_together_go_in_one_epoch() -> None:
    env = make_env(4)
    membership = join(env, held=True)
    async with writer_on(env, place=placed(env, 4)) as writer:
        await written(writer, 1)
        for zone in (1, 3):
            backend_of(env, zone).fault = failing("write_durable")
        await put(writer, 2)
        flush = asyncio.create_task(writer.flush())
        await turns()
        membership.release()
        await flush
        assert membership.in_service == {0, 2}
        assert lbas_in(env, 0) == lbas_in(env, 2) == [1, 2]


async def test_a_zone_that_fails_while_another_is_put_out_follows_it() -> None:
    env = make_env(3)
    membership = join(env, held=True)
    async with writer_on(env, place=placed(env, 3)) as writer:
        await written(writer, 1)
        executor_of(env).hold(1, 2)
        await put(writer, 2)
        flush = asyncio.create_task(writer.flush())
        env.zone_failing(2, ZoneFailed("no answer"))
        await turns()
        env.zone_failing(1, ZoneFailed("no answer"))
        await turns()
        membership.release()
        await flush
        assert membership.asked == [frozenset({2}), frozenset({1})]
        assert lbas_in(env, 0) == [1, 2]


# -- too few zones ----------------------------------------------------------------------------------------------------


async def test_a_flush_fails_when_the_zone_can_not_be_done_without() -> None:
    env = make_env(2, settings=IMPATIENT)
    join(env).refuse = True
    async with writer_on(env, place=placed(env, 2)) as writer:
        await written(writer, 1)
        backend_of(env, 1).fault = failing("write_durable")
        await put(writer, 2)
        with pytest.raises(Unavailable):
            await writer.flush()
        with pytest.raises(Unavailable):
            writer.room(1)
        memory = open_segment(writer).memory
        assert memory is not None
        assert any(memory), "it can still be read"
        env.leave()
        await turns()


async def test_whoever_needs_the_zone_waits_before_giving_up() -> None:
    env = make_env(2, settings=PATIENT)
    membership = join(env)
    membership.refuse = True
    async with writer_on(env, place=placed(env, 2)) as writer:
        await written(writer, 1)
        backend_of(env, 1).fault = failing("write_durable")
        await put(writer, 2)
        flush = asyncio.create_task(writer.flush())
        await turns(200)
        assert not flush.done()
        assert membership.asked == [frozenset({1})], "nothing has changed, nothing is asked again"
        membership.refuse = False
        membership.in_service = frozenset({0})
        env._zones_changed()
        await flush


async def test_below_min_copies_writes_wait_until_a_zone_is_back() -> None:
    env = make_env(3, settings=PATIENT)
    membership = join(env)
    async with writer_on(env, place=placed(env, 3)) as writer:
        writer.min_copies = 2
        await written(writer, 1)
        for zone in (1, 2):
            await env.put_out(zone, ZoneFailed("input/output error"))
        waiting = asyncio.create_task(put(writer, 2))
        await turns(200)
        assert not waiting.done()
        executor_of(env).readmit(2)
        membership.admit(2)
        await waiting
        await writer.flush()
        assert lbas_in(env, 0)[-1] == lbas_in(env, 2)[-1] == 2


async def test_below_min_copies_writes_fail_in_the_end_and_reads_go_on() -> None:
    env = make_env(3, settings=IMPATIENT)
    membership = join(env)
    async with writer_on(env, place=placed(env, 3)) as writer:
        writer.min_copies = 2
        await written(writer, 1)
        for zone in (1, 2):
            await env.put_out(zone, ZoneFailed("input/output error"))
        for _ in range(2):
            with pytest.raises(Unavailable, match="too few zones"):
                await put(writer, 2)
        assert writer.error is None, "what was written is safe: only new writes fail"
        executor_of(env).readmit(1)
        membership.admit(1)
        await written(writer, 2)


async def test_a_flush_is_not_acknowledged_with_fewer_copies_than_min_copies() -> None:
    env = make_env(3, settings=IMPATIENT)
    membership = join(env, held=True)
    async with writer_on(env, place=placed(env, 3)) as writer:
        writer.min_copies = 2
        await written(writer, 1)
        executor_of(env).hold(1, 2)
        await put(writer, 2)
        flush = asyncio.create_task(writer.flush())
        await turns()
        env.zone_failing(1, ZoneFailed("no answer"))
        env.zone_failing(2, ZoneFailed("no answer"))
        membership.release()
        with pytest.raises(Unavailable):
            await flush
        assert writer.durable_upto == 1


async def test_the_log_stops_at_once_when_every_zone_of_its_end_is_gone() -> None:
    env = make_env(3, settings=PATIENT)
    join(env)
    async with writer_on(env, place=lambda number: (0, 1)) as writer:
        await written(writer, 1)
        await put(writer, 2)
        flush = asyncio.create_task(writer.flush())
        for zone in (0, 1):
            env.zone_failing(zone, ZoneFailed("input/output error"))
        with pytest.raises(Unavailable, match="every zone"):
            await flush


# -- calls that hang --------------------------------------------------------------------------------------------------


async def test_a_call_that_hangs_keeps_its_memory() -> None:
    """When it returns at last it writes what it was given, not what the buffer was used for since."""
    env = make_env(2)
    join(env)
    async with writer_on(env, place=placed(env, 2)) as writer:
        await written(writer, 1)
        executor_of(env).hold(1)
        await put(writer, 100, 30, seed=7)
        flush = asyncio.create_task(writer.flush())
        await turns()
        await env.put_out(1, ZoneFailed("no answer"))
        await flush
        for lba in range(8):
            await put(writer, lba, 30, seed=50 + lba)
            await writer.flush()
        name = segment_name(LOG, 0)
        assert executor_of(env).outstanding(1)
        executor_of(env).release(1)
        await turns()
        assert not executor_of(env).outstanding(1)
        image = bytes(backend_of(env, 1).storage.objects[name])
        at = image.find(bytes(pattern(7, 30))[:4096])
        assert at > 0
        assert image[at : at + 30 * BLOCK_BYTES] == pattern(7, 30), "a late write had other data than it was given"


async def test_a_zone_is_not_taken_back_while_a_call_hangs() -> None:
    env = make_env(2)
    join(env)
    async with writer_on(env, place=placed(env, 2)) as writer:
        await written(writer, 1)
        executor_of(env).hold(1)
        await put(writer, 2)
        flush = asyncio.create_task(writer.flush())
        await turns()
        await env.put_out(1, ZoneFailed("no answer"))
        await flush
        with pytest.raises(StoreError):
            executor_of(env).readmit(1)
        executor_of(env).release(1)
        await turns()
        executor_of(env).readmit(1)


async def test_a_descriptor_is_not_closed_under_a_call_that_hangs() -> None:
    """The zone that hangs is the last one to have the seal: leaving it out makes the seal durable."""
    env = make_env(2)
    join(env)
    async with writer_on(env, place=placed(env, 2)) as writer:
        await written(writer, 1)
        name = open_segment(writer).name
        assert open_segment(writer).reader is open_segment(writer).handles[0]
        await turns()
        executor_of(env).hold(1)
        writer.finish_segment()
        sealed = asyncio.create_task(writer.sealed_below(1))
        await turns()
        assert executor_of(env).outstanding(1)
        await env.put_out(1, ZoneFailed("no answer"))
        await sealed
        assert name not in backend_of(env, 1).closed
        executor_of(env).release(1)
        await turns()
        assert backend_of(env, 1).closed.count(name) == 1


async def test_a_log_that_failed_closes_nothing_of_a_zone_that_is_out(expected_warnings: ExpectedWarnings) -> None:
    """It is not told of zones that go any more; what it has set aside there is closed behind the calls that hang."""
    expected_warnings.allow("log stopped")
    env = make_env(2)
    join(env)
    async with writer_on(env, place=placed(env, 2)) as writer:
        await written(writer, 1)
        await turns()
        name = writer._prepared[0].name
        writer.fail(Unavailable("it is over"))
        executor_of(env).hold(1)
        env.executor.submit(1, backend_of(env, 1).list, ("",), lambda result, error: None)
        await env.put_out(1, ZoneFailed("no answer"))
        await writer.close()
        assert name not in backend_of(env, 1).closed
        executor_of(env).release(1)
        await turns()
        assert backend_of(env, 1).closed.count(name) == 1


async def test_closing_a_log_ends_when_a_zone_that_hangs_can_not_be_put_out(
    expected_warnings: ExpectedWarnings,
) -> None:
    expected_warnings.allow("log stopped")
    env = make_env(1)
    join(env)
    async with writer_on(env) as writer:
        await written(writer, 1)
        await turns()
        writer.forget_prepared()
        await turns()
        executor_of(env).hold(0)
        await put(writer, 2)
        writer.cut()
        closing = asyncio.create_task(writer.close())
        await turns()
        assert not closing.done()
        writer.fail(Unavailable("the zone hangs, and there is no other"))
        await turns()
        assert closing.done()
        assert open_segment(writer).name not in backend_of(env, 0).closed


async def test_a_segment_being_made_on_a_hung_zone_is_made_elsewhere() -> None:
    env = make_env(3)
    join(env)
    async with writer_on(env, place=placed(env, 2)) as writer:
        executor_of(env).hold(1)
        first = asyncio.create_task(put(writer, 1))
        await turns()
        assert not first.done()
        await env.put_out(1, ZoneFailed("no answer"))
        await first
        await writer.flush()
        assert lbas_in(env, 0) == lbas_in(env, 2) == [1]
        executor_of(env).release(1)
        await turns()
        assert not [name for name in backend_of(env, 0).storage.objects if name == segment_name(LOG, 0)]


# -- lag --------------------------------------------------------------------------------------------------------------


def clock_of(env: Env) -> HandClock:
    assert isinstance(env.clock, HandClock)
    return env.clock


async def pass_time(env: Env, seconds: float) -> None:
    """Time goes by in ticks, each on time."""
    assert env.watch is not None
    for _ in range(round(seconds * 10)):
        clock_of(env).now += 0.1
        env.watch.tick()
        await turns(5)


async def test_a_zone_that_lags_past_its_deadline_is_put_out() -> None:
    env = make_env(3)
    membership = join(env)
    async with writer_on(env, place=placed(env, 3)) as writer:
        await written(writer, 1)
        executor_of(env).hold(2)
        await put(writer, 2)
        flush = asyncio.create_task(writer.flush())
        await pass_time(env, 4.5)
        assert not flush.done()
        await pass_time(env, 1.0)
        assert membership.in_service == {0, 1}
        await flush


async def test_a_zone_that_answers_each_call_just_in_time_is_put_out_all_the_same() -> None:
    env = make_env(3)
    membership = join(env)
    executor = executor_of(env)
    async with writer_on(env, place=placed(env, 3)) as writer:
        await written(writer, 1)
        executor.hold(2)
        for lba in range(2, 5):
            await put(writer, lba)
            flushes = [asyncio.create_task(writer.flush())]
            await pass_time(env, 2.0)
            await put(writer, lba)
            flushes.append(asyncio.create_task(writer.flush()))
            await pass_time(env, 2.0)
            if executor.waiting(2):
                executor.step(2)
            await pass_time(env, 0.5)
        await turns()
        await asyncio.gather(*flushes)
        assert membership.in_service == {0, 1}


async def test_data_that_nobody_wants_durable_makes_no_zone_late() -> None:
    env = make_env(3)
    membership = join(env)
    async with writer_on(env, place=placed(env, 3)) as writer:
        await written(writer, 1)
        await put(writer, 2)
        writer.cut()
        await pass_time(env, 30)
        assert membership.in_service == {0, 1, 2}


async def test_a_late_tick_voids_the_measurement(expected_warnings: ExpectedWarnings) -> None:
    expected_warnings.allow("stood still")
    env = make_env(3)
    membership = join(env)
    async with writer_on(env, place=placed(env, 3)) as writer:
        await written(writer, 1)
        executor_of(env).hold(2)
        await put(writer, 2)
        flush = asyncio.create_task(writer.flush())
        await pass_time(env, 1.0)
        clock_of(env).now += 3600  # the host was suspended
        await pass_time(env, 4.5)
        assert membership.in_service == {0, 1, 2}
        executor_of(env).release(2)
        await flush


async def test_nobody_is_put_out_when_everybody_lags(expected_warnings: ExpectedWarnings) -> None:
    expected_warnings.allow("zones lag")
    env = make_env(3)
    membership = join(env)
    async with writer_on(env, place=placed(env, 3)) as writer:
        await written(writer, 1)
        executor_of(env).hold(0, 1, 2)
        await put(writer, 2)
        flush = asyncio.create_task(writer.flush())
        await pass_time(env, 20)
        assert membership.in_service == {0, 1, 2}
        assert env.watch is not None
        assert env.watch.late == {0, 1, 2}
        executor_of(env).release(0, 1, 2)
        await flush


async def test_slowness_never_goes_below_min_copies(expected_warnings: ExpectedWarnings) -> None:
    expected_warnings.allow("zones lag")
    env = make_env(3)
    membership = join(env)
    async with writer_on(env, place=placed(env, 3)) as writer:
        writer.min_copies = 2
        await written(writer, 1)
        executor_of(env).hold(1, 2)
        await put(writer, 2)
        flush = asyncio.create_task(writer.flush())
        await pass_time(env, 20)
        assert len(membership.in_service) == 2
        assert not flush.done()
        executor_of(env).release(1, 2)
        await flush


# -- full zones -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["write", "write_durable"])
async def test_a_write_into_allocated_space_that_finds_none_is_made_again(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a file system that copies on write: nobody is put out, everybody waits, nothing is lost."""
    monkeypatch.setattr("objstore.log.lane.FULL_RETRY_SECONDS", 0.01)
    env = make_env(2)
    membership = join(env)
    async with writer_on(env, place=placed(env, 2)) as writer:
        await written(writer, 1)
        full = True

        def fault(called: str, name: str) -> None:
            if full and called in ("write", "write_durable"):
                raise NoSpace("the zone is full")

        backend_of(env, 1).fault = fault
        if call == "write":  # made again together with what came behind it
            await put(writer, 2)
            writer.cut()
            await turns()
        await put(writer, 3)
        flush = asyncio.create_task(writer.flush())
        await turns(500)
        assert not flush.done()
        assert lbas_in(env, 0)[-1] == 3
        full = False
        await flush
        assert lbas_in(env, 1) == lbas_in(env, 0)
        assert membership.in_service == {0, 1}


async def test_a_write_that_is_made_again_for_want_of_space_is_no_sign_of_slowness(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Although it has been owed since before the first attempt, whatever moment the watch looks at."""
    monkeypatch.setattr("objstore.log.lane.FULL_RETRY_SECONDS", 0.001)
    env = make_env(2)
    join(env)
    async with writer_on(env, place=placed(env, 2)) as writer:
        await written(writer, 1)
        attempts = 0

        def fault(called: str, name: str) -> None:
            nonlocal attempts
            if called == "write_durable" and attempts < 3:
                attempts += 1
                executor_of(env).hold(1)
                raise NoSpace("the zone is full")

        backend_of(env, 1).fault = fault
        await put(writer, 2)
        flush = asyncio.create_task(writer.flush())
        seen = []
        while attempts < 3:
            await asyncio.sleep(0)
            if executor_of(env).waiting(1):
                if attempts:
                    seen.append(writer.owed_since(1, 1.0 + attempts))
                executor_of(env).release(1)
        await asyncio.sleep(0)
        executor_of(env).release(1)
        await flush
        assert seen
        assert set(seen) == {None}


async def test_a_seal_stays_behind_its_records_when_they_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few of them the next job takes."""
    monkeypatch.setattr("objstore.log.lane.FULL_RETRY_SECONDS", 0.01)
    env = make_env(1)
    async with writer_on(env) as writer:
        await written(writer, 1)
        name = open_segment(writer).name
        await turns()  # the next segment is made
        backend = backend_of(env, 0)
        executor_of(env).hold(0)
        for lba in range(1, 5):  # the first is handed over alone, the others and the seal together
            await put(writer, lba)
            writer.cut()
        writer.finish_segment()
        executor_of(env).step(0)

        def fault(call: str, name: str) -> None:
            if call in ("write", "write_durable"):
                raise NoSpace("the zone is full")

        backend.fault = fault
        executor_of(env).step(0)
        backend.fault = lambda call, name: None
        assert backend.calls[-1][:2] == ("write", name), "the first one is there"
        backend.calls.clear()
        monkeypatch.setattr("objstore.log.lane.JOB_BYTES_MAX", 1)
        executor_of(env).release(0)
        await writer.sealed_below(1)
        calls = [(call, offset) for call, found, offset in backend.calls if found == name]
        *body, seal = [offset for call, offset in calls if call in ("write", "write_durable")]
        assert len(body) == 3
        assert body == sorted(body)
        assert seal > body[-1]
        assert calls[-3:] == [("write", seal), ("truncate", seal + BLOCK_BYTES), ("sync", 0)]


async def test_segments_go_elsewhere_when_a_zone_is_full_and_others_are_not() -> None:
    env = make_env(3)
    async with writer_on(env, place=placed(env, 2)) as writer:
        writer.elsewhere = lambda number, full: tuple(sorted(env.in_service - full))[:2]
        await written(writer, 1)
        backend_of(env, 1).storage.capacity_bytes = 0
        await fill(writer, 400)
        await writer.flush()
        assert open_segment(writer).zones == (0, 2)
        backend_of(env, 2).storage.capacity_bytes = 0
        with pytest.raises(NoSpace):
            await fill(writer, 400)


async def test_a_sync_that_finds_no_space_is_not_made_again() -> None:
    env = make_env(2)
    membership = join(env)
    async with writer_on(env, place=placed(env, 2)) as writer:
        await written(writer, 1)

        def fault(call: str, name: str) -> None:
            if call == "sync":
                raise NoSpace("the zone is full")

        backend_of(env, 1).fault = fault
        await put(writer, 2)
        writer.cut()
        await turns()
        await put(writer, 3)
        await writer.flush()
        assert membership.in_service == {0}


# -- bounds -----------------------------------------------------------------------------------------------------------


async def test_segments_that_are_not_sealed_durably_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments are made, and one zone takes no records: writes wait, and so does collection."""
    monkeypatch.setattr("objstore.log.lane.FULL_RETRY_SECONDS", 0.01)
    env = make_env(2, settings=StoreSettings(segment_bytes=256 * KIB, dirty_age_seconds=60.0, dirty_bytes_max=64 * MIB))
    async with writer_on(env) as writer:
        await written(writer, 1)
        backend = backend_of(env, 1)

        def fault(call: str, name: str) -> None:
            if call == "write" and backend.calls[-1][:2] != ("create", name):
                raise NoSpace("the zone is full")

        backend.fault = fault
        backlog = asyncio.create_task(fill(writer, 4000))
        await turns(3000)
        assert not backlog.done()
        assert len(writer.unsealed) == UNSEALED_MAX
        assert writer._prepared, "it is not for want of a segment"
        assert (writer.room(16, whole=True), writer.batch_room(160), writer.room_for_batch(16)) == (0, 0, False)
        backend.fault = lambda call, name: None
        await backlog
        await writer.flush()


async def fill(writer: LogWriter, blocks: int) -> None:
    for lba in range(0, blocks, 16):
        await put(writer, lba, 16)


async def test_seals_become_durable_without_a_flush_when_many_are_not() -> None:
    env = make_env(2, settings=StoreSettings(segment_bytes=256 * KIB, dirty_age_seconds=60.0, dirty_bytes_max=64 * MIB))
    async with writer_on(env) as writer:
        await fill(writer, 4000)
        await turns()
        assert len(writer.unsealed) <= 5


async def test_a_record_counts_with_the_memory_that_it_holds() -> None:
    env = make_env(1, settings=StoreSettings(segment_bytes=4 * MIB, dirty_age_seconds=60.0))
    async with writer_on(env) as writer:
        executor_of(env).hold()
        await put(writer, 1)
        await writer.flush()
        executor_of(env).hold(0)
        await put(writer, 1, 3)
        writer.cut()
        assert env.dirty_bytes == 4 * BLOCK_BYTES, "small records leave their buffer"
        await put(writer, 1, 40)
        writer.cut()
        assert env.dirty_bytes == 4 * BLOCK_BYTES + BUFFER_BYTES
        executor_of(env).release(0)
        await writer.flush()
        assert env.dirty_bytes == 0


async def test_an_idle_log_gives_its_segments_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("objstore.log.writer.IDLE_SECONDS", 0.02)
    env = make_env(2, settings=StoreSettings(segment_bytes=256 * KIB, dirty_age_seconds=0.05))
    async with writer_on(env) as writer:
        await put(writer, 1)
        first = open_segment(writer)
        async with asyncio.timeout(30):
            await eventually(lambda: not writer.unsealed)
        assert first.sealed
        await turns()
        for zone in (0, 1):
            assert list(backend_of(env, zone).storage.objects) == [first.name], "only what holds data is left"
            assert first.file_bytes < 256 * KIB
        await written(writer, 2)
        assert lbas_in(env, 0) == [1, 2]


async def test_a_log_in_use_keeps_its_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("objstore.log.writer.IDLE_SECONDS", 60.0)
    env = make_env(1, settings=StoreSettings(segment_bytes=256 * KIB, dirty_age_seconds=0.05))
    async with writer_on(env) as writer:
        await put(writer, 1)
        first = open_segment(writer)
        writer._aged()
        idle = writer.position
        await put(writer, 2)
        writer._idle(idle)
        assert writer.segment is first
        await writer.flush()

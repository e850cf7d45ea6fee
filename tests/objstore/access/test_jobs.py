"""Allocation and jobs, in this process and behind a server."""

import asyncio
import random
from pathlib import Path

import pytest

import objstore
from objstore import Connection, Extent, InvalidRequest, NotFound, OutOfRange, VdiHandle

KIB, MIB = 1 << 10, 1 << 20
SIZE = 8 * MIB


async def states(vdi: VdiHandle) -> list[tuple[int, str]]:
    return [
        (extent.length_bytes, "hole" if extent.hole else "zero" if extent.zero else "data")
        async for extent in vdi.map()
    ]


async def allocated(store: Connection, *arguments: int) -> objstore.JobStatus:
    job = await store.allocate("disk", *arguments)
    return await store.wait_for_job(job.job_id)


async def test_holes_become_reserved_zeros_and_nothing_else_changes(store: Connection, vdi: VdiHandle) -> None:
    data = random.Random(1).randbytes(64 * KIB)
    for at in range(0, 4 * MIB, 256 * KIB):
        await vdi.write(at, data)
    before = await vdi.read(0, SIZE)
    done = await allocated(store, 100 * KIB + 5, 5 * MIB)
    assert (done.state, done.bytes_done, done.bytes_total) == ("done", 5 * MIB, 5 * MIB)
    assert done.repeat_offset_bytes == 100 * KIB + 5 + 5 * MIB
    assert await vdi.read(0, SIZE) == before
    found = await states(vdi)
    assert found[:3] == [(64 * KIB, "data"), (36 * KIB, "hole"), (156 * KIB, "zero")]
    assert [state for _, state in found].count("hole") == 2
    assert found[-1] == (SIZE - 5 * MIB - 104 * KIB, "hole")
    await allocated(store)
    assert "hole" not in {state for _, state in await states(vdi)}
    assert await vdi.read(0, SIZE) == before


async def test_no_write_that_comes_meanwhile_is_lost(store: Connection, vdi: VdiHandle) -> None:
    job = await store.allocate("disk")
    dice = random.Random(1)
    model = bytearray(SIZE)
    for _ in range(200):
        at = dice.randrange(SIZE // 4096) * 4096
        model[at : at + 4096] = dice.randbytes(4096)
        await vdi.write(at, model[at : at + 4096], writeback=True)
    assert (await store.wait_for_job(job.job_id)).state == "done"
    assert await vdi.read(0, SIZE) == model
    assert "hole" not in {state for _, state in await states(vdi)}


async def test_a_job_on_nothing_and_on_what_is_not_there(store: Connection, vdi: VdiHandle) -> None:
    assert (await allocated(store, SIZE)).state == "done"
    with pytest.raises(OutOfRange):
        await store.allocate("disk", 0, SIZE + 1)
    with pytest.raises(InvalidRequest):
        await store.allocate("disk", -1, 1)
    with pytest.raises(NotFound):
        await store.allocate("other")
    for work in (store.job(99), store.wait_for_job(99), store.abort_job(99)):
        with pytest.raises(NotFound, match="no job 99"):
            await work


async def test_an_aborted_job_says_from_where_it_can_be_repeated(store: Connection) -> None:
    await store.create("disk", 1 << 44)
    job = await store.allocate("disk", 0, 1 << 43)  # more than any zone has
    ended = await store.wait_for_job(job.job_id)
    assert (ended.state, ended.bytes_done, ended.repeat_offset_bytes) == ("failed", 0, 0)
    assert "the zones can't hold it" in ended.message
    with pytest.raises(InvalidRequest, match="does not run: it is failed"):
        await store.abort_job(job.job_id)


async def test_abort_several_at_once_and_restart(zones: list[Path]) -> None:
    async with objstore.connect(zones, create=True) as store:
        assert isinstance(store, objstore.access.local.LocalConnection)
        await store.create("disk", SIZE)
        gate = asyncio.Semaphore(0)

        async def step(offset: int, length: int) -> int:
            if offset:
                await gate.acquire()
            return 4096

        jobs = [await store.store.jobs.start("allocate", "disk", 0, SIZE, step) for _ in range(3)]
        assert [job.state async for job in store.jobs()] == ["running"] * 3
        aborting = asyncio.create_task(store.abort_job(jobs[0].job_id))
        while (await store.job(jobs[2].job_id)).bytes_done < 4096:  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0)
        for _ in jobs:
            gate.release()
        ended = await aborting
        assert (ended.state, ended.bytes_total) == ("aborted", SIZE)
        assert ended.repeat_offset_bytes == ended.bytes_done > 0
        closing = asyncio.create_task(store.close())
        await asyncio.sleep(0)
        gate.release()
        gate.release()
        await closing
    async with objstore.connect(zones) as store:
        found = [job async for job in store.jobs()]
        assert [job.state for job in found] == ["aborted", "interrupted", "interrupted"]
        assert all(0 < job.bytes_done <= SIZE for job in found)
        assert all(job.repeat_offset_bytes == job.bytes_done for job in found)
        assert (await store.create("other", MIB)).name == "other"
        again = await store.allocate("other")
        assert again.job_id == 4
        assert (await store.wait_for_job(again.job_id)).state == "done"


async def test_deleting_the_vdi_ends_its_job(store: Connection) -> None:
    await store.create("disk", 1 << 30)
    job = await store.allocate("disk")
    await store.delete("disk")
    ended = await store.wait_for_job(job.job_id)
    assert ended.state in ("failed", "done")
    assert ended.state == "done" or "deleted" in ended.message


async def test_a_reserved_extent_is_what_a_client_sees(store: Connection, vdi: VdiHandle) -> None:
    await allocated(store, 0, 4096)
    assert [extent async for extent in vdi.map(0, 8192)] == [Extent(4096, False, True), Extent(4096, True, True)]


async def test_a_clone_is_flattened(store: Connection, vdi: VdiHandle) -> None:
    data = random.Random(2).randbytes(3 * MIB)
    await vdi.write(MIB, data)
    await store.create_snapshot("disk", "s")
    with pytest.raises(InvalidRequest, match="no clone"):
        await store.flatten("disk")
    await store.clone("disk@s", "clone")
    async with store.open("clone") as clone:
        await clone.write(MIB + 5, b"own")
        job = await store.wait_for_job((await store.flatten("clone")).job_id)
        assert (job.kind, job.state, job.bytes_done) == ("flatten", "done", SIZE)
        assert (await store.info("clone")).parent == ""
        await store.delete_snapshot("disk@s")
        await vdi.close()
        await store.delete("disk")
        assert await clone.read(MIB, 3 * MIB) == data[:5] + b"own" + data[8:]

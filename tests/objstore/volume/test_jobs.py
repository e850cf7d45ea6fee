"""How long jobs are kept, and what the check takes for one."""

import asyncio
from typing import Any

import pytest

from objstore.check.catalog import Catalog as CheckedCatalog
from objstore.check.layout import Damaged
from objstore.errors import InvalidRequest
from objstore.format.catalog import Entry, JobEntry
from objstore.volume.catalog import JOB_KEPT_SECONDS, CatalogState
from tests.objstore.volume.test_snapshots import make, store_of, world
from tests.support.stepping import World

__all__ = ["world"]


def entry(job_id: int, noted: float, state: str = "done") -> JobEntry:
    return JobEntry(
        job_id=job_id,
        kind="allocate",
        vdi="disk",
        offset_bytes=0,
        length_bytes=10,
        state=state,
        started=1.0,
        noted=noted,
        bytes_done=10,
    )


def test_jobs_are_forgotten_after_a_day_and_their_numbers_are_not_given_again() -> None:
    state = CatalogState()
    state.apply(entry(7, 1000.0))
    state.apply(entry(8, 1000.0 + JOB_KEPT_SECONDS - 1))
    assert sorted(state.jobs) == [7, 8]
    state.apply(entry(9, 1000.0 + JOB_KEPT_SECONDS))
    assert sorted(state.jobs) == [8, 9]
    again = CatalogState(state.snapshot())
    assert again.jobs == state.jobs
    assert again.next_job == 10


async def test_a_job_that_has_ended_is_not_aborted_while_that_is_recorded(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_of(world)
    await make(world, size=1 << 20)
    recorded = asyncio.Event()
    commit = store.catalog.commit

    async def slow(*entries: Entry) -> None:
        if any(isinstance(one, JobEntry) and one.state != "running" for one in entries):
            await recorded.wait()
        await commit(*entries)

    monkeypatch.setattr(store.catalog, "commit", slow)
    job = await store.allocate("disk")
    while store.jobs.get(job.job_id).state == "running":  # noqa: ASYNC110 - nothing tells of it
        await asyncio.sleep(0)
    with pytest.raises(InvalidRequest, match="does not run: it is done"):
        await store.jobs.abort(job.job_id)
    recorded.set()
    assert (await store.jobs.wait(job.job_id)).state == "done"


def test_the_check_knows_them() -> None:
    job: dict[str, Any] = {
        "type": "job", "job_id": 1, "kind": "allocate", "vdi": "disk", "offset_bytes": 0, "length_bytes": 5,
        "state": "running", "started": 1.0, "noted": 2.0, "bytes_done": 5,
    }  # fmt: skip
    CheckedCatalog().apply(job)
    for wrong in ({"job_id": 0}, {"bytes_done": 6}, {"state": "odd"}, {"noted": "x"}, {"vdi": 1}, {"kind": None}):
        with pytest.raises(Damaged):
            CheckedCatalog().apply({**job, **wrong})

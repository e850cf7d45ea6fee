"""Jobs: work on ranges of VDIs that may take long. Recorded in the catalog, so that others can follow, abort and, after
the end of the process, see how far they came."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

import msgspec

from objstore.clock import Clock
from objstore.errors import InvalidRequest, NotFound, Stopping, StoreError
from objstore.format.catalog import JobEntry
from objstore.volume.catalog import JOB_KEPT_SECONDS, Catalog
from objstore.volume.status import JobStatus

log = logging.getLogger(__name__)

NOTE_SECONDS: Final = 5.0
"""How often a running job's progress is recorded."""

Step = Callable[[int, int], Awaitable[int]]
"""step(offset_bytes, length_bytes): does the beginning of that range; how many bytes that was, at least one."""


class _Running(NamedTuple):
    task: asyncio.Task[None]
    began: float


class Jobs:
    """The jobs of a store. Touched by the event loop only.

    `_entries`: what is known of the jobs of this process, newer than the catalog's records of them.
    """

    def __init__(self, catalog: Catalog, clock: Clock, loop: asyncio.AbstractEventLoop) -> None:
        self._catalog = catalog
        self._clock = clock
        self._loop = loop
        self._entries: dict[int, JobEntry] = {}
        self._running: dict[int, _Running] = {}
        self._abort: set[int] = set()
        self._closed = False

    async def start(
        self,
        kind: str,
        vdi: str,
        offset_bytes: int,
        length_bytes: int,
        step: Step,
        *,
        finish: Callable[[], Awaitable[None]] | None = None,
        ended: Callable[[], None] | None = None,
    ) -> JobStatus:
        """Record a job and begin it. step: called again and again for what is left of the range. finish: what is to be
        done behind the last step. ended: called when the job does not run any more, however it ended; not if this
        raises."""
        if self._closed:
            raise Stopping("the store is closing")
        state = self._catalog.state
        now = self._clock.wall()
        entry = JobEntry(
            job_id=state.next_job,
            kind=kind,
            vdi=vdi,
            offset_bytes=offset_bytes,
            length_bytes=length_bytes,
            state="running",
            started=now,
            noted=now,
            bytes_done=0,
        )
        state.next_job += 1
        await self._catalog.commit(entry)
        if self._closed:
            raise Stopping("the store is closing")
        self._entries[entry.job_id] = entry
        task = self._loop.create_task(self._work(entry, step, finish))
        if ended is not None:
            over = ended
            task.add_done_callback(lambda _: over())
        self._running[entry.job_id] = _Running(task, self._clock.monotonic())
        return self.get(entry.job_id)

    async def _work(self, entry: JobEntry, step: Step, finish: Callable[[], Awaitable[None]] | None) -> None:
        done, noted = 0, self._clock.monotonic()
        state, message = "done", ""
        try:
            while done < entry.length_bytes:
                if entry.job_id in self._abort:
                    state = "aborted"
                    break
                if self._closed:
                    state = "running"  # with nobody to run it: the next process calls it interrupted
                    break
                done += await step(entry.offset_bytes + done, entry.length_bytes - done)
                self._note(entry.job_id, done)
                await asyncio.sleep(0)  # a step may find nothing to wait for
                if self._clock.monotonic() - noted > NOTE_SECONDS:
                    noted = self._clock.monotonic()
                    await self._catalog.commit(self._entries[entry.job_id])
            if state == "done" and finish is not None:
                await finish()
        except StoreError as error:
            state, message = "failed", str(error)
        self._note(entry.job_id, done, state, message)
        try:
            await self._catalog.commit(self._entries[entry.job_id])
        except StoreError as error:
            log.warning("the end of job %d could not be recorded: %s", entry.job_id, error)
        self._abort.discard(entry.job_id)
        del self._running[entry.job_id]

    def _note(self, job_id: int, done: int, state: str = "running", message: str = "") -> None:
        self._entries[job_id] = msgspec.structs.replace(
            self._entries[job_id], bytes_done=done, state=state, message=message, noted=self._clock.wall()
        )

    def list(self) -> list[JobStatus]:
        """Jobs that run, and those of the last day, oldest first."""
        known = self._catalog.state.jobs | self._entries
        oldest = self._clock.wall() - JOB_KEPT_SECONDS
        return [self.get(i) for i in sorted(known) if i in self._running or known[i].noted > oldest]

    def get(self, job_id: int) -> JobStatus:
        """One of them. NotFound."""
        entry = self._entries.get(job_id) or self._catalog.state.jobs.get(job_id)
        if entry is None:
            raise NotFound(f"there is no job {job_id}, or it ended more than a day ago")
        running = self._running.get(job_id)
        left: float | None = None
        if running is not None and entry.bytes_done:
            elapsed = self._clock.monotonic() - running.began
            left = elapsed * (entry.length_bytes - entry.bytes_done) / entry.bytes_done
        return JobStatus(
            job_id=job_id,
            kind=entry.kind,
            vdi=entry.vdi,
            state="interrupted" if entry.state == "running" and running is None else entry.state,
            message=entry.message,
            started=entry.started,
            noted=self._clock.wall() if running is not None else entry.noted,
            seconds_left=left,
            bytes_done=entry.bytes_done,
            bytes_total=entry.length_bytes,
            repeat_offset_bytes=entry.offset_bytes + entry.bytes_done,
        )

    async def wait(self, job_id: int) -> JobStatus:
        """Return when it does not run any more. NotFound."""
        running = self._running.get(job_id)
        if running is not None:
            await asyncio.wait([running.task])
        return self.get(job_id)

    async def abort(self, job_id: int) -> JobStatus:
        """Make it end at its next step, and wait for that. NotFound; InvalidRequest: it does not run."""
        # One that has ended may still be recording it.
        if job_id not in self._running or self._entries[job_id].state != "running":
            raise InvalidRequest(f"job {job_id} does not run: it is {self.get(job_id).state}")
        self._abort.add(job_id)
        return await self.wait(job_id)

    async def close(self) -> None:
        """Let every job end at its next step; how far they came is recorded."""
        self._closed = True
        if self._running:
            await asyncio.wait([running.task for running in self._running.values()])

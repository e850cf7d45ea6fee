"""Jobs: `vdi allocate`, `vdi flatten`, and `job list|follow|abort` from any terminal."""

import argparse
import sys
from typing import Final

from nbdserver.cli_output import job_table, print_json
from objstore.access.blocking import BlockingConnection
from objstore.errors import StoreError
from objstore.volume.status import JobStatus

POLL_SECONDS: Final = 0.2


def allocate(store: BlockingConnection, arguments: argparse.Namespace) -> None:
    """`vdi allocate`."""
    _see_through(store, store.allocate(arguments.name, arguments.offset, arguments.length), arguments)


def flatten(store: BlockingConnection, arguments: argparse.Namespace) -> None:
    """`vdi flatten`."""
    _see_through(store, store.flatten(arguments.name), arguments)


def _see_through(store: BlockingConnection, job: JobStatus, arguments: argparse.Namespace) -> None:
    """Wait for the end of a job, unless a server goes on with it and `--detach` says so. Ctrl-C aborts it."""
    if not (arguments.detach and not store.in_process):
        try:
            job = _follow(store, job.job_id)
        except KeyboardInterrupt:
            if store.job(job.job_id).state == "running":
                store.abort_job(job.job_id)
            raise
    _show(job, as_json=arguments.json)


def job(store: BlockingConnection, arguments: argparse.Namespace) -> None:
    """`job list|follow|abort`."""
    if arguments.job_command == "list":
        jobs = list(store.jobs())
        if arguments.json:
            print_json(jobs)
        else:
            print(job_table(jobs))
    elif arguments.job_command == "follow":
        _show(_follow(store, arguments.job_id), as_json=arguments.json)
    else:
        ended = store.abort_job(arguments.job_id)
        if arguments.json:
            print_json(ended)
        else:
            print(job_table([ended]))


def _show(job: JobStatus, *, as_json: bool) -> None:
    if as_json:
        print_json(job)
    else:
        print(job_table([job]))
    if job.state not in ("running", "done"):
        reason = f": {job.message}" if job.message else ""
        raise StoreError(
            f"job {job.job_id} on {job.vdi} is {job.state} after {job.bytes_done} of {job.bytes_total} bytes{reason}; "
            f"it can be repeated from offset {job.repeat_offset_bytes}"
        )


def _follow(store: BlockingConnection, job_id: int) -> JobStatus:
    """Wait for its end, with a bar on a terminal."""
    if not sys.stderr.isatty():
        return store.wait_for_job(job_id)
    from tqdm import tqdm

    job = store.job(job_id)
    with tqdm(
        desc=f"{job.kind} {job.vdi}", total=job.bytes_total, unit="B", unit_scale=True, unit_divisor=1024, leave=False
    ) as bar:
        while job.state == "running":
            bar.n = job.bytes_done
            bar.refresh()
            store.wait(POLL_SECONDS)
            job = store.job(job_id)
    return job

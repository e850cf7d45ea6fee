"""Run fio's nbd engine once and read its JSON."""

import json
import subprocess
from dataclasses import dataclass
from typing import Any, Final

from tests.bench.cases import FioCase
from tests.bench.servers import Server

PATIENCE_SECONDS: Final = 900
BASE: Final = {
    "name": "bench",
    "ioengine": "nbd",
    "output-format": "json",
    "group_reporting": "1",
    "norandommap": "1",
    "randrepeat": "0",
    "percentile_list": "50:99:99.9",
}


@dataclass(frozen=True)
class Measurement:
    """One run of fio. Latencies are from sending a request to its answer, of a mixed load those of the slower
    direction; cpu is the server's."""

    requests_per_second: float
    bytes_per_second: float
    requests: int
    flushes: int
    p50_seconds: float
    p99_seconds: float
    cpu_seconds_per_request: float
    all_requests_per_second: float
    """In both directions."""

    def value(self, case: FioCase) -> float:
        return self.bytes_per_second / 1e6 if case.in_megabytes else self.requests_per_second


@dataclass(frozen=True)
class TlsClient:
    """Use TLS. prefix: the words in front of `fio` that let libnbd find certificates."""

    prefix: list[str]


def run(server: Server, options: dict[str, str], tls: TlsClient | None = None) -> Measurement:
    """Load a running server; raises RuntimeError with fio's words if it fails."""
    uri = server.uri if tls is None else server.uri.replace("nbd+unix", "nbds+unix", 1)
    arguments = [f"--{key}={value}" for key, value in {**BASE, "uri": uri, **options}.items()]
    cpu_before = server.cpu_seconds()
    finished = subprocess.run(
        [*(tls.prefix if tls is not None else ()), "fio", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    cpu = server.cpu_seconds() - cpu_before
    # The engine prints a line of its own before the JSON.
    report = finished.stdout[finished.stdout.find("{\n") :]
    if finished.returncode or not report:
        raise RuntimeError(f"fio against {server.kind.name}: {finished.stderr or finished.stdout}")
    job: dict[str, Any] = json.loads(report)["jobs"][0]
    directions = [job[name] for name in ("write", "read") if job[name]["total_ios"]]
    direction = directions[0]
    percentiles = max((each["clat_ns"]["percentile"] for each in directions), key=lambda found: found["99.000000"])
    requests = direction["total_ios"]
    return Measurement(
        requests_per_second=requests / (direction["runtime"] / 1e3),
        bytes_per_second=direction["io_bytes"] / (direction["runtime"] / 1e3),
        requests=requests,
        flushes=job["sync"]["total_ios"],
        p50_seconds=percentiles["50.000000"] / 1e9,
        p99_seconds=percentiles["99.000000"] / 1e9,
        cpu_seconds_per_request=cpu / requests,
        all_requests_per_second=sum(each["total_ios"] / (each["runtime"] / 1e3) for each in directions),
    )


def run_case(server: Server, case: FioCase, seconds: float) -> Measurement:
    """One point of a case."""
    options = {**case.options, "size": str(server.size_bytes)}
    if case.turns:
        options["io_size"] = str(case.turns * server.size_bytes)
    elif not case.whole_export:
        options |= {"time_based": "1", "runtime": f"{max(1, round(seconds * 1000))}ms"}
    return run(server, options)

"""The cases about copies: scrub against a plain loop, recovery against cp, a store with one zone down."""

import os
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from crc32c import crc32c

from nbdserver.control_client import ControlClient
from tests.bench import fio
from tests.bench.servers import ZONES, Server

CHUNK_BYTES: Final = 1 << 20
POLL_SECONDS: Final = 0.02
SELDOM_SECONDS: Final = 0.5
"""Between questions to a server whose clients are timed: an answer takes its event loop a millisecond."""
FILL: Final = {"rw": "write", "bs": "1m", "iodepth": "8", "end_fsync": "1"}
READ: Final = {"rw": "randread", "bs": "4k", "iodepth": "4"}
WRITE: Final = {"rw": "randwrite", "bs": "4k", "iodepth": "32"}
LIGHT: Final = {"rw": "randrw", "bs": "4k", "iodepth": "4", "rate_iops": "1000,1000"}


@dataclass(frozen=True)
class BesideResult:
    """Work in the background against the same work of a plain tool, and what it does to clients.

    rates, peer_rates: bytes a second of each round. alone, beside: p99 in seconds of a light load, without and with the
    work going on all the time. beside_rates: bytes a second of the work meanwhile.
    """

    rates: list[float]
    peer_rates: list[float]
    alone: list[float]
    beside: list[float]
    beside_rates: list[float]

    @property
    def ratio(self) -> float:
        return statistics.median(self.rates) / statistics.median(self.peer_rates)

    @property
    def p99_ratio(self) -> float:
        return statistics.median(self.beside) / statistics.median(self.alone)


@dataclass(frozen=True)
class DegradedResult:
    """Requests a second with all zones and with one of them away."""

    healthy: dict[str, list[float]]
    degraded: dict[str, list[float]]

    def ratio(self, load: str) -> float:
        return statistics.median(self.degraded[load]) / statistics.median(self.healthy[load])


def control(server: Server) -> ControlClient:
    return ControlClient(f"{server.socket}.control")


def filled(server: Server) -> None:
    server.wipe()
    server.start()
    fio.run(server, {**FILL, "size": str(server.size_bytes)})
    server.flush()
    settle(server)


def settle(server: Server) -> None:
    subprocess.run(["sync", "-f", str(server.data)], check=True)


def files(folders: list[Path]) -> Iterator[Path]:
    """Sealed segments and checkpoints: what scrub reads too."""
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.relative_to(folder).parts[0] in ("log", "checkpoint"):
                yield path


def forget(folders: list[Path]) -> None:
    """Out of the page cache with them."""
    for path in files(folders):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def plain_loop(folders: list[Path]) -> float:
    """Bytes a second of reading and checksumming the files one after the other."""
    buffer = memoryview(bytearray(CHUNK_BYTES))
    total = 0
    began = time.monotonic()
    for path in files(folders):
        with path.open("rb", buffering=0) as file:
            crc = 0
            while count := file.readinto(buffer):
                crc = crc32c(buffer[:count], crc)
                total += count
    return total / (time.monotonic() - began)


def scrub_once(server: Server) -> float:
    """Bytes a second of a pass that was asked for."""
    client = control(server)
    try:
        began = time.monotonic()
        client.start_scrub()
        while client.scrub_status().running:
            time.sleep(POLL_SECONDS)
        seconds = time.monotonic() - began
        status = client.scrub_status()
        if status.copies_bad:
            raise RuntimeError(f"scrub found {status.copies_bad} bad copies")
        return status.bytes_done / seconds
    finally:
        client.close()


def p99(server: Server, seconds: float) -> float:
    """Of reads and writes at a fixed rate, of those that are slower."""
    runtime = {"time_based": "1", "runtime": f"{round(seconds)}s"}
    return fio.run(server, {**LIGHT, **runtime, "size": str(server.size_bytes)}).p99_seconds


def warm(server: Server) -> None:
    """What reads need is in the page cache, as it is on a server that has run for a while."""
    fio.run(server, {"rw": "read", "bs": "1m", "iodepth": "8", "size": str(server.size_bytes)})


class _Scrubbing(threading.Thread):
    """One pass after the other, until `end`; `bytes_done` of all of them."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self.bytes_done = 0
        self._client = control(server)
        self._ended = threading.Event()
        self._client.start_scrub()

    def run(self) -> None:
        done = 0
        while not self._ended.wait(SELDOM_SECONDS):
            status = self._client.scrub_status()
            if not status.running:
                self.bytes_done += status.bytes_total
                self._client.start_scrub()
            done = status.bytes_done if status.running else 0
        self.bytes_done += done

    def end(self) -> None:
        self._ended.set()
        self.join()
        while self._client.scrub_status().running:
            time.sleep(POLL_SECONDS)
        self._client.close()


def scrub(server: Server, rounds: int, seconds: float) -> BesideResult:
    """A pass over everything against a plain loop over the same files, neither of them in the page cache."""
    filled(server)
    folders = [server.data / zone for zone in ZONES]
    result = BesideResult([], [], [], [], [])
    for number in range(rounds):
        for ours in (True, False) if number % 2 else (False, True):
            forget(folders)
            if ours:
                result.rates.append(scrub_once(server))
            else:
                result.peer_rates.append(plain_loop(folders))
    warm(server)
    for number in range(rounds):
        for beside in (True, False) if number % 2 else (False, True):
            if not beside:
                result.alone.append(p99(server, seconds))
                continue
            scrubbing = _Scrubbing(server)
            scrubbing.start()
            began = time.monotonic()
            result.beside.append(p99(server, seconds))
            took = time.monotonic() - began
            scrubbing.end()
            result.beside_rates.append(scrubbing.bytes_done / took)
    server.stop()
    return result


def recovery(server: Server, rounds: int, seconds: float) -> BesideResult:
    """A zone is lost and a new one takes its place, against `cp -r` of the lost zone and a sync."""
    filled(server)
    result = BesideResult([], [], [], [], [])
    zone = server.data / ZONES[2]
    for number in range(rounds):
        for ours in (True, False) if number % 2 else (False, True):
            if ours:
                new = server.data / f"new-{number}"
                _lose(server, zone)
                result.rates.append(_replace(server, zone, new))
                zone = new
                settle(server)
            else:
                server.stop()
                result.peer_rates.append(_copy(server, zone))
    for number in range(rounds):
        server.stop()
        server.start()
        server.flush()
        warm(server)
        result.alone.append(p99(server, seconds))
        new = server.data / f"beside-{number}"
        _lose(server, zone)
        server.flush()
        warm(server)
        with closing(control(server)) as client:
            _begin_replacing(client, zone, new)
            before, began = client.recovery_status().bytes_done, time.monotonic()
            result.beside.append(p99(server, seconds))
            status = client.recovery_status()
            result.beside_rates.append((status.bytes_done - before) / (time.monotonic() - began))
            if not status.running:
                raise RuntimeError("the recovery had ended before the load: give a larger --size")
            _recovered(server, client)
        zone = new
    server.stop()
    return result


def _lose(server: Server, zone: Path) -> None:
    """The server runs, without that zone; what it reads from others is not in the page cache."""
    server.stop()
    shutil.rmtree(zone)
    forget([folder for folder in server.data.iterdir() if folder.is_dir()])
    server.start()


def _copy(server: Server, zone: Path) -> float:
    """Bytes a second of `cp -r` and a sync."""
    aside = server.data / "aside"
    forget([zone])
    began = time.monotonic()
    subprocess.run(["cp", "-r", str(zone), str(aside)], check=True)
    settle(server)
    seconds = time.monotonic() - began
    copied = sum(path.stat().st_size for path in files([aside]))
    shutil.rmtree(aside)
    settle(server)
    return copied / seconds


def _begin_replacing(client: ControlClient, lost: Path, new: Path) -> None:
    """Return when recovery knows what to copy."""
    new.mkdir()
    client.change_zones("replace", str(lost), path=str(new))
    while not client.recovery_status().bytes_total:
        time.sleep(POLL_SECONDS)


def _recovered(server: Server, client: ControlClient) -> int:
    """Bytes that recovery has copied by its end, a sync included."""
    while (status := client.recovery_status()).running:
        time.sleep(POLL_SECONDS)
    if status.copies_missing or status.problems:
        raise RuntimeError(f"recovery did not end well: {status}")
    settle(server)
    return status.bytes_done


def _replace(server: Server, lost: Path, new: Path) -> float:
    """Bytes a second from the first copy that recovery makes to its end, a sync included."""
    with closing(control(server)) as client:
        _begin_replacing(client, lost, new)
        began = time.monotonic()
        return _recovered(server, client) / (time.monotonic() - began)


def degraded(server: Server, rounds: int, seconds: float) -> DegradedResult:
    """The same loads with three zones and with two of them."""
    filled(server)
    away = server.data / "away"
    zone = server.data / ZONES[2]
    healthy: dict[str, list[float]] = {"write": [], "read": []}
    without: dict[str, list[float]] = {"write": [], "read": []}
    for number in range(rounds):
        for gone in (True, False) if number % 2 else (False, True):
            server.stop()
            if gone:
                zone.rename(away)
            server.start()
            server.flush()
            for load, options in (("write", WRITE), ("read", READ)):
                runtime = {"time_based": "1", "runtime": f"{round(seconds)}s", "size": str(server.size_bytes)}
                result = fio.run(server, {**options, **runtime})
                (without if gone else healthy)[load].append(result.requests_per_second)
                server.flush()
                settle(server)
            if gone:
                server.stop()
                away.rename(zone)
    server.stop()
    return DegradedResult(healthy, without)

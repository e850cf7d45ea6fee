"""What metrics cost: processor time for a request with the endpoint on and scraped, against a server without it."""

import http.client
import socket
import statistics
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from tests.bench import fio
from tests.bench.cases import CPU_CASES, FIO_CASES
from tests.bench.ours import FILL
from tests.bench.servers import Kind, Server

SCRAPE_SECONDS: Final = 1.0
"""Prometheus asks every 15 to 60 s by default."""


@dataclass
class MeteredResult:
    """Processor seconds of each round for one request, by load."""

    plain: dict[str, list[float]]
    metered: dict[str, list[float]]

    def ratio(self, load: str) -> float:
        """Of the medians."""
        return statistics.median(self.metered[load]) / statistics.median(self.plain[load])

    @property
    def mean_ratio(self) -> float:
        """Geometric, over the loads."""
        return statistics.geometric_mean([self.ratio(load) for load in self.plain])


class _Scraper(threading.Thread):
    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.scrapes = 0
        self._port = port
        self._end = threading.Event()

    def run(self) -> None:
        while not self._end.wait(SCRAPE_SECONDS):
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
            connection.request("GET", "/metrics")
            self.scrapes += bool(connection.getresponse().read())
            connection.close()

    def end(self) -> None:
        self._end.set()
        self.join()


def kind(of: Kind, options: list[str], *, busy_poll: bool = False) -> Kind:
    """The same server with more options, and without busy polling, which takes whatever time is left."""

    def command(data: Path, sock: Path, size: int) -> list[str]:
        command = [*of.command(data, sock, size), *options]
        if not busy_poll:
            config = sock.with_suffix(".toml")
            config.write_text("[server]\nbusy_poll_seconds = 0.0\n")
            command += ["--config", str(config)]
        return command

    return replace(of, command=command)


def free_port() -> int:
    """A TCP port that nobody listens on just now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def compare(plain: Server, metered: Server, port: int, rounds: int, seconds: float) -> MeteredResult:
    """Both servers run all the time and are loaded in turns, another one first in every round."""
    servers = (plain, metered)
    for server in servers:
        server.wipe()
        server.start()
        fio.run(server, {**FILL, "size": str(server.size_bytes)})
    result = MeteredResult({load: [] for load in CPU_CASES}, {load: [] for load in CPU_CASES})
    scraper = _Scraper(port)
    scraper.start()
    for round_number in range(rounds):
        for load in CPU_CASES:
            case = next(case for case in FIO_CASES if case.name == load)
            for server in servers if round_number % 2 else servers[::-1]:
                if case.writes:
                    server.flush()
                    server.rest()
                point = fio.run_case(server, case, seconds)
                row = result.plain if server is plain else result.metered
                row[load].append(point.cpu_seconds_per_request)
    scraper.end()
    if not scraper.scrapes:
        raise RuntimeError("nobody answered scrapes")
    for server in servers:
        server.stop()
    return result

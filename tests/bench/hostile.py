"""What a well-behaved client gets while others attack its server, and while they attack another one."""

import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Final

from tests.bench import fio
from tests.bench.cases import FIO_CASES
from tests.bench.ours import FILL
from tests.bench.servers import REPOSITORY, Server

LOADS: Final = ("read-qd32", "write-qd32")
WARM_SECONDS: Final = 1.0
"""The attackers have used up what they may do at once by then."""


@dataclass
class HostileResult:
    """Requests per second of each round, by load, with the attackers on the client's server and on the other one."""

    attacked: dict[str, list[float]]
    spared: dict[str, list[float]]
    attempts: list[int]
    """Connections that the attackers made in each run."""

    def ratio(self, load: str) -> float:
        """Of the medians."""
        return statistics.median(self.attacked[load]) / statistics.median(self.spared[load])


def compare(server: Server, other: Server, ports: tuple[int, int], rounds: int, seconds: float) -> HostileResult:
    """ports: where both listen for the attackers. The client has a Unix socket."""
    for one in (server, other):
        one.wipe()
        one.start()
    fio.run(server, {**FILL, "size": str(server.size_bytes)})
    result = HostileResult({load: [] for load in LOADS}, {load: [] for load in LOADS}, [])
    for round_number in range(rounds):
        for load in LOADS:
            case = next(case for case in FIO_CASES if case.name == load)
            for attacked in (True, False) if round_number % 2 else (False, True):
                server.flush()
                server.rest()
                port = ports[0] if attacked else ports[1]
                command = [sys.executable, "-m", "tests.bench.attackers", str(port), str(seconds + 2 * WARM_SECONDS)]
                with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as attackers:
                    time.sleep(WARM_SECONDS)
                    point = fio.run_case(server, case, seconds)
                    rows = result.attacked if attacked else result.spared
                    rows[load].append(point.requests_per_second)
                    printed, _ = attackers.communicate()
                    result.attempts.append(int(printed))
    for one in (server, other):
        one.stop()
    return result

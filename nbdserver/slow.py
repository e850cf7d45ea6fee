"""The log of slow requests: which they were and where their time went, now and then for each export and command."""

import logging
from collections.abc import Mapping
from time import monotonic, perf_counter_ns
from typing import Final

from nbdserver.complaints import Complaints
from nbdserver.meters import COMMANDS, Counts
from objstore.stages import Stages, follow

log = logging.getLogger(__name__)

SHOWN_SECONDS_MIN: Final = 0.0005


class SlowLog:
    """Counts every slow request of a server and logs some. In the event loop only."""

    def __init__(self, counts: Counts) -> None:
        self._counts = counts
        self._complain = Complaints(log)

    def note(self, export: str, peer: object, command: int, offset: int, length: int, took: "Took") -> None:
        """A request was slow."""
        self._counts.slow_requests += 1
        self._complain(
            (export, command),
            "slow request export=%s command=%s seconds=%.3f offset=%d length=%d peer=%s: %s",
            export,
            COMMANDS[command],
            took.seconds,
            offset,
            length,
            peer,
            took,
        )


class Took:
    """How long a request took, and what it waited for. As text: the longest stage first; what none has is `else`."""

    def __init__(self, seconds: float, stages: Mapping[str, float]) -> None:
        self.seconds = seconds
        self._stages = stages

    def __str__(self) -> str:
        known = sorted(self._stages.items(), key=lambda item: -item[1])
        parts = [*known, ("else", self.seconds - sum(self._stages.values()))]
        return ", ".join(f"{name} {seconds:.3f} s" for name, seconds in parts if seconds >= SHOWN_SECONDS_MIN)


class SlowWatch:
    """Looks at the requests of one connection. limit_seconds: what takes longer is slow; 0 = nothing is."""

    def __init__(self, log: SlowLog, export: str, peer: object, limit_seconds: float) -> None:
        self.limit_seconds = limit_seconds
        self._log = log
        self._export = export
        self._peer = peer

    def begin(self) -> Stages | None:
        """Note from now on where the time of this task goes."""
        if not self.limit_seconds:
            return None
        stages = Stages(monotonic)
        follow(stages)
        return stages

    def end(self, command: int, offset: int, length: int, began: int, stages: Stages) -> None:
        """The request that was taken at `began` (perf_counter_ns) has been answered."""
        seconds = (perf_counter_ns() - began) / 1e9
        if seconds > self.limit_seconds > 0:
            self._log.note(self._export, self._peer, command, offset, length, Took(seconds, stages.seconds))

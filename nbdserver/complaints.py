"""Log lines that clients can cause as often as they like: the first at once, then a count every COMPLAINT_SECONDS."""

import asyncio
import logging
from collections.abc import Hashable
from typing import Final

COMPLAINT_SECONDS: Final = 10.0
"""Between two lines of one kind."""
KINDS_MAX: Final = 1024
"""Kinds that are remembered at once; beyond that all others share one."""


class Complaints:
    """Counts by kind. In the event loop only."""

    def __init__(self, log: logging.Logger, level: int = logging.WARNING) -> None:
        self._log = log
        self._level = level
        self._suppressed: dict[Hashable, int] = {}
        """For each kind that was logged in the last COMPLAINT_SECONDS: how often it has come up since."""

    def __call__(self, kind: Hashable, message: str, *args: object) -> None:
        """Log a message, unless one of its kind was logged a moment ago; then the next line of that kind counts it."""
        if kind not in self._suppressed and len(self._suppressed) >= KINDS_MAX:
            kind = None
        if kind in self._suppressed:
            self._suppressed[kind] += 1
            return
        self._log.log(self._level, message, *args)
        self._begin(kind, message % args)

    def _begin(self, kind: Hashable, text: str) -> None:
        self._suppressed[kind] = 0
        asyncio.get_running_loop().call_later(COMPLAINT_SECONDS, self._end, kind, text)

    def _end(self, kind: Hashable, text: str) -> None:
        suppressed = self._suppressed.pop(kind)
        if suppressed:
            self._log.log(self._level, "%s (%d more suppressed in %g s)", text, suppressed, COMPLAINT_SECONDS)
            self._begin(kind, text)

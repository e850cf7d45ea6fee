"""The case about a zone that fails under a client: how long one write + flush takes at most.

The zone that fails lies on a file system in user space that returns errors, or no answer, when it is told to; the
other two are ordinary directories. Writing and flushing one block at a time shows every moment in which the server
stands still.
"""

import errno
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from tests.bench.probe import Probe
from tests.bench.servers import EXPORT, ZONES, Server
from tests.support.powercut_control import NAMES, SYNCS, WRITES, PowerCutDisk

BLOCK_BYTES: Final = 4096
BLOCKS: Final = 4096
BEFORE_SECONDS: Final = 1.0
AFTER_SECONDS: Final = 2.0
DEADLINE_SECONDS: Final = 5.0
"""The server's default."""
ERRORS: Final = {
    "writes-fail": (WRITES, errno.EIO),
    "syncs-fail": (SYNCS, errno.EIO),
    "read-only": ((*WRITES, *NAMES), errno.EROFS),
}
HANGS: Final = {"all-hangs": ((*WRITES, *SYNCS, *NAMES, "read"), 0)}


class _Client(threading.Thread):
    """Writes a block and flushes, again and again. longest: seconds of one turn since the last `take`."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._ended = threading.Event()
        self._began = time.monotonic()
        self._longest = 0.0
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            with Probe(self._server.socket, EXPORT, timeout_seconds=60) as probe:
                number = 0
                while not self._ended.is_set():
                    self._began = time.monotonic()
                    probe.write(number * 7 % BLOCKS * BLOCK_BYTES, bytes([number % 251]) * BLOCK_BYTES)
                    probe.flush()
                    self._longest = max(self._longest, time.monotonic() - self._began)
                    number += 1
        except OSError as error:
            self.error = error

    def take(self) -> float:
        """What was longest, the turn under way not counted."""
        longest, self._longest = self._longest, 0.0
        return longest

    def end(self) -> None:
        self._ended.set()
        self.join()
        if self.error is not None:
            raise RuntimeError(f"the client saw an error: {self.error}")


def pause(server: Server, operations: Sequence[str], number: int) -> tuple[float, float]:
    """Seconds of the longest write + flush (before, after) one of three zones fails with errno `number`; 0: hangs."""
    server.stop()
    with ExitStack() as stack:
        short = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sb-")))
        disk = PowerCutDisk(short)
        stack.callback(disk.close)
        shutil.rmtree(server.data, ignore_errors=True)
        server.data.mkdir(parents=True)
        (disk.root / "zone").mkdir()
        for zone in ZONES:
            (server.data / zone).mkdir()
        (server.data / ZONES[1]).rmdir()
        (server.data / ZONES[1]).symlink_to(disk.root / "zone")
        server.start()
        stack.callback(server.kill)
        stack.callback(disk.clear)
        server.flush()
        client = _Client(server)
        client.start()
        time.sleep(BEFORE_SECONDS)
        before = client.take()
        disk.fault("zone", operations, number)
        time.sleep(AFTER_SECONDS + (0 if number else DEADLINE_SECONDS))
        client.end()
        return before, client.take()

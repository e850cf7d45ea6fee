"""The real server as a process that can be killed."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from nbdserver.control_client import ControlClient
from objstore.access.api import Status
from objstore.check.check import check_store, zones_of
from objstore.check.report import Report, Severity
from objstore.check.zones import all_locked
from objstore.errors import NotFound

REPOSITORY: Final = Path(__file__).resolve().parents[2]
OPEN_SECONDS_MAX: Final = 60.0
LOG_TAIL_BYTES: Final = 4000


class ServerEnded(Exception):
    """The server ended before it served; the message holds its last words."""


class RealServer:
    """`python -m nbdserver serve` over some zones. `start` again after `kill` or `stop`, any number of times.

    directory: for sockets and the log; must be short. listen: addresses besides its Unix socket.
    """

    def __init__(
        self,
        directory: Path,
        zones: Sequence[Path],
        vdis: Sequence[str],
        *,
        config: Path | None = None,
        listen: Sequence[str] = (),
    ) -> None:
        self.address = f"unix://{directory / 'nbd'}"
        self._vdi_count = len(vdis)
        self._zones = zones
        self._log = directory / "server.log"
        self._process: asyncio.subprocess.Process | None = None
        self.announced: list[str] = []
        """What the last process said of its exports, a line each."""
        self._command = [sys.executable, "-m", "nbdserver", "serve"]
        for address in (self.address, *listen):
            self._command += ["--listen", address]
        self._control = directory / "ctl"
        self._command += ["--control", str(self._control)]
        if config is not None:
            self._command += ["--config", str(config)]
        for zone in zones:
            self._command += ["--zone", str(zone)]
        for vdi in vdis:
            self._command += ["--vdi", vdi]

    def uri(self, export: str) -> str:
        return f"nbd+unix:///{export}?socket={self.address.removeprefix('unix://')}"

    async def start(self) -> None:
        """Return when every export is announced. ServerEnded if the server ends instead."""
        with self._log.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                cwd=REPOSITORY,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
            )
        self._process = process
        assert process.stdout is not None
        self.announced.clear()
        async with asyncio.timeout(OPEN_SECONDS_MAX):
            for _ in range(self._vdi_count):
                self.announced.append((await process.stdout.readline()).decode())
                if not self.announced[-1]:
                    code = await process.wait()
                    raise ServerEnded(f"exit code {code}: {self.last_words()}")

    def kill(self) -> None:
        """kill -9, without waiting: what runs inside a held request of a frozen disk ends only with that request."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def ended(self) -> int:
        """Wait for the process; its exit code (negative: the signal)."""
        assert self._process is not None
        process, self._process = self._process, None
        await process.wait()
        assert process.returncode is not None
        return process.returncode

    async def stop(self) -> None:
        """An orderly end, which must succeed."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(OPEN_SECONDS_MAX):
            code = await self.ended()
        assert code == 0, f"exit code {code}: {self.last_words()}"

    async def status(self) -> Status:
        """What it says about itself."""

        def ask() -> Status:
            with contextlib.closing(ControlClient(self._control)) as client:
                return client.status()

        return await asyncio.to_thread(ask)

    async def close(self) -> None:
        """End it if it runs. Idempotent."""
        if self._process is not None:
            self.kill()
            await self.ended()

    async def check_zones(self, *, degraded: bool = False) -> None:
        """The offline check finds nothing wrong with what the last process left; a store that never was is none.

        degraded: a zone failed, so that copies may be missing there or bad; no data may.
        """
        report = await asyncio.to_thread(self._check)
        allowed = {Severity.NOTE, Severity.FAULT} if degraded else {Severity.NOTE}
        found = [str(finding) for finding in report.findings if finding.severity not in allowed] if report else []
        assert not found, "the check finds: " + "; ".join(found[:10])

    def _check(self) -> Report | None:
        zones = zones_of(self._zones)
        try:
            with all_locked(zones, exclusive=False):
                return check_store(zones)
        except NotFound:
            return None

    def last_words(self) -> str:
        return self._log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")

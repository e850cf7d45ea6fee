"""The real server as a process that can be killed."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

REPOSITORY: Final = Path(__file__).resolve().parents[2]
OPEN_SECONDS_MAX: Final = 60.0
LOG_TAIL_BYTES: Final = 4000


class ServerEnded(Exception):
    """The server ended before it served; the message holds its last words."""


class RealServer:
    """`python -m nbdserver serve` over some zones. `start` again after `kill` or `stop`, any number of times.

    directory: for sockets and the log; must be short.
    """

    def __init__(self, directory: Path, zones: Sequence[Path], vdis: Sequence[str]) -> None:
        self.address = f"unix://{directory / 'nbd'}"
        self._vdi_count = len(vdis)
        self._log = directory / "server.log"
        self._process: asyncio.subprocess.Process | None = None
        self._command = [sys.executable, "-m", "nbdserver", "serve", "--listen", self.address]
        self._command += ["--control", str(directory / "ctl")]
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
        async with asyncio.timeout(OPEN_SECONDS_MAX):
            for _ in range(self._vdi_count):
                if not await process.stdout.readline():
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

    async def close(self) -> None:
        """End it if it runs. Idempotent."""
        if self._process is not None:
            self.kill()
            await self.ended()

    def last_words(self) -> str:
        return self._log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")

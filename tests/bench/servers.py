"""The servers that are compared: how each is started, what it keeps, what it costs.

Each has a directory of its own on the same file system and one Unix socket. Caches are what the programs do by
default, write-back for all of them: a write is answered before it is on the medium, a flush is not.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.bench import probe

REPOSITORY: Final = Path(__file__).resolve().parents[2]
START_SECONDS_MAX: Final = 120.0
REST_SECONDS_MAX: Final = 30.0
REST_LOOK_SECONDS: Final = 0.5
REST_CPU_SHARE: Final = 0.05
STOP_SECONDS_MAX: Final = 120.0
ZONES: Final = ("zone-a", "zone-b", "zone-c")
EXPORT: Final = "bench"
IMAGE: Final = "image.raw"

Command = Callable[[Path, Path, int], list[str]]


@dataclass(frozen=True)
class Kind:
    """One program and its way of keeping the disk. `command(data, socket, size)` is its command line."""

    name: str
    title: str
    command: Command
    program: str | None = None
    export: str = ""
    files: tuple[str, ...] = ()
    zones: tuple[str, ...] = ()
    keeps_data: bool = True

    @property
    def is_installed(self) -> bool:
        return self.program is None or shutil.which(self.program) is not None


def _sheepfold(data: Path, sock: Path, size: int) -> list[str]:
    zones = [argument for zone in ZONES for argument in ("--zone", str(data / zone))]
    listen = ["--listen", f"unix://{sock}", "--control", f"{sock}.control"]
    return [sys.executable, "-m", "nbdserver", "serve", *zones, "--vdi", f"{EXPORT}:{size}", *listen]


def _sheepfold_memory(data: Path, sock: Path, size: int) -> list[str]:
    return [sys.executable, "-m", "tests.support.memserver", "--unix", str(sock), "--size", str(size)]


def _nbdkit_file(data: Path, sock: Path, size: int) -> list[str]:
    return ["nbdkit", "-f", "-U", str(sock), "file", str(data / IMAGE)]


def _nbdkit_memory(data: Path, sock: Path, size: int) -> list[str]:
    return ["nbdkit", "-f", "-U", str(sock), "memory", str(size)]


def _qemu(sock: Path) -> list[str]:
    return ["qemu-nbd", "-t", "--shared=0", "--cache=writeback", "-k", str(sock)]


def _qemu_raw(data: Path, sock: Path, size: int) -> list[str]:
    return [*_qemu(sock), "-f", "raw", str(data / IMAGE)]


def _qemu_quorum(data: Path, sock: Path, size: int) -> list[str]:
    options = ["driver=quorum", "vote-threshold=2"]
    for number, file in enumerate(ZONES):
        child = f"children.{number}"
        options += [f"{child}.driver=raw", f"{child}.file.driver=file", f"{child}.file.filename={data / file}"]
    return [*_qemu(sock), "--image-opts", ",".join(options)]


KINDS: Final = {
    kind.name: kind
    for kind in (
        Kind("sheepfold", "Sheepfold, 3 copies", _sheepfold, export=EXPORT, zones=ZONES),
        Kind("sheepfold-memory", "Sheepfold, memory volume", _sheepfold_memory, export="disk", keeps_data=False),
        Kind("nbdkit-file", "nbdkit file, 1 copy", _nbdkit_file, program="nbdkit", files=(IMAGE,)),
        Kind("nbdkit-memory", "nbdkit memory", _nbdkit_memory, program="nbdkit", keeps_data=False),
        Kind("qemu-raw", "qemu-nbd raw, 1 copy", _qemu_raw, program="qemu-nbd", files=(IMAGE,)),
        Kind("qemu-quorum", "qemu-nbd quorum, 3 copies", _qemu_quorum, program="qemu-nbd", files=ZONES),
    )
}


class Server:
    """One server process and its data. `start` and `stop` pair up any number of times; `wipe` between them."""

    def __init__(self, kind: Kind, data: Path, sock: Path, size_bytes: int) -> None:
        self.kind = kind
        self.data = data
        self.socket = sock
        self.size_bytes = size_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._log = sock.with_suffix(".log")

    @property
    def uri(self) -> str:
        return f"nbd+unix:///{self.kind.export}?socket={self.socket}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def wipe(self) -> None:
        """An empty disk; the server must not run."""
        assert self._process is None
        shutil.rmtree(self.data, ignore_errors=True)
        self.data.mkdir(parents=True)
        for file in self.kind.files:
            with (self.data / file).open("wb") as image:
                image.truncate(self.size_bytes)
        for zone in self.kind.zones:
            (self.data / zone).mkdir()

    def start(self) -> float:
        """Run the server; seconds from there to its answer to a first read."""
        self.socket.unlink(missing_ok=True)
        command = self.kind.command(self.data, self.socket, self.size_bytes)
        began = time.monotonic()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            probe.first_read(self.socket, self.kind.export, START_SECONDS_MAX)
        except TimeoutError as error:
            self.kill()
            raise RuntimeError(f"{self.kind.name} did not start: {self._log.read_text()[-2000:]}") from error
        return time.monotonic() - began

    def flush(self) -> None:
        probe.flush(self.socket, self.kind.export)

    def rest(self) -> None:
        """Wait until it does nothing any more that a client did not ask for just now."""
        end = time.monotonic() + REST_SECONDS_MAX
        before = self.cpu_seconds()
        while time.monotonic() < end:
            time.sleep(REST_LOOK_SECONDS)
            now = self.cpu_seconds()
            if now - before < REST_CPU_SHARE * REST_LOOK_SECONDS:
                return
            before = now

    def stop(self) -> None:
        """End it in order (SIGTERM). Idempotent."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            self.kill()
        self._process = None

    def kill(self) -> None:
        """kill -9. Idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def cpu_seconds(self) -> float:
        """User and system time so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss_bytes(self) -> tuple[int, int]:
        """Resident memory now and at its peak."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines if ":" in line)
        return int(status["VmRSS"].split()[0]) << 10, int(status["VmHWM"].split()[0]) << 10

    def zone_bytes(self) -> dict[str, int]:
        """What `du` says of each zone, spare files included."""
        return {zone: _disk_usage(self.data / zone) for zone in self.kind.zones}


def _disk_usage(folder: Path) -> int:
    total = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(directory, name), follow_symlinks=False).st_blocks * 512
            except FileNotFoundError:
                continue
    return total

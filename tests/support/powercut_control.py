"""Start, cut and stop a `powercut_fs`: the tests' side of it."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from tests.support import powercut_wire as wire
from tests.support.powercut_disk import Cut

START_SECONDS_MAX: Final = 20.0
REPOSITORY: Final = Path(__file__).resolve().parents[2]
WRITES: Final = ("write", "fallocate", "setattr")
SYNCS: Final = ("fsync", "fsyncdir")
NAMES: Final = ("create", "mkdir", "unlink", "rmdir", "rename", "rename2", "link")


def why_not() -> str | None:
    """Why no power cut can be made on this machine; None if it can."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "/dev/fuse is missing or may not be opened"
    if shutil.which("fusermount3") is None:
        return "fusermount3 (Debian package fuse3) is not installed"
    return None


class PowerCutDisk:
    """A mounted powercut_fs. The directory `root` is what servers get; all of it shares one power supply."""

    def __init__(self, directory: Path, *, limit_bytes: int = 16 << 30) -> None:
        """Mount below `directory`, which is short enough for a socket path."""
        self.root = directory / "disk"
        self.root.mkdir()
        control = directory / "control"
        self._errors = (directory / "powercut.log").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.powercut_fs", self.root, control, "--limit", str(limit_bytes)],
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=self._errors,
            stderr=self._errors,
        )
        self._control = control
        deadline = time.monotonic() + START_SECONDS_MAX
        while True:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                self.stat()
                break
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise OSError(f"powercut_fs did not start: {Path(self._errors.name).read_text()}")
            time.sleep(0.02)

    def tell(self, **command: Any) -> dict[str, Any]:
        """Send one command and wait for its answer. From any thread: each command has a connection of its own."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self._control))
            connection.sendall(json.dumps(command).encode() + b"\n")
            with connection.makefile("rb") as answers:
                line = answers.readline()
        if not line:
            raise OSError(f"powercut_fs ended: {Path(self._errors.name).read_text()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer

    def freeze(self, *, after_changes: int = 0) -> None:
        """Hold every request from after the next `after_changes` changing ones on; returns when that has happened.

        Kill what runs on the disk between this and `cut`: nothing that it says after the freeze rests on the disk.
        """
        self.tell(do="freeze", after=after_changes)

    def cut(self, how: Cut, seed: int) -> dict[str, int]:
        """Drop what was not synced, and be there again at once; the counts of `powercut_disk.CutReport`."""
        return self.tell(do="cut", how=how.value, seed=seed)

    def fault(self, path: str, ops: Sequence[str], errno: int) -> None:
        """Requests named `ops` (WRITES, SYNCS, NAMES, "read") at or below `path` (from the root) fail with errno."""
        self.tell(do="fault", path=path, ops=list(ops), errno=errno)

    def hang(self, path: str, ops: Sequence[str]) -> None:
        """Requests named `ops` at or below `path` get no answer until `clear` or `cut`.

        The kernel then also holds other writes and syncs of the same file, as it does on a disk that hangs.
        """
        self.tell(do="fault", path=path, ops=list(ops), errno=0)

    def clear(self) -> None:
        """End every fault."""
        self.tell(do="clear")

    def limit(self, limit_bytes: int) -> None:
        """Set the size of the file system."""
        self.tell(do="limit", bytes=limit_bytes)

    def stat(self) -> dict[str, Any]:
        """frozen, hanging, used_bytes and how often each request was served."""
        return self.tell(do="stat")

    def close(self) -> None:
        """Unmount and end the process."""
        wire.unmount(str(self.root))
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

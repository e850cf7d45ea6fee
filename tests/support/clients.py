"""Finding and running the foreign NBD programs that the tests use: which are there, what a missing one means.

Without a program the test that needs it is skipped, with the package that holds it; where CI=true it fails instead.
What did not run is repeated at the end of the test run.
"""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PACKAGES = {
    "nbdinfo": "libnbd-bin",
    "nbdcopy": "libnbd-bin",
    "nbdsh": "python3-libnbd",
    "nbdfuse": "nbdfuse",
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "qemu-nbd": "qemu-utils",
    "nbdkit": "nbdkit",
    "fio": "fio",
    "mkfs.ext4": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "debugfs": "e2fsprogs",
    "losetup": "mount",
    "mount": "mount",
    "umount": "mount",
    "cp": "coreutils",
    "sync": "coreutils",
    "fusermount3": "fuse3",
    "qemu-system-x86_64": "qemu-system-x86",
    "mke2fs": "e2fsprogs",
    "busybox": "busybox-static",
    "nbd-client": "nbd-client",
    "modprobe": "kmod",
    "depmod": "kmod",
    "cpio": "cpio",
    "virt-xml-validate": "libvirt-clients libxml2-utils",
    "systemd-analyze": "systemd",
    "systemd-sysusers": "systemd",
    "systemd-tmpfiles": "systemd",
    "systemd-socket-activate": "systemd",
}
"""Debian's package of each program."""

PROGRAM_SECONDS_MAX = 60.0
SYSTEM_PATH = os.pathsep.join(["/usr/sbin", "/usr/bin", "/sbin", "/bin", os.environ.get("PATH", "")])
"""The system's programs first: nbdsh must meet the Python that its module belongs to, not that of the tests."""


@dataclass
class Missing:
    """What the tests of this run asked for and did not find."""

    reasons: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> ids of the tests that did not run because of it."""

    def note(self, reason: str) -> None:
        test = os.environ.get("PYTEST_CURRENT_TEST", "collection").rpartition(" ")[0]
        self.reasons.setdefault(reason, []).append(test)


missing = Missing()


def unavailable(reason: str) -> None:
    """This test can't run here: skip it, or fail where everything has to run (CI=true)."""
    missing.note(reason)
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def find(program: str) -> str:
    """Path of a program; skips or fails the test without it."""
    path = shutil.which(program, path=SYSTEM_PATH)
    if path is None:
        unavailable(f"{program} is not installed: apt-get install {PACKAGES[program]}")
    assert path is not None
    return path


def _environment() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C.UTF-8", "PATH": SYSTEM_PATH}


@dataclass
class Finished:
    """How a program ended. Both streams are decoded, undecodable bytes replaced."""

    code: int
    out: str
    err: str


async def run(
    program: str,
    *arguments: str | Path,
    check: bool = True,
    stdin: str | None = None,
) -> Finished:
    """Run a program to its end; check: a nonzero exit code fails the test and shows what it said."""
    process = await asyncio.create_subprocess_exec(
        find(program),
        *map(str, arguments),
        stdin=asyncio.subprocess.DEVNULL if stdin is None else asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=_environment(),
    )
    try:
        async with asyncio.timeout(PROGRAM_SECONDS_MAX):
            out, err = await process.communicate(None if stdin is None else stdin.encode())
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    finished = Finished(process.returncode, out.decode(errors="replace"), err.decode(errors="replace"))
    if check:
        said = f"{finished.out}\n{finished.err}"
        assert finished.code == 0, f"{program} {' '.join(map(str, arguments))}: exit {finished.code}\n{said}"
    return finished


@asynccontextmanager
async def running(program: str, *arguments: str | Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """A program that stays while the block runs, and is asked to end (SIGTERM) after it."""
    process = await asyncio.create_subprocess_exec(
        find(program),
        *map(str, arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        env=_environment(),
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        await process.communicate()

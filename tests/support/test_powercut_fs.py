"""The mounted file system: what processes see, what a cut leaves of a journal, faults."""

import errno
import fcntl
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.clients import unavailable
from tests.support.powercut_control import NAMES, SYNCS, WRITES, PowerCutDisk, why_not
from tests.support.powercut_disk import Cut

PAGE = 4096
JOURNAL_WRITER = """
import os, struct, sys, zlib
folder, synced = sys.argv[1], sys.argv[2] == "synced"
log = os.open(folder + "/log", os.O_RDWR | os.O_CREAT)
names = os.open(folder, os.O_RDONLY)
for number in range(1_000_000):
    body = struct.pack("<Q", number) * 511
    os.pwrite(log, body + struct.pack("<Q", zlib.crc32(body)), number * 4096)
    if synced:
        os.fdatasync(log)
        if number == 0:
            os.fsync(names)
    print(number, flush=True)
"""


@pytest.fixture
def disk() -> Iterator[PowerCutDisk]:
    reason = why_not()
    if reason is not None:
        unavailable(reason)
    with tempfile.TemporaryDirectory(prefix="powercut-") as directory:
        powercut = PowerCutDisk(Path(directory))
        try:
            yield powercut
        finally:
            powercut.close()


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def durable_file(path: Path, data: bytes) -> None:
    with path.open("wb", buffering=0) as file:
        file.write(data)
        os.fsync(file)
    sync_directory(path.parent)


def test_what_a_directory_backend_calls_works(disk: PowerCutDisk) -> None:
    folder = disk.root / "a" / "b"
    folder.mkdir(parents=True)
    path = folder / "f"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    with pytest.raises(FileExistsError):
        os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    os.posix_fallocate(descriptor, 0, 3 << 20)
    data = os.urandom(3 << 20)
    assert os.pwritev(descriptor, [data[: 1 << 20], data[1 << 20 :]], 0) == len(data)
    os.fdatasync(descriptor)
    got = bytearray(len(data))
    assert os.preadv(descriptor, [got], 0) == len(data)
    assert got == data
    assert os.pread(descriptor, PAGE, len(data) - 10) == data[-10:]
    os.ftruncate(descriptor, 5000)
    assert os.fstat(descriptor).st_size == 5000
    assert os.fstat(descriptor).st_blocks == 16
    os.link(path, folder / "g")
    with pytest.raises(FileExistsError):
        os.link(path, folder / "g")
    os.rename(folder / "g", disk.root / "h")
    os.unlink(path)
    assert sorted(os.listdir(folder)) == []
    assert (disk.root / "h").read_bytes() == data[:5000]
    (disk.root / "h").unlink()
    assert os.pread(descriptor, 10, 0) == data[:10], "an unlinked file stays readable"
    assert os.statvfs(disk.root).f_bavail > 0
    os.close(descriptor)
    many = [f"{number:04x}" for number in range(1000)]
    for name in many:
        (folder / name).touch()
    assert sorted(os.listdir(folder)) == many


def test_lock_belongs_to_one_process_and_ends_with_it(disk: PowerCutDisk) -> None:
    path = disk.root / "lock"
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import fcntl;f=open({str(path)!r},'w');fcntl.flock(f,fcntl.LOCK_EX);print(1,flush=1);input()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    with holder, path.open("w") as file:
        holder.stdout.readline()
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        holder.kill()
        holder.wait()
        fcntl.flock(file, fcntl.LOCK_EX)


def test_cut_drops_bytes_and_names_and_breaks_open_files(disk: PowerCutDisk) -> None:
    durable_file(disk.root / "kept", b"old" * 4000)
    with (disk.root / "kept").open("r+b", buffering=0) as file:
        file.write(b"new")
        (disk.root / "lost").write_bytes(b"x")
        os.rename(disk.root / "lost", disk.root / "lost2")
        report = disk.cut(Cut.DROP, seed=1)
        assert report["names_lost"] == 2
        with pytest.raises(OSError, match="Input/output error"):
            file.read(1)
    assert os.listdir(disk.root) == ["kept"]
    assert (disk.root / "kept").read_bytes() == b"old" * 4000


def test_durable_write_covers_its_own_bytes_only(disk: PowerCutDisk) -> None:
    durable_file(disk.root / "f", bytes(3 * PAGE))
    descriptor = os.open(disk.root / "f", os.O_RDWR)
    os.pwritev(descriptor, [b"a" * PAGE], 0)
    os.pwritev(descriptor, [b"b" * PAGE], PAGE, os.RWF_DSYNC)
    disk.cut(Cut.DROP, seed=1)
    os.close(descriptor)
    assert (disk.root / "f").read_bytes() == bytes(PAGE) + b"b" * PAGE + bytes(PAGE)


def survivors(log: Path) -> int:
    """How many records of JOURNAL_WRITER lead the log unbroken."""
    if not log.exists():
        return 0
    data = log.read_bytes()
    count = 0
    while data[count * PAGE : count * PAGE + 8] == count.to_bytes(8, "little") and len(data) >= (count + 1) * PAGE:
        count += 1
    return count


def journal_under_cut(disk: PowerCutDisk, mode: str, after_changes: int, how: Cut, seed: int) -> int:
    """Run JOURNAL_WRITER until the power fails after so many changes; how many records it had reported by then."""
    command = [sys.executable, "-c", JOURNAL_WRITER, disk.root, mode]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        disk.freeze(after_changes=after_changes)
        writer.kill()
        disk.cut(how, seed)
        assert writer.stdout is not None
        return len(writer.stdout.readlines())


@pytest.mark.parametrize("how", list(Cut))
@pytest.mark.parametrize("seed", range(3))
def test_journal_that_syncs_loses_nothing(disk: PowerCutDisk, how: Cut, seed: int) -> None:
    said = journal_under_cut(disk, "synced", 50 + 7 * seed, how, seed)
    assert survivors(disk.root / "log") >= said > 0


def test_journal_that_does_not_sync_is_found_out(disk: PowerCutDisk) -> None:
    said = journal_under_cut(disk, "never", 50, Cut.DROP, 1)
    assert said > 0
    assert survivors(disk.root / "log") == 0


def test_faults_by_path_and_kind(disk: PowerCutDisk) -> None:
    for zone in ("a", "b"):
        (disk.root / zone).mkdir()
        (disk.root / zone / "f").write_bytes(b"x")
    disk.fault("a", [*WRITES, *SYNCS, *NAMES], errno.EIO)
    with (disk.root / "a" / "f").open("r+b", buffering=0) as file:
        assert file.read(1) == b"x"
        for call in (lambda: file.write(b"y"), lambda: os.fsync(file), lambda: (disk.root / "a" / "g").touch()):
            with pytest.raises(OSError, match="Input/output error") as caught:
                call()
            assert caught.value.errno == errno.EIO
    durable_file(disk.root / "b" / "g", b"y")
    disk.clear()
    durable_file(disk.root / "a" / "g", b"y")


def test_hang_ends_with_clear(disk: PowerCutDisk) -> None:
    (disk.root / "a").mkdir()
    (disk.root / "a" / "f").write_bytes(b"x")
    (disk.root / "a" / "g").write_bytes(b"x")
    disk.hang("a", SYNCS)
    descriptor = os.open(disk.root / "a" / "f", os.O_RDWR)
    synced = threading.Event()
    thread = threading.Thread(target=lambda: (os.fsync(descriptor), synced.set()))
    thread.start()
    while disk.stat()["hanging"] == 0:
        assert not synced.is_set()
    (disk.root / "a" / "g").write_bytes(b"y")
    disk.clear()
    thread.join()
    assert synced.is_set()
    os.close(descriptor)


def test_limit_is_enospc(disk: PowerCutDisk) -> None:
    disk.limit(10 * PAGE)
    with (disk.root / "f").open("wb", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, 8 * PAGE)
        with pytest.raises(OSError, match="No space left") as caught:
            os.posix_fallocate(file.fileno(), 0, 20 * PAGE)
        assert caught.value.errno == errno.ENOSPC
    assert os.statvfs(disk.root).f_bavail == 2

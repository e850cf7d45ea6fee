"""QEMU's block jobs with an export as their target: a running guest's disk is mirrored or backed up into it."""

import random
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.interop.conftest import Export
from tests.support.clients import run
from tests.support.qmp import Qmp, qemu_without_machine
from tests.support.serving import MIB

SIZE_BYTES = 64 * MIB


@pytest.fixture
async def qmp() -> AsyncIterator[Qmp]:
    with tempfile.TemporaryDirectory(prefix="sg-") as directory:
        async with qemu_without_machine(Path(directory)) as found:
            yield found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A disk with data here and there."""
    dice = random.Random(7)
    path = tmp_path / "source.raw"
    with path.open("wb") as file:
        file.truncate(SIZE_BYTES)
        for at in range(0, SIZE_BYTES, 3 * MIB):
            file.seek(at + dice.randrange(MIB))
            file.write(dice.randbytes(dice.randrange(MIB)))
        file.truncate(SIZE_BYTES)
    return path


def server_of(export: Export) -> dict[str, str]:
    unix, tcp = export.served.addresses
    if export.transport == "unix":
        return {"type": "unix", "path": unix.removeprefix("unix://")}
    host, _, port = tcp.removeprefix("tcp://").rpartition(":")
    return {"type": "inet", "host": host, "port": port}


async def add(qmp: Qmp, name: str, **driver: Any) -> None:
    await qmp.ask("blockdev-add", **{"node-name": name, **driver})


async def opened(qmp: Qmp, source: Path, export: Export) -> None:
    """Both disks as nodes: `source` and `target`."""
    await add(qmp, "source", driver="raw", file={"driver": "file", "filename": str(source)})
    await add(qmp, "target", driver="nbd", server=server_of(export), export="disk", **{"reconnect-delay": 30})


async def written(qmp: Qmp, commands: str) -> None:
    """As the guest would write it."""
    for command in commands.split(";"):
        await qmp.ask("human-monitor-command", **{"command-line": f'qemu-io source "{command.strip()}"'})


async def test_mirror(export: Export, qmp: Qmp, source: Path, tmp_path: Path) -> None:
    """blockdev-mirror, with writes while it runs: in the end both are the same."""
    await opened(qmp, source, export)
    await qmp.ask("blockdev-mirror", **{"job-id": "job", "device": "source", "target": "target", "sync": "full"})
    await written(qmp, "write -P 0x11 1M 300k; write -P 0x22 40M 2M; discard 5M 1M")
    await qmp.event("BLOCK_JOB_READY")
    await written(qmp, "write -P 0x33 2M 300k; write -P 0x44 513 512; flush")
    await qmp.ask("block-job-complete", device="job")
    assert "error" not in await qmp.event("BLOCK_JOB_COMPLETED")
    await qmp.ask("blockdev-del", **{"node-name": "source"})
    await run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, export.uri("disk"))


async def test_drive_mirror(export: Export, qmp: Qmp, source: Path) -> None:
    """The older command, which opens its target by itself."""
    await add(qmp, "source", driver="raw", file={"driver": "file", "filename": str(source)})
    target = {"target": export.uri("disk"), "format": "raw", "mode": "existing"}
    await qmp.ask("drive-mirror", **{"job-id": "job", "device": "source", "sync": "full", **target})
    await qmp.event("BLOCK_JOB_READY")
    await qmp.ask("block-job-cancel", device="job")
    await qmp.event("BLOCK_JOB_COMPLETED")
    await qmp.ask("blockdev-del", **{"node-name": "source"})
    await run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, export.uri("disk"))


async def test_backup(export: Export, qmp: Qmp, source: Path, tmp_path: Path) -> None:
    """blockdev-backup: the target is what the source was when the job began."""
    before = tmp_path / "before.raw"
    before.write_bytes(source.read_bytes())
    await opened(qmp, source, export)
    await qmp.ask("blockdev-backup", **{"job-id": "job", "device": "source", "target": "target", "sync": "full"})
    await written(qmp, "write -P 0x55 60M 2M; write -P 0x66 0 1M")
    assert "error" not in await qmp.event("BLOCK_JOB_COMPLETED")
    await qmp.ask("blockdev-del", **{"node-name": "target"})
    await run("qemu-img", "compare", "-f", "raw", "-F", "raw", before, export.uri("disk"))

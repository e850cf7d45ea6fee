"""Started by systemd's own tools: sockets that are opened before the server runs, and what the unit permits."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.support.clients import SYSTEM_PATH, find, run

ROOT = Path(__file__).resolve().parents[2]
UNITS = ROOT / "systemd"
EXPOSURE_MAX = {"sheepfold.service": 2.5, "sheepfold-attach@.service": 4.5}
"""Of 10. Attaching a device takes an administrator's capability, so that unit can't be as tight."""


@pytest.fixture
def sockets() -> AsyncIterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="sg-"))  # tmp_path is too long for a Unix socket
    yield directory
    shutil.rmtree(directory)


@asynccontextmanager
async def activated(names: str, listen: list[Path], *serve: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """The server as systemd would start it: when somebody connects."""
    program = find("systemd-socket-activate")
    command = [program, f"--fdname={names}", *(f"--listen={path}" for path in listen)]
    process = await asyncio.create_subprocess_exec(
        *command,
        *("-E", f"PATH={SYSTEM_PATH}", "-E", "LC_ALL=C.UTF-8"),
        *(sys.executable, "-m", "nbdserver", "serve", *serve),
        cwd=ROOT,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        for _ in listen:  # "Listening on PATH as N." each
            assert b"Listening on" in await process.stderr.readline()
        yield process
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        await process.communicate()


async def test_socket_activation(sockets: Path, tmp_path: Path) -> None:
    """Two NBD sockets and the control socket, all handed over; a real client starts the server by connecting."""
    one, two, control = (sockets / name for name in ("one", "two", "control"))
    zones = [word for name in "abc" for word in ("--zone", str(tmp_path / name))]
    async with activated("nbd:other:control", [one, two, control], *zones, "--vdi", "disk:16M") as server:
        for path in (one, two):
            found = await run("nbdinfo", "--json", f"nbd+unix:///disk?socket={path}")
            assert json.loads(found.out)["exports"][0]["export-size"] == 16 << 20
        status = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "nbdserver", "status", "--json", "--zone", str(tmp_path / "b")),
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
        )
        said = json.loads((await status.communicate())[0])
        assert said["server"]["listen"] == [f"unix://{one}", f"unix://{two}"]
        server.send_signal(signal.SIGTERM)
        _, errors = await server.communicate()
        assert server.returncode == 0, errors.decode()
    assert all(path.exists() for path in (one, two, control)), "they are the service manager's"


@pytest.mark.parametrize("unit", list(EXPOSURE_MAX))
async def test_how_exposed_the_units_are(tmp_path: Path, unit: str) -> None:
    instance = tmp_path / unit.replace("@", "@disk")
    instance.write_text((UNITS / unit).read_text())
    found = await run("systemd-analyze", "security", "--offline=true", "--no-pager", instance)
    exposure = re.search(r"Overall exposure level for \S+: ([\d.]+)", found.out)
    assert exposure is not None, found.out
    assert float(exposure[1]) <= EXPOSURE_MAX[unit]


def test_every_unit_has_a_limit() -> None:
    assert {path.name for path in UNITS.glob("*.service")} == set(EXPOSURE_MAX)


async def test_the_units_are_understood(tmp_path: Path) -> None:
    """Every key and value; with a program in place of ours, which is not installed where tests run."""
    for path in [*UNITS.glob("*.service"), *UNITS.glob("*.socket")]:
        text = re.sub(r"/opt/sheepfold/\.venv/bin/sheepfold", "/bin/true", path.read_text())
        (tmp_path / path.name.replace("@", "@disk")).write_text(text)
    units = sorted(str(path) for path in tmp_path.iterdir())
    found = await run("systemd-analyze", "verify", "--man=no", *units)
    complaints = [line for line in found.err.splitlines() if str(tmp_path) in line or "sheepfold" in line]
    assert not complaints


async def test_user_and_directories_are_made(tmp_path: Path) -> None:
    """As systemd makes them at boot, in a root directory of the test's own."""
    if os.geteuid() != 0:
        pytest.skip("making a user takes root")
    (tmp_path / "etc").mkdir()
    await run("systemd-sysusers", f"--root={tmp_path}", UNITS / "sheepfold.sysusers.conf")
    user = (tmp_path / "etc/passwd").read_text().split(":")
    assert (user[0], user[5]) == ("sheepfold", "/srv/sheepfold")
    await run("systemd-tmpfiles", f"--root={tmp_path}", "--create", UNITS / "sheepfold.tmpfiles.conf")
    made = (tmp_path / "srv/sheepfold").stat()
    assert (made.st_uid, made.st_mode & 0o7777) == (int(user[2]), 0o750)

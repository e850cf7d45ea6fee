"""The configuration is read again while clients stay; a wrong one is refused in one line."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nbdserver.server import Server, ServerSettings
from objstore.units import MIB
from objstore.volume.memory import MemorySource, MemoryVolume
from tests.conftest import ExpectedWarnings
from tests.support.certificates import certificates
from tests.support.channel import Disconnected
from tests.support.nbd_client import attached, connected
from tests.support.nbd_spec import ExportFlag
from tests.support.our_server import serve_source
from tests.support.serving import Disk, eventually

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def sockets() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sg-") as directory:
        yield Path(directory)


async def refused(address: str) -> None:
    """One connection more is closed unanswered."""
    with pytest.raises(Disconnected):
        async with connected(address):
            pass


class Service:
    """`sheepfold serve --config` under a service manager that is this test."""

    def __init__(self, directory: Path, zones: Path) -> None:
        self.config = directory / "sheepfold.toml"
        self._zones = [str(zones / name) for name in "abc"]
        self.address = f"unix://{directory}/nbd"
        self.manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.manager.bind(str(directory / "notify"))
        self.manager.settimeout(30)
        self._environ = {**os.environ, "NOTIFY_SOCKET": str(directory / "notify"), "XDG_RUNTIME_DIR": str(directory)}
        self._control = directory / "control"
        self.process: subprocess.Popen[str] | None = None

    def configure(self, server: str = "", *, vdis: tuple[str, ...] = ("disk",), more: str = "") -> None:
        lines = [f"zones = {json.dumps(self._zones)}", f'listen = ["{self.address}"]', f'control = "{self._control}"']
        lines += [more, "[server]", server, *(f'[vdi.{name}]\nsize = "8M"' for name in vdis)]
        self.config.write_text("\n".join(lines))

    def start(self) -> None:
        command = [sys.executable, "-m", "nbdserver", "serve", "--config", str(self.config)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=self._environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self.hear("READY=1")

    def hear(self, wanted: str) -> list[str]:
        """All that is said until `wanted` is."""
        said: list[str] = []
        while wanted not in said:
            said += self.manager.recv(4096).decode().split("\n")
        return said

    def reload(self) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "nbdserver", "reload", "--json", "--zone", self._zones[1]]
        return subprocess.run(command, cwd=ROOT, env=self._environ, capture_output=True, text=True, timeout=60)

    def end(self) -> str:
        """Stop it in good order; what it has complained about."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        _, complaints = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, complaints
        assert "STOPPING=1" in self.hear("STOPPING=1")
        return complaints


@contextmanager
def service(directory: Path, zones: Path) -> Iterator[Service]:
    one = Service(directory, zones)
    try:
        yield one
    finally:
        one.manager.close()
        if one.process is not None:
            one.process.kill()
            one.process.communicate()


async def test_limits_and_exports_change_while_a_client_stays(sockets: Path, tmp_path: Path) -> None:
    with service(sockets, tmp_path) as server:
        server.configure("connections_max = 1")
        await asyncio.to_thread(server.start)
        async with attached(server.address, "disk") as client:
            await client.write(0, b"before" * 100)
            await refused(server.address)
            server.configure("connections_max = 3", vdis=("disk", "other"), more='default = "other"')
            done = await asyncio.to_thread(server.reload)
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout) == {"restart_needed": []}
            async with connected(server.address) as second:
                assert sorted(name for name, _ in await second.exports()) == ["disk", "other"]
            async with attached(server.address, "") as default:
                await default.write(0, b"of other")
            assert await client.read(0, 600) == b"before" * 100
            await client.flush()
        complaints = await asyncio.to_thread(server.end)
        assert "connections_max=1" in complaints


async def test_a_wrong_configuration_is_refused_and_the_old_one_stays(sockets: Path, tmp_path: Path) -> None:
    with service(sockets, tmp_path) as server:
        server.configure("connections_max = 2")
        await asyncio.to_thread(server.start)
        async with attached(server.address, "disk") as client:
            for server_table, more, named in (
                ("connections_max = 0", "", "connections_max = 0"),
                ("conections_max = 9", "", "unknown key server.conections_max"),
                ("connections_max = 9", 'default = "nothing"', "default export 'nothing' does not exist"),
                ("connections_max = 9", "default = ", "sheepfold.toml"),
            ):
                server.configure(server_table, more=more)
                done = await asyncio.to_thread(server.reload)
                assert done.returncode == 2
                assert done.stderr.count("\n") == 1
                assert named in done.stderr
            async with connected(server.address):
                await refused(server.address)
            await client.still_serves()
        await asyncio.to_thread(server.end)


async def test_certificates_are_read_again(sockets: Path, tmp_path: Path) -> None:
    """Others under the same names count for new clients; those that can't be used are refused; TLS can begin so."""
    folder = sockets / "tls"
    with service(sockets, tmp_path) as server:
        server.configure()
        await asyncio.to_thread(server.start)
        async with attached(server.address, "disk") as plain:
            shutil.copytree(certificates().directory, folder)
            server.configure(more='[tls]\nmode = "forced"\ncertificates = "tls"')
            assert (await asyncio.to_thread(server.reload)).returncode == 0
            async with attached(server.address, "disk", tls=certificates().client()) as client:
                (folder / "server-key.pem").write_text("")
                done = await asyncio.to_thread(server.reload)
                assert done.returncode == 2
                assert "server-key.pem" in done.stderr
                async with attached(server.address, "disk", tls=certificates().client()) as other:
                    await other.still_serves()
                shutil.copytree(certificates("other").directory, folder, dirs_exist_ok=True)
                assert (await asyncio.to_thread(server.reload)).returncode == 0
                async with attached(server.address, "disk", tls=certificates("other").client()) as other:
                    await other.still_serves()
                await client.still_serves()
            await plain.still_serves()
        await asyncio.to_thread(server.end)


async def test_access_is_read_again(sockets: Path, tmp_path: Path) -> None:
    with service(sockets, tmp_path) as server:
        server.configure()
        await asyncio.to_thread(server.start)
        async with attached(server.address, "disk") as client:
            server.configure(more="[access.disk]\nread = [{ anyone = true }]")
            assert (await asyncio.to_thread(server.reload)).returncode == 0
            async with attached(server.address, "disk") as newcomer:
                assert newcomer.flags & ExportFlag.READ_ONLY
            await client.write(0, b"stays as it was")
            server.configure(more="[access.disk]\ntls = true")
            done = await asyncio.to_thread(server.reload)
            assert done.returncode == 2
            assert "access.disk: tls = true, but TLS is off" in done.stderr
            async with attached(server.address, "disk") as newcomer:
                assert newcomer.flags & ExportFlag.READ_ONLY
        await asyncio.to_thread(server.end)


async def test_sighup_does_the_same_and_the_manager_hears_of_it(sockets: Path, tmp_path: Path) -> None:
    with service(sockets, tmp_path) as server:
        server.configure()
        await asyncio.to_thread(server.start)
        assert server.process is not None
        async with attached(server.address, "disk") as client:
            server.configure(vdis=("disk", "late"), more="[store]\ndirty_age_seconds = 2.0\n")
            server.process.send_signal(signal.SIGHUP)
            said = await asyncio.to_thread(server.hear, "READY=1")
            assert "RELOADING=1" in said
            assert any(state.startswith("MONOTONIC_USEC=") for state in said)
            async with connected(server.address) as other:
                assert sorted(name for name, _ in await other.exports()) == ["disk", "late"]
            server.config.write_text("nonsense")
            server.process.send_signal(signal.SIGHUP)
            await asyncio.to_thread(server.hear, "READY=1")
            await client.still_serves()
        complaints = await asyncio.to_thread(server.end)
        assert "next start on: store" in complaints
        assert "the configuration is refused, the old one stays" in complaints


async def test_reload_without_a_server_is_an_error(sockets: Path, tmp_path: Path) -> None:
    with service(sockets, tmp_path) as server:
        server.configure()
        await asyncio.to_thread(server.start)
        await asyncio.to_thread(server.end)
        done = await asyncio.to_thread(server.reload)
        assert done.returncode == 7
        assert done.stderr.count("\n") == 1


async def test_lower_limits_hold_for_clients_that_are_here(tmp_path: Path, expected_warnings: ExpectedWarnings) -> None:
    """A client that is attached gets the new number of requests in flight, and keeps what it has under way."""
    volumes: dict[str, Any] = {"disk": MemoryVolume("disk", MIB), "other": MemoryVolume("other", MIB)}
    disks = [Disk("disk", MIB), Disk("other", MIB)]
    async with serve_source(MemorySource(volumes), disks, tmp_path, default_export="disk") as served:
        server: Server = served.server
        async with served.attached() as client:
            server.reconfigure(ServerSettings(connections_max=1, default_export="other", buffer_bytes_max=128 * MIB))
            await client.still_serves()
            expected_warnings.allow("connections_max=1 are open")
            await refused(served.address)
        await eventually(lambda: not server.clients())
        async with served.attached("") as client:
            assert server.clients()[0].export == "other"
        await eventually(lambda: not server.clients())
        ended, in_flight = server.progress()
        assert ended > 0
        assert in_flight == 0

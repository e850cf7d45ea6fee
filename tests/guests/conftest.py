"""The real server for guests: three zones, a Unix socket and a TCP port of the loopback."""

import shutil
import socket
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.crash.server import RealServer


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.interop)


@dataclass
class Served:
    """A running server with one disk of 256 MiB, `disk`."""

    server: RealServer
    port: int

    @property
    def uri(self) -> str:
        return self.server.uri("disk")


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    sockets = Path(tempfile.mkdtemp(prefix="sg-"))  # tmp_path is too long for a Unix socket
    zones = [tmp_path / name for name in "abc"]
    for zone in zones:
        zone.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]  # it stays the same when the server is started again
    server = RealServer(sockets, zones, ["disk:256M"], listen=[f"tcp://127.0.0.1:{port}"])
    try:
        await server.start()
        yield Served(server, port)
        await server.stop()
        await server.check_zones()
    finally:
        await server.close()
        shutil.rmtree(sockets)

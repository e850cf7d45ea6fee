"""The real server for guests: three zones, a Unix socket and a TCP port of the loopback."""

import re
import shutil
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
    server = RealServer(sockets, zones, ["disk:256M"], listen=["tcp://127.0.0.1:0"])
    try:
        await server.start()
        port = re.search(r"nbd://127\.0\.0\.1:(\d+)/", server.announced[0])
        assert port is not None, server.announced
        yield Served(server, int(port[1]))
        await server.stop()
        await server.check_zones()
    finally:
        await server.close()
        shutil.rmtree(sockets)

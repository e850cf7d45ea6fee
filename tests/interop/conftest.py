"""A server for real clients, on a Unix socket and on TCP."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.our_server import serve
from tests.support.serving import MIB, Disk, Served

IMAGE_BYTES = 64 * MIB


@dataclass
class Export:
    """Where a real client finds the disk."""

    served: Served
    transport: str

    def uri(self, name: str = "") -> str:
        """The NBD URI of an export ("": the default one)."""
        unix, tcp = self.served.addresses
        if self.transport == "unix":
            return f"nbd+unix:///{name}?socket={unix.removeprefix('unix://')}"
        return f"nbd://{tcp.removeprefix('tcp://')}/{name}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.interop)


@pytest.fixture(params=["unix", "tcp"])
async def export(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Export]:
    """One writable disk of 64 MiB."""
    disk = Disk(size_bytes=IMAGE_BYTES)
    async with serve([disk], tmp_path, listen=["unix", "tcp"]) as served:
        yield Export(served, request.param)

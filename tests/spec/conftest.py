"""A server for the tests of the specification, over each kind of volume."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.nbd_client import NbdClient
from tests.support.serving import Disk, Served, serve_peer

PEERS = ("nbdkit", "qemu-nbd")
DEFAULT_KINDS = ("memory",)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "volume_kind" in metafunc.fixturenames:
        metafunc.parametrize("volume_kind", metafunc.config.getoption("--volume-kind") or DEFAULT_KINDS)


@pytest.fixture
async def nbd_server(volume_kind: str, tmp_path: Path) -> AsyncIterator[Served]:
    """One writable disk of 128 MiB."""
    async with serve_peer(volume_kind, Disk(), tmp_path) as served:
        yield served


@pytest.fixture
async def client(nbd_server: Served) -> AsyncIterator[NbdClient]:
    """In transmission with structured replies and base:allocation."""
    async with nbd_server.attached(contexts=["base:allocation"]) as attached:
        yield attached


@pytest.fixture
async def simple(nbd_server: Served) -> AsyncIterator[NbdClient]:
    """In transmission with simple replies."""
    async with nbd_server.attached(structured=False) as attached:
        yield attached

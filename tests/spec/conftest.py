"""A server for the tests of the specification, over each kind of volume."""

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest

from tests.support.certificates import certificates
from tests.support.nbd_client import NbdClient
from tests.support.our_server import KINDS, serve
from tests.support.serving import MIB, Disk, Served, serve_peer

PEERS = ("nbdkit", "qemu-nbd")
DEFAULT_KINDS = tuple(KINDS)
TLS = "memory-tls"
TLS_MODULES = (
    "test_read",
    "test_write",
    "test_requests",
    "test_close",
    "test_model",
    "test_size_limits",
    "test_handshake_walk",
)
"""Run over TLS too, because what they do depends on how bytes come and go; the others with --volume-kind memory-tls."""
HANDSHAKE_SECONDS = 300.0
"""Longer than the client's patience: where a test waits for a close, the deadline must not be what closes."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "volume_kind" in metafunc.fixturenames:
        kinds = (*DEFAULT_KINDS, TLS) if metafunc.module.__name__.endswith(TLS_MODULES) else DEFAULT_KINDS
        metafunc.parametrize("volume_kind", metafunc.config.getoption("--volume-kind") or kinds)


@asynccontextmanager
async def serving_tls(disks: list[Disk], directory: Path) -> AsyncIterator[Served]:
    """Our server, and clients that use TLS from the beginning."""
    async with serve(disks, directory, tls=certificates().server(), handshake_seconds=HANDSHAKE_SECONDS) as served:
        served.tls = certificates().client()
        yield served


def serving(kind: str, disks: list[Disk], directory: Path) -> AbstractAsyncContextManager[Served]:
    """A server of a kind; foreign ones have one plain disk only."""
    if kind == TLS:
        return serving_tls(disks, directory)
    if kind not in PEERS:
        return serve(disks, directory, kind=kind, handshake_seconds=HANDSHAKE_SECONDS)
    if len(disks) > 1:
        pytest.skip("this server has one disk only")
    return serve_peer(kind, disks[0], directory)


@pytest.fixture
async def nbd_server(volume_kind: str, tmp_path: Path) -> AsyncIterator[Served]:
    """One writable disk of 128 MiB."""
    async with serving(volume_kind, [Disk()], tmp_path) as served:
        yield served


@pytest.fixture
async def one_named_disk(volume_kind: str, tmp_path: Path) -> AsyncIterator[Served]:
    """As nbd_server, by a server that knows its export by name and refuses others."""
    if volume_kind in PEERS:
        pytest.skip("this server takes any name")
    async with serving(volume_kind, [Disk()], tmp_path) as served:
        yield served


@pytest.fixture
async def two_disks(volume_kind: str, tmp_path: Path) -> AsyncIterator[Served]:
    """As nbd_server, with a second disk."""
    async with serving(volume_kind, [Disk(), Disk("second", 8 * MIB)], tmp_path) as served:
        yield served


@pytest.fixture
async def read_only(volume_kind: str, tmp_path: Path) -> AsyncIterator[Served]:
    """One read-only disk."""
    async with serving(volume_kind, [Disk(read_only=True)], tmp_path) as served:
        yield served


@pytest.fixture
async def small_disk(volume_kind: str, tmp_path: Path) -> AsyncIterator[Served]:
    """One disk whose size is no multiple of anything."""
    async with serving(volume_kind, [Disk(size_bytes=100_001)], tmp_path) as served:
        yield served


@pytest.fixture
async def huge_disk(volume_kind: str, tmp_path: Path) -> AsyncIterator[Served]:
    """One disk of 20 GiB, of which nothing is allocated."""
    if volume_kind in PEERS:
        pytest.skip("for extended headers, which this server does not have")
    async with serving(volume_kind, [Disk(size_bytes=20 << 30)], tmp_path) as served:
        yield served


@pytest.fixture
async def client(nbd_server: Served) -> AsyncIterator[NbdClient]:
    """In transmission with structured replies and base:allocation."""
    async with nbd_server.attached(contexts=["base:allocation"]) as attached:
        yield attached


@pytest.fixture(params=["simple", "structured", "extended"])
async def any_client(nbd_server: Served, request: pytest.FixtureRequest, volume_kind: str) -> AsyncIterator[NbdClient]:
    """In transmission, once with each kind of reply; with base:allocation where it can be had."""
    if request.param == "extended" and volume_kind in PEERS:
        pytest.skip("the peer has no extended headers")
    contexts = [] if request.param == "simple" else ["base:allocation"]
    structured = request.param == "structured"
    extended = request.param == "extended"
    async with nbd_server.attached(structured=structured, extended=extended, contexts=contexts) as attached:
        yield attached


@pytest.fixture
async def simple(nbd_server: Served) -> AsyncIterator[NbdClient]:
    """In transmission with simple replies."""
    async with nbd_server.attached(structured=False) as attached:
        yield attached

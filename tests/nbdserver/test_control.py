"""The control socket and its client, over a real Unix socket."""

import asyncio
import contextlib
import http.client
import inspect
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeVar

import pytest

from nbdserver.control import ControlServer
from nbdserver.control_client import ControlClient, NoServer
from objstore import errors
from objstore.access.api import (
    BODY_BYTES_MAX,
    STATUS_OF_ERROR,
    ErrorReply,
    ServerStatus,
    error_from_reply,
    http_status,
)
from objstore.units import GIB, TIB
from tests.nbdserver.fake_store import FakeStore

T = TypeVar("T")

SERVER_STATUS = ServerStatus(pid=7, listen=["unix:///run/x.sock"], clients=2)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
async def server(store: FakeStore, path: Path) -> AsyncIterator[ControlServer]:
    server = ControlServer(store, lambda: SERVER_STATUS)
    await server.start(path)
    yield server
    await server.stop()


async def ask(path: Path, question: Callable[[ControlClient], T]) -> T:
    """Put a question to the server, from a thread as the client blocks."""

    def in_thread() -> T:
        client = ControlClient(path)
        try:
            return question(client)
        finally:
            client.close()

    return await asyncio.to_thread(in_thread)


def raw(path: Path, method: str, target: str, body: bytes | None = None) -> tuple[int, bytes]:
    """One HTTP request without the client's care."""
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(os.fspath(path))
    connection.request(method, target, body)
    response = connection.getresponse()
    try:
        return response.status, response.read()
    finally:
        connection.close()


@pytest.mark.usefixtures("server")
async def test_create_list_show_delete(path: Path) -> None:
    created = await ask(path, lambda c: c.create_vdi("disk 1%2F é", GIB, copies=2, mode="unsafe", prealloc=False))
    assert (created.name, created.size_bytes, created.copies, created.mode) == ("disk 1%2F é", GIB, 2, "unsafe")
    assert await ask(path, lambda c: c.vdi("disk 1%2F é")) == created
    assert await ask(path, lambda c: c.vdis()) == [created]
    await ask(path, lambda c: c.delete_vdi("disk 1%2F é"))
    assert await ask(path, lambda c: c.vdis()) == []


@pytest.mark.usefixtures("server")
async def test_status_joins_server_and_store(path: Path, store: FakeStore) -> None:
    status = await ask(path, lambda c: c.status())
    assert status.server == SERVER_STATUS
    assert status.store == await store.status()


@pytest.mark.usefixtures("server")
async def test_scrub_and_damage(path: Path, store: FakeStore) -> None:
    assert not (await ask(path, lambda c: c.scrub_status())).running
    assert (await ask(path, lambda c: c.start_scrub())).running
    assert store.scrubs == 1
    assert (await ask(path, lambda c: c.scrub_status())) == (await store.status()).scrub
    await store.create_vdi("a b", 1)
    assert await ask(path, lambda c: c.damage("a b")) == await store.damage("a b")
    with pytest.raises(errors.NotFound, match="vdi=b"):
        await ask(path, lambda c: c.damage("b"))


@pytest.mark.usefixtures("server")
async def test_snapshots(path: Path, store: FakeStore) -> None:
    await store.create_vdi("a b", 1)
    taken = await ask(path, lambda c: c.create_snapshot("a b", "t%", skip_unchanged=False, protected=True))
    assert taken.taken
    assert (taken.snapshot.name, taken.snapshot.protected) == ("a b@t%", True)
    again = await ask(path, lambda c: c.create_snapshot("a b", "", skip_unchanged=True, protected=False))
    assert not again.taken
    assert await ask(path, lambda c: c.snapshots(None)) == await ask(path, lambda c: c.snapshots("a b"))
    made = await ask(path, lambda c: c.clone("a b@t%", "new", copies=2, mode="unsafe"))
    assert (made.name, made.parent, made.copies, made.mode) == ("new", "a b@t%", 2, "unsafe")
    assert (await ask(path, lambda c: c.rename("new", "n e w"))).name == "n e w"
    assert (await ask(path, lambda c: c.resize("n e w", 5))).size_bytes == 5
    undo = await ask(path, lambda c: c.rollback("a b@t%"))
    assert undo.name == "a b@2"
    await ask(path, lambda c: c.delete_snapshot("a b@2"))
    with pytest.raises(errors.NotFound, match="vdi=b"):
        await ask(path, lambda c: c.snapshots("b"))
    with pytest.raises(errors.Busy, match="snapshot=a b@t%"):
        await ask(path, lambda c: c.delete_snapshot("a b@t%"))
    assert not (await ask(path, lambda c: c.protect_snapshot("a b@t%", protected=False))).protected
    await ask(path, lambda c: c.delete_snapshot("a b@t%"))
    assert await ask(path, lambda c: c.snapshots(None)) == []
    status, body = await asyncio.to_thread(raw, path, "GET", "/v1/snapshots/a%20b%40x")
    assert (status, b"a b@x" in body) == (404, True)


@pytest.mark.usefixtures("server")
async def test_recovery_copies_and_zones(path: Path, store: FakeStore) -> None:
    assert (await ask(path, lambda c: c.recovery_status())) == (await store.status()).recovery
    assert (await ask(path, lambda c: c.set_recovery_rate(5 << 20))).bytes_per_second_max == 5 << 20
    with pytest.raises(errors.InvalidRequest, match="no rate: -1"):
        await ask(path, lambda c: c.set_recovery_rate(-1))
    await store.create_vdi("a", 1)
    assert (await ask(path, lambda c: c.set_copies("a", 2))).copies == 2
    zones = await ask(path, lambda c: c.change_zones("replace", "/a", path="/b", weight=2.5, force=True))
    assert zones == (await store.status()).zones
    assert store.changes == [("replace", "/a", "/b", 2.5, True)]


@pytest.mark.usefixtures("server")
async def test_the_stores_errors_come_out_of_the_client_with_their_message(path: Path, store: FakeStore) -> None:
    await ask(path, lambda c: c.create_vdi("a", 1, copies=None, mode="writeback", prealloc=False))
    store.attached.add("a")
    with pytest.raises(errors.Exists, match="vdi=a"):
        await ask(path, lambda c: c.create_vdi("a", 1, copies=None, mode="writeback", prealloc=False))
    with pytest.raises(errors.NotFound, match="vdi=b"):
        await ask(path, lambda c: c.vdi("b"))
    with pytest.raises(errors.Busy, match="vdi=a"):
        await ask(path, lambda c: c.delete_vdi("a"))
    with pytest.raises(errors.InvalidRequest, match="copies=4"):
        await ask(path, lambda c: c.create_vdi("c", 1, copies=4, mode="writeback", prealloc=False))
    with pytest.raises(errors.NoSpace, match="vdi=c"):
        await ask(path, lambda c: c.create_vdi("c", 2 * TIB, copies=None, mode="writeback", prealloc=True))


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(
    ("method", "target", "body", "status", "named"),
    [
        ("POST", "/v1/vdis", b"{", 400, b"truncated"),
        ("POST", "/v1/vdis", b"[]", 400, b"Expected `object`"),
        ("POST", "/v1/vdis", b'{"name":"a","size_bytes":1,"colour":1}', 400, b"colour"),
        ("POST", "/v1/vdis", b'{"name":"a","size_bytes":"1"}', 400, b"size_bytes"),
        ("POST", "/v1/vdis", b'{"name":"a\xff","size_bytes":1}', 400, b"InvalidRequest"),
        ("POST", "/v1/vdis", b'{"name":"a/b","size_bytes":1}', 400, b"a/b"),
        ("POST", "/v1/vdis", b" " * (BODY_BYTES_MAX + 1), 413, b"TooLarge"),
        ("GET", "/v2", None, 404, b"/v2"),
        ("PUT", "/v1/vdis", b"{}", 405, b"PUT"),
    ],
)
async def test_bad_requests_get_an_error_that_says_what_is_wrong(
    path: Path, method: str, target: str, body: bytes | None, status: int, named: bytes
) -> None:
    got_status, got_body = await asyncio.to_thread(raw, path, method, target, body)
    assert got_status == status
    assert named in got_body


def test_every_store_error_crosses_the_socket() -> None:
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.StoreError)]
    assert len(kinds) > 10
    for kind in kinds:
        error = error_from_reply(ErrorReply(kind.__name__, "why"))
        assert type(error) is kind
        assert str(error) == "why"
        assert http_status(kind("why")) == STATUS_OF_ERROR.get(kind, 500)


def test_an_error_that_is_no_store_error_stays_an_error() -> None:
    assert type(error_from_reply(ErrorReply("Sequence", "why"))) is errors.StoreError
    assert type(error_from_reply(ErrorReply("HTTPNotFound", "why"))) is errors.StoreError


@pytest.mark.usefixtures("server")
async def test_only_the_owner_may_open_the_socket(path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_stop_removes_the_socket_and_the_client_says_that_nobody_is_there(
    server: ControlServer, path: Path
) -> None:
    await server.stop()
    assert not path.exists()
    with pytest.raises(NoServer):
        ControlClient(path)


async def test_a_socket_of_a_killed_server_is_replaced(path: Path, store: FakeStore) -> None:
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(os.fspath(path))
    with pytest.raises(NoServer):
        ControlClient(path)
    server = ControlServer(store, lambda: SERVER_STATUS)
    await server.start(path)
    assert await ask(path, lambda c: c.vdis()) == []
    await server.stop()


async def test_a_socket_that_is_answered_is_left_alone(server: ControlServer, path: Path, store: FakeStore) -> None:
    second = ControlServer(store, lambda: SERVER_STATUS)
    with pytest.raises(errors.Busy, match="another server answers"):
        await second.start(path)
    await second.stop()
    assert await ask(path, lambda c: c.vdis()) == []
    assert server is not second


async def test_a_server_that_accepts_nobody_is_left_alone_and_not_waited_for(path: Path, store: FakeStore) -> None:
    """It is stopped in a debugger, say: connecting to it blocks as soon as its queue is full."""
    with socket.socket(socket.AF_UNIX) as listening, contextlib.ExitStack() as waiting:
        listening.bind(os.fspath(path))
        listening.listen(0)
        with contextlib.suppress(BlockingIOError):
            for _ in range(10):
                client = waiting.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                client.connect(os.fspath(path))
        with pytest.raises(errors.Busy, match="another server answers"):
            await ControlServer(store, lambda: SERVER_STATUS).start(path)
        assert path.is_socket()


async def test_a_file_in_the_way_is_not_removed(path: Path, store: FakeStore) -> None:
    path.write_text("precious")
    server = ControlServer(store, lambda: SERVER_STATUS)
    with pytest.raises(errors.InvalidRequest, match="no socket"):
        await server.start(path)
    await server.stop()
    assert path.read_text() == "precious"


@pytest.mark.parametrize("bad", ["missing/control.sock", "x" * 120])
async def test_an_impossible_path_is_named(tmp_path: Path, store: FakeStore, bad: str) -> None:
    server = ControlServer(store, lambda: SERVER_STATUS)
    with pytest.raises(errors.InvalidRequest, match=bad[:20]):
        await server.start(tmp_path / bad)
    await server.stop()


async def test_a_server_that_goes_away_in_mid_answer_is_unavailable(path: Path) -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n[")
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_unix_server(hang_up, path):
        with pytest.raises(errors.Unavailable, match="went away"):
            await ask(path, lambda c: c.vdis())

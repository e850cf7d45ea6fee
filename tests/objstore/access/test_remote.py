"""What is special about a connection to a server: sessions, bodies, a server that goes away."""

import asyncio
import http.client
import multiprocessing
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import objstore
from nbdserver import control_data
from objstore import Fenced, InvalidRequest, NotFound, Unavailable, blocking
from objstore.access.api import DATA_BYTES_MAX, Handle, OpenHandle
from objstore.access.remote import ControlHttp
from objstore.volume.store import Store
from tests.objstore.access.conftest import serving
from tests.support.stepping import turns

MIB = 1 << 20


@pytest.fixture
async def served(zones: list[Path], socket_path: Path) -> AsyncIterator[Store]:
    async with serving(zones, socket_path) as store:
        await store.create_vdi("disk", 8 * MIB)
        yield store


async def until_attached(store: Store, count: int) -> None:
    """The server sees the end of a session when its socket is closed; no other event tells."""
    while store.vdi("disk").attached != count:  # noqa: ASYNC110 - nothing tells of it
        await asyncio.sleep(0.01)


async def test_the_end_of_a_session_closes_its_handles(served: Store, socket_path: Path) -> None:
    async with objstore.connect(socket=socket_path) as store, objstore.connect(socket=socket_path) as other:
        vdi, kept = await store.open("disk"), await other.open("disk")
        await store.open("disk")
        await vdi.write(0, b"data")
        assert served.vdi("disk").attached == 3
        await store.close()
        await until_attached(served, 1)
        with pytest.raises(InvalidRequest, match="closed"):
            await vdi.write(0, b"stale")
        with pytest.raises(objstore.Stopping):
            await store.open("disk")
        assert await kept.read(0, 4) == b"data"
    await until_attached(served, 0)
    await served.delete_vdi("disk")


def _hold(socket_path: Path, ready: "multiprocessing.synchronize.Event") -> None:
    store = blocking.connect(socket=socket_path)
    vdi = store.open("disk")
    vdi.write(0, b"from a process that is killed")
    ready.set()
    signal.pause()


async def test_a_client_that_is_killed_leaves_nothing_attached(served: Store, socket_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_hold, args=(socket_path, ready))
    process.start()
    try:
        assert await asyncio.to_thread(ready.wait, 60)
        assert served.vdi("disk").attached == 1
    finally:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        await asyncio.to_thread(process.join)
    await until_attached(served, 0)


async def test_after_a_restart_a_handle_is_dead_and_a_new_one_works(zones: list[Path], socket_path: Path) -> None:
    async with serving(zones, socket_path) as first:
        await first.create_vdi("disk", MIB)
        store = await objstore.connect(socket=socket_path)
        vdi = await store.open("disk")
        await vdi.write(0, b"flushed", writeback=False)
    with pytest.raises(Unavailable, match=r"nobody answers|went away"):
        await vdi.write(0, b"nobody")
    async with serving(zones, socket_path):
        with pytest.raises(Fenced, match="does not know this handle"):
            await vdi.write(0, b"stale")
        with pytest.raises(Fenced, match="the session has ended"):
            await store.open("disk")
        with pytest.raises(Fenced):
            await store.close()
        async with objstore.connect(socket=socket_path) as again, again.open("disk") as opened:
            assert await opened.read(0, 8) == b"flushed\0"


async def test_nobody_there(socket_path: Path) -> None:
    with pytest.raises(Unavailable, match="nobody answers there"):
        await objstore.connect(socket=socket_path)


async def test_a_server_names_its_socket_in_its_zones(zones: list[Path], socket_path: Path) -> None:
    store = await objstore.volume.store.open_store(
        zones, create=True, lock_note=f'{{"pid":1,"control":"{socket_path}"}}'
    )
    assert objstore.control_socket(zones[1]) == socket_path
    await store.shutdown()


async def test_bodies_have_a_limit_and_a_length(served: Store, socket_path: Path) -> None:
    def ask(method: str, target: str, head: str, body: bytes) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(socket_path))
        connection.sock.sendall(f"{method} {target} HTTP/1.1\r\nHost: x\r\n{head}\r\n".encode() + body)
        response = http.client.HTTPResponse(connection.sock)
        try:
            response.begin()
            return response.status, response.read()
        finally:
            response.close()
            connection.close()

    async with objstore.connect(socket=socket_path) as store:
        vdi = await store.open("disk")
        target = f"{vdi._path}/data?offset_bytes=0"  # type: ignore[attr-defined]
        long = bytes(DATA_BYTES_MAX + 1)
        for method, more, head, body, wrong in (
            ("PUT", "", "Transfer-Encoding: chunked\r\n", b"0\r\n\r\n", b"its length is needed"),
            ("PUT", "", f"Content-Length: {len(long)}\r\n", long, b"at most"),
            ("GET", f"&length_bytes={len(long)}", "", b"", b"at most"),
            ("GET", "&length_bytes=-1", "", b"", b"impossible range"),
            ("GET", "", "", b"", b"'length_bytes' is missing"),
        ):
            status, answer = await asyncio.to_thread(ask, method, target + more, head, body)
            assert status == 400
            assert wrong in answer
        assert await vdi.read(0, 4096) == bytes(4096)


async def test_a_client_that_stalls_in_its_body_does_not_keep_its_place(
    served: Store, socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_data, "STALL_SECONDS", 0.1)
    async with objstore.connect(socket=socket_path) as store:
        vdi = await store.open("disk")
        stalled = []
        for _ in range(control_data.BODIES_MAX):
            reader, writer = await asyncio.open_unix_connection(socket_path)
            request = f"PUT {vdi._path}/data?offset_bytes=0 HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf"  # type: ignore[attr-defined]
            writer.write(request.encode())
            stalled.append((reader, writer))
        await vdi.write(4096, b"others go on")
        for reader, writer in stalled:
            await reader.read()
            writer.close()
            await writer.wait_closed()
        assert await vdi.read(0, 4096 + 12) == bytes(4096) + b"others go on"


async def test_a_write_that_its_client_gave_up_does_not_overtake_the_next(served: Store, socket_path: Path) -> None:
    """It waits for its turn in the store; its client cancels it and writes something newer to the same place."""
    async with objstore.connect(socket=socket_path) as store:
        vdi = await store.open("disk")
        inside = served._open[1]
        async with inside._turn:
            old = asyncio.create_task(vdi.write(0, b"old", writeback=False))
            while not inside._turn._waiters:  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(0)
            old.cancel()
            with pytest.raises(asyncio.CancelledError):
                await old
        await vdi.write(0, b"new", writeback=False)
        await turns(100)
        assert await vdi.read(0, 3) == b"new"


async def test_damage_crosses_the_socket_with_its_ranges(
    served: Store, socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with objstore.connect(socket=socket_path) as store:
        vdi = await store.open("disk")

        async def damaged(self: object, offset: int, view: memoryview) -> None:
            raise objstore.Corrupt("no zone has it", [(4096, 8192)])

        monkeypatch.setattr("objstore.access.local_vdi.LocalVdi._read", damaged)
        with pytest.raises(objstore.Corrupt, match="no zone has it") as info:
            await vdi.read(0, 10)
        assert info.value.bad == ((4096, 8192),)


async def test_a_session_that_ended_while_a_handle_was_opened_gets_none(served: Store, socket_path: Path) -> None:
    control = ControlHttp(str(socket_path))
    try:
        with pytest.raises(Fenced, match="ended"):
            await control.ask("POST", "/v1/vdis/disk/handles", Handle, OpenHandle(session="none"))
        session = await control.begin_session()
        with pytest.raises(NotFound):
            await control.ask("POST", "/v1/vdis/other/handles", Handle, OpenHandle(session=session))
    finally:
        await control.close()
    assert served.vdi("disk").attached == 0


async def test_the_stop_waits_for_all_silent_sessions_together(
    zones: list[Path], socket_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients that are stopped never say farewell."""
    monkeypatch.setattr(control_data, "FAREWELL_SECONDS", 1.0)
    silent = []
    async with serving(zones, socket_path):
        for _ in range(30):
            reader, writer = await asyncio.open_unix_connection(socket_path)
            writer.write(
                b"GET /v1/session HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
            )
            assert await reader.readline() == b"HTTP/1.1 101 Switching Protocols\r\n"
            silent.append(writer)
        limit = asyncio.get_running_loop().time() + 20
    assert asyncio.get_running_loop().time() < limit, "one after the other takes half a minute"
    for writer in silent:
        writer.close()
        await writer.wait_closed()

"""Sockets below the protocol: TCP_NODELAY (proto.md, "Protocol phases"), address families, and the orderly close.

Orderly close: finish sending, shut down the sending side, read and drop what still comes for a bounded time, close. A
socket closed with unread data in it would be reset, and a reset destroys replies that the client has not read yet.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.channel import Disconnected
from tests.support.nbd_client import NbdClient, attached
from tests.support.nbd_spec import Command, Err, Option, Rep
from tests.support.our_server import OurServed, serve
from tests.support.serving import MIB, Disk, eventually

PAGE = 4096
TRANSPORTS = ["unix", "tcp"]


@pytest.fixture(params=TRANSPORTS)
async def on_each_transport(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[OurServed]:
    async with serve([Disk()], tmp_path, listen=[request.param], linger_seconds=0.2) as served:
        yield served


def servers_end(client: NbdClient) -> socket.socket:
    """A duplicate of the server's socket of this connection: it lives in this process."""
    for entry in os.listdir("/proc/self/fd"):
        try:
            duplicate = os.dup(int(entry))
        except OSError:
            continue
        try:
            candidate = socket.socket(fileno=duplicate)
        except OSError:
            os.close(duplicate)
            continue
        with contextlib.suppress(OSError):
            if candidate.getpeername() == client.socket.getsockname():
                return candidate
        candidate.close()
    raise AssertionError("the server has no socket for this connection")


async def test_nodelay_from_the_beginning(tmp_path: Path) -> None:
    """ "Protocol phases": the server SHOULD set TCP_NODELAY; from accept on, so that haggling is not delayed either."""
    async with serve([Disk()], tmp_path, listen=["tcp"]) as served, served.connected() as client:
        await client.in_step()
        with servers_end(client) as end:
            assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


async def test_both_listeners_serve_one_export(tmp_path: Path) -> None:
    """One server, one set of exports, any mix of sockets."""
    async with serve([Disk()], tmp_path, listen=TRANSPORTS) as served:
        unix, tcp = served.addresses
        async with attached(unix) as one, attached(tcp) as two:
            await one.write(0, b"from the Unix socket")
            await one.flush()
            assert await two.read(0, 20) == b"from the Unix socket"


async def test_ipv6(tmp_path: Path) -> None:
    """TCP on ::1, where the host has IPv6."""
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            pass
    except OSError as error:
        pytest.skip(f"no IPv6 on this host: {error}")
    async with serve([Disk()], tmp_path, listen=["tcp6"]) as served, served.attached() as client:
        await client.still_serves()


@pytest.mark.parametrize("junk", [1, PAGE, MIB])
async def test_replies_survive_junk_after_disc(on_each_transport: OurServed, junk: int) -> None:
    """NBD_CMD_DISC, then bytes that nobody reads: every reply before it still arrives, and no reset."""
    async with on_each_transport.attached() as client:
        await client.write(0, b"d" * MIB)
        replies = [await client.submit(Command.READ, 0, MIB) for _ in range(4)]
        await client.send_disc()

        async def babble() -> None:
            with contextlib.suppress(Disconnected):
                await client.send(bytes(junk))

        babbling = asyncio.create_task(babble())
        for reply in await client.wait_all(replies):
            assert reply.data == b"d" * MIB
        await client.expect_orderly_close()
        await babbling


async def test_replies_survive_a_fatal_request(on_each_transport: OurServed) -> None:
    """A broken request with a payload behind it: the replies before it still arrive, and no reset."""
    async with on_each_transport.attached() as client:
        replies = [await client.submit(Command.WRITE, index * PAGE, payload=b"f" * PAGE) for index in range(16)]
        await client.send(client.pack_request(Command.READ, 0, 1, magic=1) + bytes(64 * PAGE))
        assert {reply.error for reply in await client.wait_all(replies)} == {Err.OK}
        await client.expect_orderly_close()


async def test_abort_ack_survives_junk(on_each_transport: OurServed) -> None:
    """NBD_OPT_ABORT with options behind it that are never read: its ACK arrives, and no reset."""
    async with on_each_transport.connected() as client:
        await client.send_option(Option.ABORT)
        with contextlib.suppress(Disconnected):
            await client.send(bytes(100_000))
        assert (await client.option_replies(Option.ABORT))[-1].type == Rep.ACK
        await client.expect_orderly_close()


@pytest.mark.parametrize("talks", [False, True])
async def test_lingering_is_bounded(on_each_transport: OurServed, talks: bool) -> None:
    """A client that does not close after NBD_CMD_DISC, silent or talking on, is left after the lingering time."""
    async with on_each_transport.attached() as client:
        await client.send_disc()
        await client.expect_orderly_close()
        async with asyncio.timeout(20):
            while on_each_transport.server.clients():
                if talks:
                    with contextlib.suppress(Disconnected):
                        await client.send(bytes(100))
                await asyncio.sleep(0.01)


async def test_closed_connections_are_forgotten(on_each_transport: OurServed) -> None:
    """However a client ends, the server does not keep its connection."""
    for way in ("close", "reset", "disc", "half close"):
        async with on_each_transport.attached() as client:
            await client.still_serves()
            if way == "reset":
                client.reset()
            elif way == "disc":
                await client.send_disc()
            elif way == "half close":
                client.half_close()
                await client.expect_orderly_close()
    await eventually(lambda: not on_each_transport.server.clients())

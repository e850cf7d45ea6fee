"""Clients are listed, told to go and kept out."""

import asyncio
import os
from pathlib import Path

import pytest

from nbdserver import server as server_module
from nbdserver.cli_clients import clients_text
from nbdserver.control_clients import ClientOperations
from objstore.access.api import KickClient
from objstore.errors import InvalidRequest, NotFound
from tests.nbdserver.volumes import TestVolume, until
from tests.support.channel import Disconnected
from tests.support.nbd_client import NbdClient
from tests.support.nbd_spec import Command, Option, Rep
from tests.support.our_server import OurServed, serve_volume

ME = f"uid:{os.getuid()}"
BLOCK = 4096


def held() -> TestVolume:
    """A volume whose requests wait for its gate."""
    volume = TestVolume()
    volume.slow = True
    volume.gate = asyncio.Event()
    return volume


def operations(served: OurServed) -> ClientOperations:
    return ClientOperations(served.server)


async def test_a_connection_is_listed_by_client_and_number(tmp_path: Path) -> None:
    async with serve_volume(TestVolume(), tmp_path) as served, served.attached(), served.connected():
        found = await operations(served).list_clients()
        assert [(one.connection, one.client, one.export) for one in found.connections] == [
            (1, ME, "disk"),
            (2, ME, None),
        ]
        assert found.fenced == []
        served.server.fences.add("address:10.0.0.5", 60.0)
        text = clients_text(await operations(served).list_clients())
        assert f"1       {ME}" in text
        assert "for 60 seconds: address:10.0.0.5" in text


async def test_a_kicked_connection_answers_what_it_has_received(tmp_path: Path) -> None:
    volume = held()
    assert volume.gate is not None
    async with serve_volume(volume, tmp_path) as served, served.attached() as kicked, served.attached() as other:
        reply = await kicked.submit(Command.WRITE, 0, payload=b"k" * BLOCK)
        await until(lambda: volume.calls)
        kicking = asyncio.create_task(operations(served).kick_client(KickClient(client="1")))
        await until(lambda: served.server.clients()[0].state == "closing")
        assert not kicking.done()
        volume.gate.set()
        assert not (await kicked.wait(reply)).error
        await kicked.expect_close()
        kicked.close()
        answer = await kicking
        assert (answer.client, answer.closed, answer.settled) == (ME, 1, True)
        volume.slow = False
        assert await other.read(0, BLOCK) == b"k" * BLOCK
    async with serve_volume(TestVolume(), tmp_path) as served, served.attached(), served.attached():
        assert (await operations(served).kick_client(KickClient(client=ME))).closed == 2


async def test_a_kicked_connection_that_does_not_end_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "KICK_SECONDS", 0.05)
    volume = held()
    assert volume.gate is not None
    async with serve_volume(volume, tmp_path) as served, served.attached() as kicked:
        await kicked.submit(Command.WRITE, 0, payload=b"k" * BLOCK)
        await until(lambda: volume.calls)
        assert (await operations(served).kick_client(KickClient(client=ME))).closed == 1
        with pytest.raises(Disconnected):
            await kicked.next_reply()
        volume.gate.set()
    assert bytes(volume._data[:BLOCK]) == bytes(BLOCK)


async def test_nothing_of_a_fenced_client_happens_any_more(tmp_path: Path) -> None:
    volume = held()
    assert volume.gate is not None
    async with serve_volume(volume, tmp_path) as served:
        async with served.attached() as fenced, served.connected() as haggling:
            await fenced.submit(Command.WRITE, 0, payload=b"f" * BLOCK)
            await until(lambda: volume.calls)
            fencing = asyncio.create_task(operations(served).kick_client(KickClient(client="1", fence=True)))
            with pytest.raises(Disconnected):
                await fenced.next_reply()
            with pytest.raises(Disconnected):
                await haggling.exports()
            assert not fencing.done()  # the write is still on its way
            volume.gate.set()
            answer = await fencing
            assert (answer.closed, answer.settled) == (2, True)
            assert bytes(volume._data[:BLOCK]) == bytes(BLOCK)
        async with served.connected() as again:
            assert (await again.go("disk")).final == Rep.ERR_POLICY
            assert await again.exports() == [("disk", "in memory")]
            await operations(served).unfence_client(ME)
            assert (await again.go("disk")).accepted
        with pytest.raises(NotFound):
            await operations(served).unfence_client(ME)


async def test_a_fence_says_when_something_of_the_client_may_still_happen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "KICK_SECONDS", 0.05)
    volume = held()
    assert volume.gate is not None
    async with serve_volume(volume, tmp_path) as served, served.attached() as fenced:
        await fenced.submit(Command.FLUSH)
        await fenced.submit(Command.WRITE, 0, payload=b"f" * BLOCK)
        await until(lambda: volume.calls)
        answer = await operations(served).kick_client(KickClient(client=ME, fence=True, seconds=60.0))
        assert not answer.settled
        volume.gate.set()


async def test_what_can_not_be_kicked(tmp_path: Path) -> None:
    async with serve_volume(TestVolume(), tmp_path) as served:
        ask = operations(served).kick_client
        assert (await ask(KickClient(client="address:10.0.0.1"))).closed == 0
        with pytest.raises(NotFound, match="connection 7"):
            await ask(KickClient(client="7"))
        for wrong in (
            KickClient(client="somebody"),
            KickClient(client=ME, seconds=1.0),
            KickClient(client=ME, fence=True, seconds=0.0),
            KickClient(client=ME, fence=True, seconds=float("nan")),
        ):
            with pytest.raises(InvalidRequest):
                await ask(wrong)


async def test_an_export_name_of_a_fenced_client_ends_the_connection(tmp_path: Path) -> None:
    """EXPORT_NAME has no reply that says why."""
    async with serve_volume(TestVolume(), tmp_path) as served:
        served.server.fences.add(ME)
        client = await NbdClient.connect(served.address)
        await client.greet()
        await client.send_option(Option.EXPORT_NAME, b"disk")
        await client.expect_close()
        client.close()

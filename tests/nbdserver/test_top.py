"""The live view of a server."""

import argparse
import json
from typing import Any

import pytest

from nbdserver.cli_top import Look, activity, activity_text, cut, top
from objstore.access.api import Clients, ClientStatus, ServerStatus, Status
from objstore.units import MIB
from objstore.volume.status import VdiStatus
from tests.nbdserver.fake_store import FakeStore


def connection(number: int, requests: int, *, client: str = "uid:7", export: str | None = "disk") -> ClientStatus:
    return ClientStatus(
        connection=number,
        client=client,
        peer=f"unix:/s#{number}",
        export=export,
        state="transmission",
        connected_seconds=1.0,
        request_count=requests,
        error_count=number,
        in_flight=2,
        received_bytes=requests * 100,
        sent_bytes=requests * MIB,
    )


async def looks(before: list[ClientStatus], now: list[ClientStatus]) -> tuple[Look, Look]:
    store = FakeStore()
    vdi = await store.create_vdi("disk", MIB)
    status = Status(server=ServerStatus(pid=1, listen=[], clients=2), store=await store.status())
    return Look(10.0, status, [vdi], before), Look(12.0, status, [vdi], now)


async def test_rates_are_those_between_two_looks() -> None:
    before = [connection(1, 100), connection(2, 10, client="uid:8", export="other@1"), connection(3, 9)]
    now = [connection(1, 300), connection(2, 10, client="uid:8", export="other@1"), connection(4, 50)]
    now.append(connection(5, 0, client="uid:8", export=None))
    found = activity(*(await looks(before, now)), 1_700_000_000.0)
    disk, other = found.vdis
    assert (disk.name, disk.connections, disk.requests_per_second, disk.in_flight) == ("disk", 2, 125.0, 4)
    assert (disk.received_bytes_per_second, disk.sent_bytes_per_second) == (12_500.0, 125.0 * MIB)
    assert (other.name, other.requests_per_second) == ("other@1", 0.0)
    busy, idle = found.clients
    assert (busy.client, busy.exports, busy.connections, busy.error_count) == ("uid:7", ["disk"], 2, 5)
    assert (idle.client, idle.connections, idle.exports) == ("uid:8", 2, ["other@1"])
    text = activity_text(found)
    assert "ok  dirty 0 of 64M" in text
    assert "disk     2     125    12.2K  125M   4" in text
    assert "/srv/a" in text


async def test_no_clients_and_no_time_between() -> None:
    before, now = await looks([], [])
    found = activity(before, Look(before.at, now.status, now.vdis, now.clients), 0.0)
    assert found.vdis == found.clients == []
    assert activity_text(found)


def test_the_view_fits_on_the_screen() -> None:
    text = "\n".join("x" * 200 for _ in range(100))
    shown = cut(text, 80, 24).split("\n")
    assert len(shown) == 23
    assert {len(line) for line in shown} == {80}


class FakeServer:
    """Answers what `top` asks; `fails` ends it as Ctrl-C does."""

    def __init__(self, status: Status, vdis: list[VdiStatus], looks_max: int) -> None:
        self._status = status
        self._vdis = vdis
        self._left = looks_max

    def status(self, *, thorough: bool = True) -> Status:
        assert not thorough
        if not self._left:
            raise KeyboardInterrupt
        self._left -= 1
        return self._status

    def vdis(self) -> list[VdiStatus]:
        return self._vdis

    def clients(self) -> Clients:
        return Clients(connections=[connection(1, 100 - self._left)], fenced=[])


async def shown(arguments: dict[str, Any], looks_max: int, capsys: pytest.CaptureFixture[str]) -> str:
    _, now = await looks([], [])
    server: Any = FakeServer(now.status, now.vdis, looks_max)
    slept: list[float] = []
    top(server, argparse.Namespace(interval=0.5, **arguments), slept.append)
    assert set(slept) == {0.5}
    return capsys.readouterr().out


async def test_once_is_one_look_over_an_interval(capsys: pytest.CaptureFixture[str]) -> None:
    assert "disk" in await shown({"once": True, "json": False}, 2, capsys)
    found = json.loads(await shown({"once": True, "json": True}, 2, capsys))
    assert found["vdis"][0]["requests_per_second"] > 0
    assert found["zones"][0]["path"] == "/srv/a"


async def test_it_goes_on_until_somebody_stops_it(capsys: pytest.CaptureFixture[str]) -> None:
    lines = (await shown({"once": False, "json": True}, 4, capsys)).splitlines()
    assert len(lines) == 3
    assert all(json.loads(line)["health"] == "ok" for line in lines)

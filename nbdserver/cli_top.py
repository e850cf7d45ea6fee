"""`sheepfold top`: what the VDIs, clients and zones of a running server do just now, again and again."""

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import Final

from msgspec import Struct

from nbdserver.cli_output import json_line, table
from nbdserver.control_client import ControlClient
from objstore.access.api import ClientStatus, Status
from objstore.units import format_size
from objstore.volume.status import VdiStatus, ZoneStatus

CLEAR: Final = "\x1b[H\x1b[2J"
"""Cursor to the corner, screen empty (ECMA-48)."""


class VdiActivity(Struct, frozen=True, kw_only=True):
    """One VDI or snapshot in use. Rates are those of its connections since the look before."""

    name: str
    connections: int
    requests_per_second: float
    received_bytes_per_second: float
    sent_bytes_per_second: float
    in_flight: int
    dirty_bytes: int
    last_flush: float | None


class ClientActivity(Struct, frozen=True, kw_only=True):
    """One client with all its connections."""

    client: str
    exports: list[str]
    connections: int
    requests_per_second: float
    received_bytes_per_second: float
    sent_bytes_per_second: float
    in_flight: int
    error_count: int


class Activity(Struct, frozen=True, kw_only=True):
    """One look at a server. seconds: since the look before."""

    time: float
    seconds: float
    health: str
    reasons: list[str]
    dirty_bytes: int
    dirty_bytes_max: int
    vdis: list[VdiActivity]
    clients: list[ClientActivity]
    zones: list[ZoneStatus]


class Look(Struct, frozen=True):
    """What a server said at one moment (monotonic seconds)."""

    at: float
    status: Status
    vdis: list[VdiStatus]
    clients: list[ClientStatus]


class _Sum:
    """The connections that belong together, and what they did since the look before."""

    def __init__(self) -> None:
        self.connections: list[ClientStatus] = []
        self.requests = self.received = self.sent = 0

    def add(self, now: ClientStatus, before: ClientStatus | None) -> None:
        self.connections.append(now)
        self.requests += now.request_count - (before.request_count if before else 0)
        self.received += now.received_bytes - (before.received_bytes if before else 0)
        self.sent += now.sent_bytes - (before.sent_bytes if before else 0)

    @property
    def in_flight(self) -> int:
        return sum(one.in_flight for one in self.connections)


def activity(before: Look, now: Look, wall: float) -> Activity:
    """What happened between two looks. wall: Unix time of the second one."""
    seconds = max(now.at - before.at, 1e-3)
    known = {one.connection: one for one in before.clients}
    exports: dict[str, _Sum] = {}
    clients: dict[str, _Sum] = {}
    for one in now.clients:
        if one.export is not None:
            exports.setdefault(one.export, _Sum()).add(one, known.get(one.connection))
        clients.setdefault(one.client, _Sum()).add(one, known.get(one.connection))
    vdis = {vdi.name: vdi for vdi in now.vdis}
    store = now.status.store
    return Activity(
        time=wall,
        seconds=seconds,
        health=store.health,
        reasons=store.reasons,
        dirty_bytes=store.dirty_bytes,
        dirty_bytes_max=store.dirty_bytes_max,
        vdis=[_vdi(name, found, vdis, seconds) for name, found in sorted(exports.items(), key=_busiest)],
        clients=[_client(name, found, seconds) for name, found in sorted(clients.items(), key=_busiest)],
        zones=store.zones,
    )


def _busiest(item: tuple[str, _Sum]) -> tuple[int, str]:
    return -item[1].requests, item[0]


def _vdi(name: str, found: _Sum, vdis: Mapping[str, VdiStatus], seconds: float) -> VdiActivity:
    vdi = vdis.get(name)
    return VdiActivity(
        name=name,
        connections=len(found.connections),
        requests_per_second=found.requests / seconds,
        received_bytes_per_second=found.received / seconds,
        sent_bytes_per_second=found.sent / seconds,
        in_flight=found.in_flight,
        dirty_bytes=vdi.dirty_bytes if vdi else 0,
        last_flush=vdi.last_flush if vdi else None,
    )


def _client(name: str, found: _Sum, seconds: float) -> ClientActivity:
    return ClientActivity(
        client=name,
        exports=sorted({one.export for one in found.connections if one.export is not None}),
        connections=len(found.connections),
        requests_per_second=found.requests / seconds,
        received_bytes_per_second=found.received / seconds,
        sent_bytes_per_second=found.sent / seconds,
        in_flight=found.in_flight,
        error_count=sum(one.error_count for one in found.connections),
    )


def activity_text(found: Activity) -> str:
    """For people: a line about the store, then VDIs, clients and zones."""
    head = (
        f"{time.strftime('%H:%M:%S', time.localtime(found.time))}  {found.health}"
        f"  dirty {format_size(found.dirty_bytes)} of {format_size(found.dirty_bytes_max)}"
    )
    rates = ("REQ/S", "IN/S", "OUT/S", "IN FLIGHT")
    vdis: list[tuple[str, ...]] = [("VDI", "CONN", *rates, "DIRTY", "FLUSHED")]
    for vdi in found.vdis:
        flushed = "-" if vdi.last_flush is None else f"{max(0.0, found.time - vdi.last_flush):.0f} s ago"
        vdis.append((vdi.name, str(vdi.connections), *_rates(vdi), format_size(vdi.dirty_bytes), flushed))
    clients: list[tuple[str, ...]] = [("CLIENT", "CONN", *rates, "ERRORS", "EXPORTS")]
    for one in found.clients:
        clients.append(
            (one.client, str(one.connections), *_rates(one), str(one.error_count), " ".join(one.exports) or "-")
        )
    zones: list[tuple[str, ...]] = [("ZONE", "STATE", "LAG", "READ ERRORS", "PATH")]
    for zone in found.zones:
        zones.append((str(zone.number), zone.state, f"{zone.lag_seconds:.1f} s", str(zone.read_errors), zone.path))
    return "\n\n".join(("\n".join([head, *found.reasons]), table(vdis), table(clients), table(zones)))


def _rates(of: VdiActivity | ClientActivity) -> tuple[str, ...]:
    return (
        f"{of.requests_per_second:.0f}",
        format_size(round(of.received_bytes_per_second)),
        format_size(round(of.sent_bytes_per_second)),
        str(of.in_flight),
    )


def cut(text: str, columns: int, lines: int) -> str:
    """As much of it as fits on a screen."""
    return "\n".join(line[:columns] for line in text.split("\n")[: max(1, lines - 1)])


def look(server: ControlClient) -> Look:
    """Ask the server once, for what it has at hand."""
    return Look(time.monotonic(), server.status(thorough=False), server.vdis(), server.clients().connections)


def top(server: ControlClient, arguments: argparse.Namespace, sleep: Callable[[float], None] = time.sleep) -> None:
    """Show what happens until Ctrl-C, or once; one JSON object a line with --json."""
    before = look(server)
    try:
        while True:
            sleep(arguments.interval)
            now = look(server)
            _show(activity(before, now, time.time()), as_json=arguments.json, once=arguments.once)
            if arguments.once:
                return
            before = now
    except KeyboardInterrupt:
        return


def _show(found: Activity, *, as_json: bool, once: bool) -> None:
    if as_json:
        print(json_line(found), flush=True)
    elif sys.stdout.isatty() and not once:
        size = shutil.get_terminal_size()
        print(CLEAR + cut(activity_text(found), size.columns, size.lines), end="", flush=True)
    else:
        print(activity_text(found), end="\n" if once else "\n\n", flush=True)

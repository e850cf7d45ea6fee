"""What commands print: JSON for programs (records of objstore.volume.status), aligned text for people."""

import time
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from nbdserver.control_api import Status
from objstore.units import format_size
from objstore.volume.status import VdiStatus


def print_json(value: Any) -> None:
    """One document, indented, unless it is printed as one line of several (see `json_line`)."""
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def json_line(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def vdi_table(vdis: Sequence[VdiStatus]) -> str:
    header = ("NAME", "SIZE", "DATA", "COPIES", "MODE", "STATE", "ATTACHED")
    rows = [
        (
            vdi.name,
            format_size(vdi.size_bytes),
            format_size(vdi.live_bytes),
            str(vdi.copies),
            vdi.mode,
            vdi.state,
            str(vdi.attached),
        )
        for vdi in vdis
    ]
    return _table([header, *rows])


def vdi_details(vdi: VdiStatus) -> str:
    return _fields(
        [
            ("name", vdi.name),
            ("size", f"{format_size(vdi.size_bytes)} ({vdi.size_bytes} bytes)"),
            ("data", format_size(vdi.live_bytes)),
            ("copies", str(vdi.copies)),
            ("mode", vdi.mode),
            ("state", vdi.state + (f": {vdi.reason}" if vdi.reason else "")),
            ("attached", str(vdi.attached)),
            ("dirty", format_size(vdi.dirty_bytes)),
            ("last flush", "none since the store was opened" if vdi.last_flush is None else _moment(vdi.last_flush)),
            ("created", _moment(vdi.created)),
            ("id", str(vdi.vdi_id)),
            ("log", str(vdi.log)),
        ]
    )


def status_text(status: Status) -> str:
    store, server = status.store, status.server
    fields = [("health", store.health)]
    fields += [("reason", reason) for reason in store.reasons]
    if server is None:
        fields.append(("server", "not running"))
    else:
        fields.append(("server", f"process {server.pid} since {_moment(store.started)}, {server.clients} connections"))
        fields += [("listener", listener) for listener in server.listen]
    if store.unclean_stop is not None:
        fields.append(("unclean stop", store.unclean_stop))
    fields += [
        ("store", f"{store.store_id}, format {store.format_version}, epoch {store.epoch}"),
        ("VDIs", str(store.vdis)),
        ("dirty", f"{format_size(store.dirty_bytes)} of {format_size(store.dirty_bytes_max)}"),
    ]
    header = ("ZONE", "STATE", "USED", "FREE", "EPOCH", "PATH")
    zones = [
        (
            zone.id[:8],
            zone.state + (f": {zone.reason}" if zone.reason else ""),
            format_size(zone.used_bytes),
            format_size(zone.free_bytes),
            str(zone.epoch),
            zone.path,
        )
        for zone in store.zones
    ]
    return _fields(fields) + "\n\n" + _table([header, *zones])


def _moment(unix_time: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_time))


def _fields(fields: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"{key + ':':<14}{value}" for key, value in fields)


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )

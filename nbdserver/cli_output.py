"""What commands print: JSON for programs (records of objstore.volume.status), aligned text for people."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from objstore.access.api import Status
from objstore.units import format_size
from objstore.volume.status import (
    JobStatus,
    LimitStatus,
    RecoveryStatus,
    ScrubStatus,
    SnapshotStatus,
    StoreInfo,
    TrashStatus,
    VdiDamage,
    VdiStatus,
    ZoneStatus,
)

T = TypeVar("T")


def print_json(value: Any) -> None:
    """One document, indented, unless it is printed as one line of several (see `json_line`)."""
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def show(value: T, text: Callable[[T], str], *, as_json: bool) -> None:
    """Print what a command has found."""
    if as_json:
        print_json(value)
    else:
        print(text(value))


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
            "importing" if vdi.importing else "suspended" if vdi.suspended else vdi.state,
            str(vdi.attached),
        )
        for vdi in vdis
    ]
    return table([header, *rows])


def vdi_details(vdi: VdiStatus) -> str:
    return _fields(
        [
            ("name", vdi.name),
            ("size", f"{format_size(vdi.size_bytes)} ({vdi.size_bytes} bytes)"),
            ("data", format_size(vdi.live_bytes)),
            ("kept", f"{format_size(vdi.kept_bytes)} because of snapshots"),
            ("copies", str(vdi.copies)),
            ("mode", vdi.mode),
            ("state", vdi.state + (f": {vdi.reason}" if vdi.reason else "")),
            *([("suspended", f"{vdi.suspended}; `vdi resume` ends it")] if vdi.suspended else []),
            ("attached", str(vdi.attached)),
            ("dirty", format_size(vdi.dirty_bytes)),
            ("last flush", "none since the store was opened" if vdi.last_flush is None else _moment(vdi.last_flush)),
            ("created", _moment(vdi.created)),
            ("clone of", vdi.parent or "nothing"),
            ("id", str(vdi.vdi_id)),
            ("log", str(vdi.log)),
            ("damaged", format_size(vdi.damaged_bytes)),
            ("limits", "; ".join(" ".join(line.split()) for line in limits_text(vdi.limits).splitlines())),
            ("weight", str(vdi.weight)),
        ]
    )


def range_table(rows: Sequence[Mapping[str, object]]) -> str:
    """One line for each range of a disk: offset_bytes, length_bytes, state."""
    lines = [f"{row['offset_bytes']:>16}  {row['length_bytes']:>16}  {row['state']}" for row in rows]
    return "\n".join([f"{'OFFSET':>16}  {'LENGTH':>16}  STATE", *lines])


def limits_text(limits: Mapping[str, LimitStatus]) -> str:
    """One line for each limit."""
    rows = [
        (kind, *(f"{n}" if kind.startswith("iops") else format_size(n) for n in (one.rate, one.burst)))
        for kind, one in sorted(limits.items())
    ]
    lines = [(kind, f"{rate}/s", f"bursts of {burst}" if limits[kind].burst else "") for kind, rate, burst in rows]
    return table(lines) if lines else "no limits"


def snapshot_table(snapshots: Sequence[SnapshotStatus]) -> str:
    """One line for each snapshot."""
    header = ("NAME", "INDEX", "SIZE", "CREATED", "STATE", "CLONES")
    rows = [
        (s.name, str(s.index), format_size(s.size_bytes), _moment(s.created), _snapshot_state(s), " ".join(s.clones))
        for s in snapshots
    ]
    return table([header, *rows])


def trash_table(trash: Sequence[TrashStatus]) -> str:
    """One line for each deleted VDI."""
    header = ("NAME", "ID", "SIZE", "DELETED", "KEPT UNTIL", "SPACE")
    rows = [
        (
            entry.name,
            str(entry.vdi_id),
            format_size(entry.size_bytes),
            _moment(entry.deleted),
            _moment(entry.kept_until),
            format_size(entry.file_bytes),
        )
        for entry in trash
    ]
    return table([header, *rows])


def snapshot_details(snapshot: SnapshotStatus) -> str:
    return _fields(
        [
            ("name", snapshot.name),
            ("index", str(snapshot.index)),
            ("size", f"{format_size(snapshot.size_bytes)} ({snapshot.size_bytes} bytes)"),
            ("created", _moment(snapshot.created)),
            ("state", _snapshot_state(snapshot)),
            ("clones", " ".join(snapshot.clones) or "none"),
        ]
    )


def _snapshot_state(snapshot: SnapshotStatus) -> str:
    states = ["protected"] * snapshot.protected + ["attached"] * bool(snapshot.attached)
    return ", ".join([*states, *["VDI deleted"] * snapshot.vdi_deleted]) or "-"


def job_table(jobs: Sequence[JobStatus]) -> str:
    """One line for each job."""
    rows = [("JOB", "KIND", "VDI", "STATE", "DONE", "OF", "STARTED", "LEFT")]
    for job in jobs:
        left = "" if job.seconds_left is None else _duration(job.seconds_left)
        state = job.state + (f": {job.message}" if job.message else "")
        done, total = format_size(job.bytes_done), format_size(job.bytes_total)
        rows.append((str(job.job_id), job.kind, job.vdi, state, done, total, _moment(job.started), left))
    return table(rows)


def damage_text(damage: VdiDamage) -> str:
    """One line for each range, in bytes."""
    if not damage.ranges:
        return f"no damage of {damage.name} is known"
    rows = [("OFFSET", "LENGTH"), *((str(part.offset_bytes), str(part.length_bytes)) for part in damage.ranges)]
    return table(rows) + ("" if damage.complete else "\nand more")


def scrub_text(scrub: ScrubStatus) -> str:
    """The pass under way, or the last one, in one line."""
    if scrub.running:
        share = 100 * scrub.bytes_done // scrub.bytes_total if scrub.bytes_total else 0
        text = f"{share} % of {format_size(scrub.bytes_total)}"
        if scrub.seconds_left is not None:
            text += f", about {_duration(scrub.seconds_left)} left"
    elif scrub.finished is None:
        return "none has ended yet"
    else:
        text = f"ended {_moment(scrub.finished)}"
    text += f", {scrub.copies_checked} copies checked, {scrub.copies_bad} bad, {scrub.copies_repaired} replaced"
    return text + "".join(f"; left out {reason}" for reason in scrub.skipped)


def recovery_text(recovery: RecoveryStatus) -> str:
    """What is missing and how far its recovery is, in one line."""
    if not recovery.running and not recovery.copies_missing and not recovery.problems:
        return f"nothing is missing, {recovery.copies_made} copies made"
    text = f"{recovery.copies_missing} copies missing, {recovery.copies_made} made"
    if recovery.bytes_total:
        text += f", {format_size(recovery.bytes_done)} of {format_size(recovery.bytes_total)}"
    if recovery.bytes_per_second_max:
        text += f", at most {format_size(recovery.bytes_per_second_max)} a second"
    if recovery.seconds_left is not None:
        text += f", about {_duration(recovery.seconds_left)} left"
    if recovery.objects_unreachable:
        text += f"; {recovery.objects_unreachable} objects have no copy in service"
    return text + "".join(f"; {problem}" for problem in recovery.problems)


def zone_table(zones: Sequence[ZoneStatus]) -> str:
    """One line for each zone."""
    header = ("ZONE", "ID", "STATE", "SINCE", "LAG", "WEIGHT", "USED", "FREE", "EPOCH", "PATH")
    rows = [
        (
            str(zone.number),
            zone.id[:8],
            zone.state + (f": {zone.reason}" if zone.reason else ""),
            f"epoch {zone.since_epoch}",
            f"{zone.lag_seconds:.1f} s",
            f"{zone.weight:g}",
            format_size(zone.used_bytes),
            format_size(zone.free_bytes),
            str(zone.epoch),
            zone.path,
        )
        for zone in zones
    ]
    return table([header, *rows])


def status_text(status: Status) -> str:
    store, server = status.store, status.server
    fields = [("health", store.health)]
    fields += [("reason", reason) for reason in store.reasons]
    if server is None:
        fields.append(("server", "not running"))
    else:
        fields.append(("server", f"process {server.pid} since {_moment(store.started)}, {server.clients} connections"))
        fields += [("listener", listener) for listener in server.listen]
    waiting = f", {store.map_waiting} requests wait for it" if store.map_waiting else ""
    if store.unclean_stop is not None:
        fields.append(("unclean stop", store.unclean_stop))
    fields += [
        ("store", f"{store.store_id}, format {store.format_version}, epoch {store.epoch}"),
        ("VDIs", str(store.vdis)),
        ("dirty", f"{format_size(store.dirty_bytes)} of {format_size(store.dirty_bytes_max)}"),
        ("maps", f"{format_size(store.map_bytes)} of {format_size(store.map_bytes_max)}" + waiting),
        ("scrub", scrub_text(store.scrub)),
        ("recovery", recovery_text(store.recovery)),
        ("short copies", f"{store.under_replicated} segments"),
    ]
    for name, moment in store.last_flushes.items():
        fields.append(("last flush", f"{name}: {'none since it was opened' if moment is None else _moment(moment)}"))
    for zone in store.zones:
        if zone.last_error and zone.last_error != zone.reason:
            fields.append(("last error", f"zone {zone.number}: {zone.last_error}"))
    return _fields(fields) + "\n\n" + zone_table(store.zones)


def info_text(info: StoreInfo) -> str:
    """What a store is, its zones and its epochs."""
    fields = [
        ("store", info.store_id),
        ("created", _moment(info.created)),
        ("format", str(info.format_version)),
        ("features", ", ".join(sorted({*info.features_read, *info.features_write, *info.features_check})) or "none"),
        ("epoch", str(info.epoch)),
        ("zone numbers", f"{info.next_zone} of 64 used"),
        ("segments", f"{info.segments} copies, {format_size(info.segment_bytes)}"),
        ("checkpoints", f"{info.checkpoints} copies, {format_size(info.checkpoint_bytes)}"),
    ]
    zones = [("ZONE", "SEGMENTS", "BYTES", "CHECKPOINTS", "BYTES", "PATH")]
    zones += [
        (
            str(zone.number),
            str(zone.segments),
            format_size(zone.segment_bytes),
            str(zone.checkpoints),
            format_size(zone.checkpoint_bytes),
            zone.path + (f": {zone.reason}" if zone.reason else ""),
        )
        for zone in info.zones
    ]
    epochs = [("EPOCH", "TIME", "MEMBERS", "OUT", "W", "WHY")]
    epochs += [
        (
            str(epoch.number),
            _moment(epoch.time),
            " ".join(map(str, epoch.members)),
            " ".join(map(str, epoch.out)) or "-",
            str(epoch.w),
            epoch.reason,
        )
        for epoch in info.epochs
    ]
    return "\n\n".join((_fields(fields), table(zones), table(epochs)))


def _duration(seconds: float) -> str:
    """In the unit that gives one to three digits."""
    for unit, length in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def _moment(unix_time: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_time))


def _fields(fields: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"{key + ':':<14}{value}" for key, value in fields)


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of equal length, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )

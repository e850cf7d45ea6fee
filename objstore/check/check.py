"""The check of a whole store, and its repair."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from objstore.check.catalog import Catalog, listing, read_catalog
from objstore.check.checkpoints import Frozen
from objstore.check.epochs import Line
from objstore.check.layout import Damaged
from objstore.check.log import check_log
from objstore.check.members import Store, check_superblocks, check_top, epoch_in_force, read_superblock
from objstore.check.report import Finding, Repair, Report, Severity
from objstore.check.superblocks import report_superblocks
from objstore.check.zones import DirectoryZone, ZoneReader, ZoneWriter
from objstore.errors import Unavailable

Progress = Callable[[int], object]


def check_store(zones: Sequence[ZoneReader], *, on_progress: Progress = lambda size: None) -> Report:
    """Read everything that these zones of a store hold, and say what is wrong with it. Nothing is changed.

    on_progress: called with the bytes that were looked at since the last call.
    Raises NotFound (no store), InvalidRequest (zones that don't belong together), NewerFormat, Unavailable (no zone can
    be listed). What can't be read is a finding, not an error.
    """
    left: list[ZoneReader] = [_Listed(zone) for zone in zones]
    unlisted: list[_Unlisted] = []
    while True:
        try:
            report = _check(left, on_progress)
            break
        except _Unlisted as lost:  # what it has is unknown: that is no zone that has nothing
            left = [zone for zone in left if zone.label != lost.zone]
            unlisted.append(lost)
            if not left:
                raise Unavailable(f"{lost.zone}/{lost.folder} can't be listed: {lost.text}") from lost
    for each in unlisted:
        text = f"can't be listed: {each.text}; the zone was checked as if it were missing"
        report.add(Finding(Severity.FAULT, "zone", text, each.zone, each.folder))
    return report


class _Unlisted(Exception):
    """A zone can't say what it has in a folder."""

    def __init__(self, zone: str, folder: str, text: str) -> None:
        super().__init__(zone, folder, text)
        self.zone = zone
        self.folder = folder
        self.text = text


class _Listed:
    """A zone whose lists are whole, or _Unlisted."""

    def __init__(self, zone: ZoneReader) -> None:
        self._zone = zone
        self.label = zone.label
        self.size = zone.size
        self.read = zone.read

    def list(self, folder: str) -> Sequence[str]:
        try:
            return self._zone.list(folder)
        except OSError as error:
            raise _Unlisted(self.label, folder, error.strerror or str(error)) from error


def _check(zones: Sequence[ZoneReader], on_progress: Progress) -> Report:
    report = Report()
    store = Store(list(zones), report, on_progress)
    check_superblocks(store)
    line = epoch_in_force(store)
    report_superblocks(store)
    check_top(store)
    catalog = None if line is None else read_catalog(store, line)
    if line is not None and catalog is not None:
        _check_logs(store, line, catalog)
    return report


def repair(zones: Sequence[ZoneWriter], report: Report, *, on_progress: Progress = lambda size: None) -> Report:
    """Mend what `report`, a fresh check of the same zones, knows to mend without a choice; then check again.

    The answer is the second check's report, with what was done in `repaired`. The caller holds the zones' locks.
    """
    by_label = {zone.label: zone for zone in zones}

    def mend(findings: Sequence[Finding]) -> list[str]:
        done = []
        for finding in findings:
            if finding.repair is None:
                continue
            zone = by_label[finding.zone]
            try:
                done.append(_apply(zone, finding.repair))
            except (OSError, Damaged) as error:
                done.append(f"{zone.label}/{finding.repair.name}: not repaired: {error}")
        return done

    # A zone that has no name yet was not looked at: what is wrong with the store is known when it has one.
    done = mend([finding for finding in report.findings if finding.kind == "superblock"])
    if done:
        report = check_store(zones, on_progress=on_progress)
    done += mend([finding for finding in report.findings if finding.kind != "superblock"])
    again = check_store(zones, on_progress=on_progress)
    again.repaired = done
    return again


def _apply(zone: ZoneWriter, change: Repair) -> str:
    if change.data is None:
        zone.remove(change.name)
        return f"{zone.label}/{change.name}: removed"
    zone.put(change.name, change.data())
    return f"{zone.label}/{change.name}: written anew from a good copy"


def total_bytes(zones: Sequence[ZoneReader]) -> int:
    """About as many bytes as a check will look at."""
    total = 0
    for zone in zones:
        with suppress(OSError):  # the check says it
            for top in ("log", "checkpoint"):
                for folder in zone.list(top):
                    total += sum(zone.size(f"{top}/{folder}/{name}") or 0 for name in zone.list(f"{top}/{folder}"))
    return total


def zones_of(paths: Sequence[Path]) -> list[DirectoryZone]:
    """Readers for these directories; a single one stands for all zones of its store that can be found.

    Of several, those that are no directories are left out: their store knows that it misses them.
    Unavailable: none is there. NotFound: none is a directory, or the only one is no zone. NewerFormat: of a later
    version.
    """
    found = [path for path in paths if path.is_dir()]
    zones = [DirectoryZone(path) for path in found or paths]
    if len(paths) != 1:
        return zones
    try:
        block = read_superblock(zones[0])
    except Damaged:
        return zones
    for member in block.members:
        if member.id != block.zone and Path(member.path).is_dir():
            zones.append(DirectoryZone(Path(member.path)))
    return zones


def _check_logs(store: Store, line: Line, catalog: Catalog) -> None:
    frozen: dict[int, Frozen] = {}
    for vdi in sorted(catalog.vdis.values(), key=lambda vdi: vdi.log):  # a clone's is higher than its snapshot's
        head, snapshots = catalog.heads.get(vdi.log), catalog.snapshots_in(vdi.log)
        found = check_log(store, line, vdi, head, snapshots, frozen.get(vdi.base))
        if head is not None and vdi.base and vdi.base not in frozen:  # it was opened, so that map was there
            text = "what it is a clone of can't be read"
            store.add(Severity.UNAVAILABLE if store.missing else Severity.DAMAGE, "snapshot", text, vdi=vdi.name)
        for number, snapshot in catalog.snapshots.items():
            if snapshot.log == vdi.log and snapshot.checkpoint in found:
                frozen[number] = found[snapshot.checkpoint]
        store.report.checked["VDIs"] += not vdi.hidden
    logs = {vdi.log for vdi in catalog.vdis.values()}
    for folder in ("log", "checkpoint"):
        for log in listing(store, folder, 6):
            if log in logs or (log == 0 and folder == "log"):
                continue
            _report_ownerless(store, catalog, f"{folder}/{log:06x}", log)


def _report_ownerless(store: Store, catalog: Catalog, folder: str, log: int) -> None:
    """Objects of a log that no VDI has."""
    for zone in store.everyone:
        for text in store.zones[zone].list(folder):
            name = f"{folder}/{text}"
            if log >= catalog.next_log or log == 0:
                store.add(
                    Severity.FAULT, "unknown", "belongs to a log that the catalog does not know", zone=zone, name=name
                )
            elif log in catalog.garbage:
                text = "belongs to a deleted VDI; the next start goes on removing it"
                store.add(Severity.NOTE, "orphan", text, zone=zone, name=name, repair=Repair(zone, name))
            else:
                text = "belongs to a VDI whose deletion was complete"
                store.add(Severity.FAULT, "orphan", text, zone=zone, name=name, repair=Repair(zone, name))

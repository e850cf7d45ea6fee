"""A zone whose superblock can't be read: which zone of the store it is, and its superblock, where there is no choice.

The zones that are here tell who is missing; headers of segments list the zones that hold them. A directory most of
whose segments were made for one missing zone and for no other missing one is that zone. Copies that recovery put there
later list others, so a majority has to do; what the zone is believed about afterwards goes by checksums and epochs.
"""

from collections import Counter
from collections.abc import Callable
from typing import Final

import msgspec
from crc32c import crc32c

from objstore.check.documents import DOCUMENT_BYTES_MAX, Member, document
from objstore.check.layout import PAGE, VERSION, Damaged, Owner, segment_header
from objstore.check.members import Store
from objstore.check.report import Finding, Repair, Severity
from objstore.check.zones import ZoneReader

HEADERS_MAX: Final = 256
"""Segments of one zone that are asked."""


def report_superblocks(store: Store) -> None:
    """Zones that are not here for want of a superblock, with a repair where it is clear which they are."""
    found = {zone.label: _missing_zone(store, zone) for zone, _ in store.nameless}
    for zone, problem in store.nameless:
        member = found[zone.label]
        alone = member is not None and sum(other is not None and other.id == member.id for other in found.values()) == 1
        repair = Repair(-1, "superblock", _writer(store, member)) if member is not None and alone else None
        text = problem if repair is None or member is None else f"{problem}; it is zone {member.number}"
        store.report.add(Finding(Severity.FAULT, "superblock", text, zone.label, "superblock", repair=repair))


def _missing_zone(store: Store, zone: ZoneReader) -> Member | None:
    """The one missing zone that this must be."""
    seen = 0
    listed: Counter[int] = Counter()
    for folder in zone.list("log"):
        for name in zone.list(f"log/{folder}"):
            if seen >= HEADERS_MAX:
                break
            try:
                page = zone.read(f"log/{folder}/{name}", 0, PAGE)
                header = segment_header(page, Owner(store.id, int(folder, 16)), int(name, 16))
            except (Damaged, OSError, ValueError):
                continue
            seen += 1
            listed.update(number for number, member in store.missing.items() if member.id in header.zones)
    likely = [number for number, count in listed.items() if count * 2 > seen]
    return store.missing[likely[0]] if len(likely) == 1 else None


def _writer(store: Store, member: Member) -> Callable[[], bytes]:
    """Makes the zone's superblock from another one's: only the identity differs, and where it lies is a hint."""

    def data() -> bytes:
        fields = document(store.load(0, "superblock", DOCUMENT_BYTES_MAX) or b"", "superblock")
        fields["zone"], fields["number"] = member.id.hex(), member.number
        text = msgspec.json.encode(fields)
        return b"SHEEPFOLD superblock %d crc32c=%08x\n%s\n" % (VERSION, crc32c(text), text)

    return data

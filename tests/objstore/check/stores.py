"""Stores for the check: made by the product in memory, then damaged by hand."""

from collections.abc import Sequence

from objstore.check.check import check_store, repair
from objstore.check.layout import PAGE
from objstore.check.report import Finding, Report, Severity
from tests.support.check_zones import ObjectZone
from tests.support.disks import ModelDisk
from tests.support.stepping import World, turns

LOG = "log/000001/"
CATALOG = "log/000000/"
CHECKPOINT = "checkpoint/000001/"


class Checked:
    """A store that no process has open, and what the check says of it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.zones = [ObjectZone(f"/zone{index}", storage.objects) for index, storage in enumerate(world.storages)]

    def check(self, zones: Sequence[int] | None = None) -> Report:
        """zones: those that are given to the check, otherwise all."""
        return check_store(self.zones if zones is None else [self.zones[zone] for zone in zones])

    def repair(self) -> Report:
        return repair(self.zones, self.check())

    def names(self, start: str, zone: int = 0) -> list[str]:
        return sorted(name for name in self.zones[zone].objects if name.startswith(start))

    def holders(self, name: str) -> list[int]:
        """Zones that have the object."""
        return [index for index, zone in enumerate(self.zones) if name in zone.objects]

    def has_records(self, name: str) -> bool:
        """Whether any copy of a segment has a record."""
        return any(self.zones[zone].objects[name][PAGE : PAGE + 8] == b"SHEEPREC" for zone in self.holders(name))

    def flip(self, name: str, offset: int, *, zones: Sequence[int] | None = None, bit: int = 1) -> None:
        """Turn over a bit of an object. offset: negative counts from the end."""
        for zone in self.holders(name) if zones is None else zones:
            self.zones[zone].objects[name][offset] ^= bit

    def newest(self, start: str) -> str:
        """The object of the highest number that any zone has."""
        return max(name for zone in range(len(self.zones)) for name in self.names(start, zone))

    def snapshot(self) -> list[dict[str, bytes]]:
        """All bytes of all zones."""
        return [{name: bytes(data) for name, data in zone.objects.items()} for zone in self.zones]


async def used_store(*, zones: int = 3, clean: bool = True, rounds: int = 3, copies: int = 2) -> Checked:
    """A store with a past: two VDIs, one of them overwritten so that segments died, several checkpoints."""
    world = World(zones)
    store = await world.open(create=True)
    disk = await ModelDisk(world, blocks=512).create(copies=copies)
    await store.create_vdi("idle", 1 << 20, copies=zones)
    for _ in range(rounds):
        await disk.churn(60)
        for _ in range(4):  # records of their own, in one segment
            await disk.churn(1, blocks_max=4)
            await disk.vdi.flush()
        await disk.vdi.keeper.checkpoint()
        await turns()
    await disk.churn(30)
    await disk.vdi.flush()
    await (world.stop() if clean else world.kill())
    return Checked(world)


def faults(report: Report) -> list[Finding]:
    """Everything that is not a note."""
    return [finding for finding in report.findings if finding.severity is not Severity.NOTE]


def named(report: Report) -> set[tuple[str, str]]:
    """(zone, object) of everything that is not a note."""
    return {(finding.zone, finding.name) for finding in faults(report)}

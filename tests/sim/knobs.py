"""What a run of seeds varies on request: how often a scenario meets each fault. One instance holds for a whole run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Knobs:
    """Shares are of lives, those named `seeds_...` of seeds; 0 = never, 1 = always.

    kills: the process is killed, instead of the power failing. cut_after_kill: of the lives after a kill, those in
    which the power fails soon after opening. eio: a zone answers EIO. eio_call: once, to that call ("": to any, once or
    from then on). slow_reads: reads take up to seconds, while everything else goes on. slow_purges: so does the removal
    of a deleted VDI. crash_phase: where crashes come ("": anywhere). crash_names: crashes come while the names of a
    folder of objects are made durable ("": anywhere), say "checkpoint/".
    flips: one bit in one copy of something rots, at rest or while clients are served; all of a seed in one zone.
    seeds_tight: the zones are small. seeds_recycled: the zones write over the files that were freed.
    seeds_one_copy: no VDI has a second copy, so whatever goes wrong in a zone shows.
    seeds_zone_faults: one zone is in trouble in one of the ways `zone_kinds`, see zone_faults.py; there is nothing else
    wrong with zones then.
    seeds_changes: disks get other names and sizes, clones are flattened, see changes.py.
    seeds_zones: seeds of zone_scenario.py; of them, zone_changes have an administrator who changes zones, the others
    several zones in trouble.
    """

    kills: float = 0.4
    cut_after_kill: float = 0.4
    eio: float = 0.1
    eio_call: str = ""
    slow_reads: float = 0.15
    slow_purges: float = 0.15
    crash_phase: str = ""
    crash_names: str = ""
    flips: float = 0.1
    seeds_tight: float = 0.15
    seeds_recycled: float = 0.5
    seeds_one_copy: float = 0.0
    seeds_zone_faults: float = 0.3
    seeds_changes: float = 0.25
    seeds_zones: float = 0.2
    zone_changes: float = 0.5
    zone_kinds: tuple[str, ...] = ("eio", "hang", "lie", "missing", "backup", "wiped")


DEFAULT = Knobs()

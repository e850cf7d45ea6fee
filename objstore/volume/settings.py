"""What an administrator may set about a store; each field is a key of the configuration file's [store] table.

Checked once, here: a StoreSettings that exists is valid.
"""

from dataclasses import dataclass, fields
from typing import Final

from objstore.errors import InvalidRequest
from objstore.units import BLOCK_BYTES, GIB, KIB, MIB, TIB, format_size

LIMIT_KINDS: Final = ("iops", "iops-read", "iops-write", "bytes", "bytes-read", "bytes-write")
"""What of a VDI's clients can be limited: operations and bytes a second, together or of one direction."""
WEIGHT_DEFAULT: Final = 100
WEIGHT_MAX: Final = 10_000
MODES: Final = ("writeback", "writeback-always", "writethrough", "unsafe")
"""When a write of a VDI is acknowledged; the first is the default."""

_BOUNDS: Final[dict[str, tuple[float, float]]] = {
    "dirty_bytes_max": (1 * MIB, 16 * GIB),
    "dirty_age_seconds": (0.05, 60.0),
    "segment_bytes": (256 * KIB, 16 * MIB),  # the map's 12 bits of block number reach 4,096 blocks
    "recycle_bytes_max": (0, 16 * GIB),
    "zone_deadline_seconds": (0.5, 60.0),
    "write_wait_seconds": (0.0, 600.0),
    "map_memory_bytes": (4 * MIB, 64 * GIB),
    "scrub_days": (0.0, 366.0),
    "recovery_bytes_max": (0, 1 * TIB),
    "min_copies": (0, 64),
    "trash_days": (0.0, 3660.0),
}


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """Limits of one open store, all VDIs together.

    dirty_bytes_max: acknowledged data that is not yet durable; at the limit writes go at the speed of the zones.
    dirty_age_seconds: data no flush asked for goes to the zones at this age.
    segment_bytes: a segment of new data is sealed at this size (whole blocks).
    map_memory_bytes: memory for the block maps of all VDIs.
    recycle_bytes_max: freed segment files that each zone keeps to write again instead of making new ones; 0 = none.
    recovery_bytes_max: bytes a second that recovery copies at most; 0 = as fast as the zones allow.
    scrub_days: every copy of everything is read and checked once in so many days; 0 = only when asked for.
    zone_deadline_seconds: a zone that owes data longer than this is put out, if enough others are there.
    trash_days: a VDI that is deleted is kept in the trash for so many days; 0 = it is deleted for good at once.
    write_wait_seconds: where too few zones are left, writes wait so long for one to come back before they fail.
    min_copies: a VDI takes writes while so many of its copies are in service; 0 = one less than its copies, at least 1.
    Raises InvalidRequest, naming the field and its range.
    """

    dirty_bytes_max: int = 64 * MIB
    dirty_age_seconds: float = 1.0
    segment_bytes: int = 8 * MIB
    map_memory_bytes: int = 64 * MIB
    recycle_bytes_max: int = 256 * MIB
    scrub_days: float = 14.0
    recovery_bytes_max: int = 0
    min_copies: int = 0
    trash_days: float = 0.0
    zone_deadline_seconds: float = 5.0
    write_wait_seconds: float = 30.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            lowest, highest = _BOUNDS[field.name]
            if not lowest <= value <= highest:
                raise InvalidRequest(
                    f"{field.name} = {value} is out of range: {_shown(lowest)} to {_shown(highest)} is possible"
                )
        if self.segment_bytes % BLOCK_BYTES:
            raise InvalidRequest(f"segment_bytes = {self.segment_bytes} is not a multiple of {BLOCK_BYTES}")


def _shown(bound: float) -> str:
    return f"{bound:g}" if isinstance(bound, float) else format_size(bound)


def check_mode(mode: str) -> None:
    """InvalidRequest unless `mode` is one of MODES."""
    if mode not in MODES:
        raise InvalidRequest(f"mode {mode!r} does not exist; there are {', '.join(MODES)}")

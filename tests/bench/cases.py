"""The named cases: what fio does in each, and what the result is to be compared with."""

from dataclasses import dataclass
from typing import Final

KIB: Final = 1 << 10
MIB: Final = 1 << 20

QEMU, NBDKIT, QUORUM = "qemu-raw", "nbdkit-file", "qemu-quorum"


@dataclass(frozen=True)
class Goal:
    """Ours is to reach at least `ratio` times the best of `peers`."""

    ratio: float
    peers: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.ratio:g}x {' or '.join(self.peers)}"


@dataclass(frozen=True)
class FioCase:
    """One load that fio makes.

    in_megabytes: the result is MB/s, else requests per second. whole_export: writes it once instead of for a given
    time; turns: writes so many times its size instead. fresh: on an empty disk each time.
    """

    name: str
    title: str
    options: dict[str, str]
    goals: tuple[Goal, ...] = ()
    in_megabytes: bool = False
    whole_export: bool = False
    turns: int = 0
    fresh: bool = False
    note: str = ""

    @property
    def unit(self) -> str:
        return "MB/s" if self.in_megabytes else "1/s"

    @property
    def writes(self) -> bool:
        return "write" in self.options["rw"]


def _random(rw: str, depth: int, **more: str) -> dict[str, str]:
    return {"rw": rw, "bs": "4k", "iodepth": str(depth), **more}


FIO_CASES: Final = (
    FioCase(
        "first-fill",
        "1 MiB sequential write QD8 to an empty disk, with the final fsync",
        {"rw": "write", "bs": "1m", "iodepth": "8", "end_fsync": "1"},
        in_megabytes=True,
        whole_export=True,
        fresh=True,
    ),
    FioCase("read-qd1", "4K random read QD1", _random("randread", 1), (Goal(1.5, (QEMU,)), Goal(1.0, (NBDKIT,)))),
    FioCase("read-qd32", "4K random read QD32", _random("randread", 32), (Goal(1.5, (QEMU,)), Goal(1.0, (NBDKIT,)))),
    FioCase("read-4x8", "4K random read, 4 connections x QD8", _random("randread", 8, numjobs="4")),
    FioCase("read-128k", "128K random read QD16", {"rw": "randread", "bs": "128k", "iodepth": "16"}, in_megabytes=True),
    FioCase(
        "seqread",
        "1 MiB sequential read QD8",
        {"rw": "read", "bs": "1m", "iodepth": "8"},
        (Goal(1.5, (QEMU,)), Goal(0.9, (NBDKIT,))),
        in_megabytes=True,
    ),
    FioCase(
        "write-qd1",
        "4K random write QD1",
        _random("randwrite", 1),
        (Goal(1.5, (QEMU, NBDKIT)), Goal(4.0, (QUORUM,))),
    ),
    FioCase(
        "write-qd32",
        "4K random write QD32",
        _random("randwrite", 32),
        (Goal(1.5, (QEMU, NBDKIT)), Goal(4.0, (QUORUM,))),
    ),
    FioCase("write-long", "4K random write QD32, twice the disk", _random("randwrite", 32), turns=2),
    FioCase("write-4x8", "4K random write, 4 connections x QD8", _random("randwrite", 8, numjobs="4")),
    FioCase(
        "write-flush32",
        "4K random write QD32, flush per 32",
        _random("randwrite", 32, fsync="32"),
        (Goal(1.2, (QEMU, NBDKIT)), Goal(4.0, (QUORUM,))),
        note="fio repeats the flush until the first one is answered",
    ),
    FioCase("write-flush1", "4K write + flush each", _random("randwrite", 1, fsync="1"), (Goal(1.8, (QUORUM,)),)),
    FioCase(
        "seqwrite",
        "1 MiB sequential write QD8 over old data, with the final fsync",
        {"rw": "write", "bs": "1m", "iodepth": "8", "end_fsync": "1"},
        (Goal(1.0, (QUORUM,)),),
        in_megabytes=True,
        whole_export=True,
    ),
)


CPU: Final = "cpu"
CPU_CASES: Final = ("read-qd1", "read-qd32", "write-qd1", "write-qd32")
COPIES_CASES: Final = ("scrub", "recovery", "degraded", "pause", "library", "metrics", "hostile")
TLS: Final = "tls"
QUALITY_CASES: Final = ("limits", "shares")
LIVES_CASES: Final = ("snapshot", "clone-chain", "discard", "many", "export-diff")
NAMES: Final = (
    *(case.name for case in FIO_CASES),
    CPU,
    "open-clean",
    "open-crash",
    "open-long",
    "space",
    "rss",
    *COPIES_CASES,
    *LIVES_CASES,
    *QUALITY_CASES,
    TLS,
)

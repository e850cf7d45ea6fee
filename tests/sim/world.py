"""Zones that can lose power, a process that can die at any system call or loop turn, and counts of where it did."""

from __future__ import annotations

import errno
import os
import random
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from tests.support.fakefs import Crash, FakeFileSystem
from tests.support.sim_executor import SimExecutor
from tests.support.sim_loop import SimLoop

PHASES: Final = (
    "open",
    "recovery",
    "verify",
    "serving",
    "checkpoint",
    "collection",
    "create",
    "delete",
    "snapshot",
    "rollback",
    "shutdown",
)
CHANGE_PHASES: Final = ("change", "flatten")
"""Another name, size or attribute of a disk; a clone that is flattened."""
ZONE_PHASES: Final = ("zones", "copying")
"""A change of zones that an administrator asked for; a pass of recovery."""
CRASH_CALLS: Final = (
    "open",
    "close",
    "preadv",
    "pwritev",
    "start_writeback",
    "fdatasync",
    "fsync",
    "posix_fallocate",
    "ftruncate",
    "rename",
    "link",
    "unlink",
    "mkdir",
    "rmdir",
    "listdir",
    "stat",
    "fstat",
    "fstatvfs",
    "lock_exclusive",
)


ALL_CALLS: Final = (*CRASH_CALLS, "reopen", "posix_fadvise", "is_locked")


@dataclass
class Trigger:
    """When the process dies: at the `count`-th system call (of that name; "step" = turn of the loop) in that phase.

    folder: only calls with a descriptor count, whose path begins so.
    """

    phase: str | None
    call: str | None
    count: int
    folder: str = ""

    def __str__(self) -> str:
        return f"{self.call or 'call'} {self.folder}{self.count} in {self.phase or 'any phase'}"


@dataclass
class Failing:
    """A zone that begins to fail: after `count` more calls of that name while clients are served, one of them answers
    EIO, or (lasting) all writes and syncs."""

    zone: int
    call: str
    count: int
    lasting: bool


FAILING_CALLS: Final = ("pwritev", "fdatasync", "fsync")


class World:
    """Zones and the present process. One seed, one sequence of events."""

    def __init__(self, seed: int, zones: int, *, spare: int = 0, trace: Callable[[str], None] | None = None) -> None:
        """zones: of the store when it is made. spare: further file systems, on which zones can be added."""
        self.rng = random.Random(seed)
        self.zones_first = zones
        shared = seed % 3 == 0  # zones on one device sync in one thread
        self.zones = [
            FakeFileSystem(rng=random.Random(seed * 64 + z), device=1 if shared else 1 + z)
            for z in range(zones + spare)
        ]
        for z, fs in enumerate(self.zones):
            fs.make_folder(f"/zone{z}")
            fs.before_call = self._hook(z)
        self.trace = trace
        self.digest = 0
        self.crashes: Counter[tuple[str, str]] = Counter()
        self.faults: Counter[str] = Counter()
        self.active: Counter[str] = Counter()
        self.phase = "open"
        self.trigger: Trigger | None = None
        self.dead = False
        self.failing: Failing | None = None
        self.zone_failed = False
        self.failing_zones: set[int] = set()
        self.zone_rots = False
        self.loop: SimLoop | None = None
        self.executor: SimExecutor | None = None
        self.calls = 0

    def note(self, text: str) -> None:
        """One event: part of the digest, shown by --trace."""
        self.digest = zlib.crc32(text.encode(), self.digest)
        self.show(text)

    def show(self, text: str) -> None:
        """One line of --trace."""
        if self.trace is not None:
            now = self.loop.now if self.loop is not None else 0.0
            self.trace(f"{now:12.6f} {text}")

    # the process

    def start_process(self, slow_seconds: list[float], now: float) -> SimLoop:
        """A new process: its loop and its executor."""
        self.dead = False
        self.failing = None
        self.zone_failed = False
        self.failing_zones = set()
        self.active.clear()
        self.loop = SimLoop(now)
        if self.trigger is not None and self.trigger.call == "step":
            self.loop.on_step = self._step
        self.new_executor(slow_seconds)
        return self.loop

    def new_executor(self, slow_seconds: list[float]) -> SimExecutor:
        """For another try to open the store: a failed one closes its executor."""
        assert self.loop is not None
        self.slow_seconds = slow_seconds
        executor = self.executor = SimExecutor(self.loop, random.Random(self.rng.getrandbits(64)), slow_seconds)
        if self.trace is not None:
            executor.on_job = lambda zone, function: self.show(f"  zone {zone} runs {_name(function)}")
        return executor

    def phases(self) -> list[str]:
        """What is under way."""
        return [self.phase, *sorted(phase for phase, count in self.active.items() if count)]

    def die(self, call: str) -> None:
        """The process ends here."""
        assert self.loop is not None
        assert self.executor is not None
        phases = self.phases()
        for phase in phases:
            self.crashes[phase, call] += 1
        self.note(f"DIES at {call} in {'+'.join(phases)} ({self.trigger})")
        self.dead = self.executor.dead = True
        self.trigger = None
        self.loop.stop_now()

    def bury(self, mode: str) -> None:
        """Clear away the dead process and, if the power failed, what was not synced."""
        assert self.loop is not None
        assert self.dead
        self.loop.discard()
        for fs in self.zones:
            fs.crash(mode)
        self.note(f"CRASH {mode}")
        self.faults[f"crash-{mode}"] += 1

    def end_process(self, *, power: bool = False) -> None:
        """The process ended by itself: descriptors are closed as by kill, nothing is lost. power: it fails then."""
        assert self.loop is not None
        assert self.executor is not None
        self.dead = self.executor.dead = True
        self.loop.discard()
        for fs in self.zones:
            fs.crash("power" if power else "kill")

    # where it can die

    def _matches(self, call: str) -> bool:
        trigger = self.trigger
        if trigger is None or (trigger.call is not None and trigger.call != call):
            return False
        if trigger.phase is not None and trigger.phase != self.phase and not self.active[trigger.phase]:
            return False
        trigger.count -= 1
        return trigger.count <= 0

    def _step(self) -> None:
        trigger = self.trigger
        if trigger is not None and trigger.call == "step" and self._matches("step"):
            self.die("step")

    def _hook(self, zone: int) -> Callable[[str, tuple[Any, ...]], int | None]:
        codes = {name: zlib.crc32(b"%d %s" % (zone, name.encode())) for name in ALL_CALLS}

        def before_call(name: str, args: tuple[Any, ...]) -> int | None:
            if self.dead:
                raise Crash
            self.calls += 1
            self.digest = (self.digest * 31 ^ codes[name]) & 0xFFFFFFFF
            if self.trace is not None:
                self.show(f"    zone {zone} {name} {self._shown(zone, name, args)}")
            if self.failing is not None:
                self._maybe_fail(zone, name)
            if zone in self.failing_zones and name in FAILING_CALLS:
                self.faults[f"eio-{name}"] += 1
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            trigger = self.trigger
            if trigger is None or (trigger.call is not None and trigger.call != name):
                return None
            if trigger.folder and not self.zones[zone].path_of(args[0]).startswith(trigger.folder):
                return None
            if not self._matches(name):
                return None
            self.die(name)
            applied_bytes = 0
            if name == "pwritev":
                applied_bytes = self.rng.choice((0, 1 << 30, self.rng.randrange(1 << 17)))
            raise Crash(applied_bytes)

        return before_call

    def _maybe_fail(self, zone: int, name: str) -> None:
        failing = self.failing
        assert failing is not None
        if failing.zone != zone or self.phase != "serving":
            return
        if name == failing.call:
            failing.count -= 1
        if failing.count <= 0 and (name == failing.call or (failing.lasting and name in FAILING_CALLS)):
            self.note(f"EIO zone {zone} {name}")
            self.faults[f"eio-{name}"] += 1
            self.zone_failed = True
            if not failing.lasting:
                self.failing = None
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def _shown(self, zone: int, name: str, args: tuple[Any, ...]) -> str:
        fs = self.zones[zone]
        if name in ("preadv", "pwritev"):
            fd, buffers, offset, flags = args
            length = sum(buffer.nbytes for buffer in buffers)
            return f"{_path(fs, fd)} {offset}+{length} flags={flags}"
        if args and isinstance(args[0], int):
            return f"{_path(fs, args[0])} {args[1:]}"
        return str(args)

    def files(self, zone: int) -> set[str]:
        """Every file of a zone."""
        return set(self.zones[zone].paths_below(f"/zone{zone}"))


def _name(function: Any) -> str:
    return str(getattr(getattr(function, "func", function), "__name__", function))


def _path(fs: FakeFileSystem, fd: int) -> str:
    try:
        return f"{fd}={fs.path_of(fd)}"
    except KeyError:
        return f"{fd}=closed"

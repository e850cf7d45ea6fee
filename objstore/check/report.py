"""What a check found: findings by severity, bounded in number, and the verdict that follows from them."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

FINDINGS_MAX: Final = 1000
"""Findings kept of each severity; those behind are counted. A lost disk would otherwise fill memory with its blocks."""


class Severity(StrEnum):
    """How bad a finding is, the worst first."""

    DAMAGE = "damage"
    """Something flushed can't be read from any copy, or the store contradicts itself."""
    UNAVAILABLE = "unavailable"
    """Can't be judged or read without a zone that is missing."""
    FAULT = "fault"
    """A copy is bad or missing, or something lies where it doesn't belong; no data is lost."""
    NOTE = "note"
    """An ordinary leftover, e.g. of a crash; the next opening clears it away."""


class Verdict(StrEnum):
    """The worst severity that was found, notes apart."""

    CLEAN = "clean"
    FAULTS = "faults"
    UNAVAILABLE = "unavailable"
    DAMAGE = "damage"


@dataclass(frozen=True)
class Repair:
    """What would mend a finding without any choice: write `data()` as an object of a zone, or remove the object.

    zone: index of the zone. data: None = remove; raises OSError or Damaged if the good copy can no longer be read.
    """

    zone: int
    name: str
    data: Callable[[], bytes] | None = None


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be.

    kind: a word that programs may rely on. zone: path, empty = the store as a whole. name: the object, if it is one.
    vdi: name of the VDI concerned. ranges: (first block, blocks) of that VDI whose data is lost.
    """

    severity: Severity
    kind: str
    text: str
    zone: str = ""
    name: str = ""
    vdi: str = ""
    ranges: Sequence[tuple[int, int]] = ()
    repair: Repair | None = None

    def __str__(self) -> str:
        place = "/".join(part for part in (self.zone, self.name) if part)
        owner = f"VDI {self.vdi}: " if self.vdi else ""
        return f"{owner}{place}: {self.text}" if place else f"{owner}{self.text}"


@dataclass
class Report:
    """Everything that one check has to say. checked: counters of what was read."""

    store: str = ""
    epoch: int = 0
    zones: list[tuple[int, str, str]] = field(default_factory=list)
    """(number, path, state), state one of "checked", "missing"."""
    findings: list[Finding] = field(default_factory=list)
    counts: Counter[Severity] = field(default_factory=Counter)
    checked: Counter[str] = field(default_factory=Counter)
    repaired: list[str] = field(default_factory=list)

    def add(self, finding: Finding) -> None:
        self.counts[finding.severity] += 1
        if self.counts[finding.severity] <= FINDINGS_MAX:
            self.findings.append(finding)

    def of(self, severity: Severity) -> list[Finding]:
        """Those kept of one severity, in the order in which they were found."""
        return [finding for finding in self.findings if finding.severity is severity]

    @property
    def verdict(self) -> Verdict:
        if self.counts[Severity.DAMAGE]:
            return Verdict.DAMAGE
        if self.counts[Severity.UNAVAILABLE]:
            return Verdict.UNAVAILABLE
        return Verdict.FAULTS if self.counts[Severity.FAULT] else Verdict.CLEAN

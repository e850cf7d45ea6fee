"""`sheepfold check`: the offline check of a store, its text and JSON, and the exit code that follows from it."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from nbdserver.cli_progress import progress_bar
from objstore.check.check import check_store, repair, total_bytes, zones_of
from objstore.check.report import Finding, Report, Severity, Verdict
from objstore.check.zones import all_locked
from objstore.units import format_size

EXIT_CODES: Final = {Verdict.CLEAN: 0, Verdict.FAULTS: 9, Verdict.UNAVAILABLE: 7, Verdict.DAMAGE: 8}
"""README.md, "Exit codes"."""


def check(arguments: argparse.Namespace, paths: Sequence[Path]) -> int:
    """Check the store of these zones, print what was found, return the exit code.

    Busy: a server has the store open. Nothing is written without --repair.
    """
    zones = zones_of(paths)
    with all_locked(zones, exclusive=arguments.repair):
        with progress_bar("checking", total_bytes(zones)) as on_progress:
            report = check_store(zones, on_progress=on_progress)
        if arguments.repair and any(finding.repair for finding in report.findings):
            with progress_bar("repairing", total_bytes(zones)) as on_progress:
                report = repair(zones, report, on_progress=on_progress)
    if arguments.json:
        from nbdserver.cli_output import print_json

        print_json(as_json(report))
    else:
        print("\n".join(as_text(report, verbose=arguments.verbose)))
    return EXIT_CODES[report.verdict]


def as_json(report: Report) -> dict[str, Any]:
    """Everything, with keys that stay stable."""
    return {
        "verdict": report.verdict,
        "store_id": report.store,
        "epoch": report.epoch,
        "zones": [{"number": number, "path": path, "state": state} for number, path, state in report.zones],
        "findings": [_finding(finding) for finding in report.findings],
        "counts": {severity: report.counts[severity] for severity in Severity},
        "checked": dict(report.checked),
        "repaired": report.repaired,
    }


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        "severity": finding.severity,
        "kind": finding.kind,
        "text": finding.text,
        "zone": finding.zone or None,
        "object": finding.name or None,
        "vdi": finding.vdi or None,
        "ranges": [{"first_block": first, "blocks": blocks} for first, blocks in finding.ranges],
        "repairable": finding.repair is not None,
    }


def as_text(report: Report, *, verbose: bool) -> list[str]:
    """Lines for people, the verdict last."""
    lines = [f"store {report.store}, epoch {report.epoch}"]
    lines += [f"zone {number}  {state}  {path}" for number, path, state in report.zones]
    lines += [f"repair: {text}" for text in report.repaired]
    for severity in Severity:
        notes = severity is Severity.NOTE
        found = report.of(severity)
        if not notes or verbose:
            lines += [f"{severity}: {finding}" for finding in found]
        hidden = report.counts[severity] - (len(found) if not notes or verbose else 0)
        if hidden and notes and not verbose:
            lines.append(f"{hidden} ordinary leftovers, which the next start clears away (--verbose lists them)")
        elif hidden:
            lines.append(f"{severity}: {hidden} more")
    return [*lines, _verdict(report)]


def _verdict(report: Report) -> str:
    checked = report.checked
    read = (
        f"{checked['VDIs']} VDIs, {checked['segment copies']} copies of segments and {checked['checkpoint copies']} of "
        f"checkpoints, {format_size(checked['bytes'])} read"
    )
    if report.verdict is Verdict.CLEAN:
        return f"clean: {read}"
    counts = [f"{report.counts[severity]} {severity}" for severity in Severity if severity is not Severity.NOTE]
    mendable = sum(f.repair is not None and f.severity is not Severity.NOTE for f in report.findings)
    advice = f"; --repair mends {mendable}" if mendable else ""
    return f"{report.verdict}: {', '.join(text for text in counts if not text.startswith('0 '))}{advice} ({read})"

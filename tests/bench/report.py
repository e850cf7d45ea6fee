"""The results as a table, as JSON and as a chart."""

import html
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tests.bench.cases import CPU_CASES, FioCase, Goal
from tests.bench.fio import Measurement
from tests.bench.servers import KINDS

COLOURS: Final = {
    "sheepfold": "#2a78b5",
    "sheepfold-memory": "#2a78b5",
    "nbdkit-file": "#8a8a8a",
    "nbdkit-memory": "#c4c4c4",
    "qemu-raw": "#d98e2b",
    "qemu-quorum": "#a8442f",
}
ROW_HEIGHT, BAR_HEIGHT, LABEL_WIDTH, CHART_WIDTH, HEAD = 14, 10, 330, 520, 68
RATIO_MAX: Final = 2.0


@dataclass
class Row:
    """A case and what each server reached in each round."""

    case: FioCase
    points: dict[str, list[Measurement]] = field(default_factory=dict)

    def values(self, server: str) -> list[float]:
        return [point.value(self.case) for point in self.points[server]]

    def median(self, server: str) -> float:
        return statistics.median(self.values(server))

    def ratio(self, ours: str, peers: Sequence[str]) -> float | None:
        """Ours over the best of these peers; None if one of them did not run."""
        if ours not in self.points or any(peer not in self.points for peer in peers):
            return None
        return self.median(ours) / max(self.median(peer) for peer in peers)


@dataclass
class Single:
    """A result that is one number with a limit, or without (`met` None)."""

    name: str
    text: str
    limit: str
    met: bool | None
    data: dict[str, Any]
    least: bool = False
    """The limit is the least that is wanted, not the most."""


def _amount(value: float) -> str:
    if value >= 100_000:
        return f"{value / 1000:.0f}k"
    if value >= 10_000:
        return f"{value / 1000:.1f}k"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _verdict(goal: Goal, ratio: float | None) -> str:
    if ratio is None:
        return f"{goal}: not measured"
    return f"{goal}: {ratio:.2f}x {'met' if ratio >= goal.ratio else 'MISSED'}"


def table(rows: Sequence[Row], singles: Sequence[Single], servers: Sequence[str], ours: str) -> str:
    """Text for a terminal: medians, spread (least - most), ours over each peer, goals."""
    lines = []
    for row in rows:
        lines.append(f"{row.case.name}: {row.case.title} [{row.case.unit}]")
        if row.case.note:
            lines.append(f"    ({row.case.note})")
        for server in servers:
            if server not in row.points:
                continue
            values = row.values(server)
            spread = f"{_amount(min(values))} - {_amount(max(values))}"
            ratio = row.ratio(ours, (server,)) if server != ours else None
            p99 = statistics.median(point.p99_seconds for point in row.points[server]) * 1e6
            lines.append(
                f"    {KINDS[server].title:27} {_amount(row.median(server)):>8}  {spread:19} p99 {p99:8.0f} us"
                + (f"   ours is {ratio:.2f}x" if ratio is not None else "")
            )
        lines.extend(f"    goal {_verdict(goal, row.ratio(ours, goal.peers))}" for goal in row.case.goals)
    costly = [row for row in rows if row.case.name in CPU_CASES]
    if costly:
        lines.append("CPU time of the server per request [us]")
        for row in costly:
            costs = [
                f"{server} {statistics.median(p.cpu_seconds_per_request for p in row.points[server]) * 1e6:.1f}"
                for server in servers
                if server in row.points
            ]
            lines.append(f"    {row.case.name:12} {', '.join(costs)}")
    for single in singles:
        bound = "at least" if single.least else "at most"
        verdict = "" if single.met is None else f" ({bound} {single.limit}: {'met' if single.met else 'MISSED'})"
        lines.append(f"{single.name}: {single.text}{verdict}")
    return "\n".join(lines)


def as_json(rows: Sequence[Row], singles: Sequence[Single], ours: str, about: dict[str, Any]) -> dict[str, Any]:
    """Everything measured, in one object."""
    return {
        **about,
        "cases": {
            row.case.name: {
                "title": row.case.title,
                "unit": row.case.unit,
                "note": row.case.note,
                "options": row.case.options,
                "goals": [
                    {"at_least": goal.ratio, "peers": goal.peers, "reached": row.ratio(ours, goal.peers)}
                    for goal in row.case.goals
                ],
                "servers": {
                    server: {
                        "median": row.median(server),
                        "least": min(row.values(server)),
                        "most": max(row.values(server)),
                        "rounds": [
                            {name: getattr(point, name) for name in Measurement.__dataclass_fields__}
                            for point in points
                        ],
                    }
                    for server, points in row.points.items()
                },
            }
            for row in rows
        },
        "singles": {
            single.name: {
                "text": single.text,
                "at_least" if single.least else "at_most": single.limit,
                "met": single.met,
                **single.data,
            }
            for single in singles
        },
    }


def chart(rows: Sequence[Row], servers: Sequence[str], ours: str, machine: str, note: str) -> str:
    """An SVG: per case each server's median over ours, with the spread; longer is faster, ours is at 1."""
    body: list[str] = []
    y = HEAD
    scale = CHART_WIDTH / RATIO_MAX
    for row in rows:
        if ours not in row.points:
            continue
        base = row.median(ours)
        shown = [server for server in servers if server in row.points]
        body.append(f'<text x="8" y="{y + 11}" class="case">{html.escape(row.case.title)}</text>')
        y += ROW_HEIGHT + 4
        for server in shown:
            low, middle, high = (f(row.values(server)) / base for f in (min, statistics.median, max))
            width = min(middle, RATIO_MAX) * scale
            label = f"{_amount(row.median(server))} {row.case.unit}, {middle:.2f}"
            centre = y + BAR_HEIGHT / 2
            body.append(f'<text x="{LABEL_WIDTH - 6}" y="{y + 9}" class="server">{KINDS[server].title}</text>')
            body.append(
                f'<rect x="{LABEL_WIDTH}" y="{y}" width="{width:.1f}" height="{BAR_HEIGHT}" fill="{COLOURS[server]}"/>'
            )
            left, right = (LABEL_WIDTH + min(edge, RATIO_MAX) * scale for edge in (low, high))
            body.append(f'<path d="M{left:.1f} {centre}H{right:.1f}" class="spread"/>')
            body.append(f'<text x="{max(LABEL_WIDTH + width, right) + 6:.1f}" y="{y + 9}">{label}</text>')
            y += ROW_HEIGHT
        y += 8
    one = LABEL_WIDTH + scale
    width, height = LABEL_WIDTH + CHART_WIDTH + 150, y + 10
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="10"><style>.case{{font-weight:bold;font-size:11px}}.server{{text-anchor:end}}'
        f".spread{{stroke:#000;stroke-width:1}}</style>"
        f'<rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="8" y="20" font-size="15">{KINDS[ours].title} = 1, longer is faster</text>'
        f'<text x="8" y="38">{html.escape(machine)}</text><text x="8" y="52">{html.escape(note)}</text>'
        f'<path d="M{one:.1f} {HEAD - 6}V{y}" stroke="#2a78b5" stroke-dasharray="3 3"/>' + "".join(body) + "</svg>\n"
    )

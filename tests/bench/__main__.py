"""Compare our server with the NBD servers installed here: python -m tests.bench [NAME...]

Every server keeps its disk on the same file system and is driven by fio's nbd engine over a Unix socket, one load at
a time, in an order that alternates from round to round. Disks are filled first, and the fill ends with a flush: our
VDI is in write-back mode from then on (fio itself sends a flush only where a case says so). Between two points the
disk that was loaded is flushed, the file system synced and the server left alone until it rests, so that nobody pays
for another's dirty pages or collection. What a point of some seconds shows is therefore a burst after a rest;
write-long shows what goes on for long.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from tests.bench import copies, diffs, faults, fio, hostile, library, lives, metered, ours, quality, report, tls
from tests.bench.cases import COPIES_CASES, CPU, CPU_CASES, FIO_CASES, LIVES_CASES, NAMES, QUALITY_CASES, TLS, FioCase
from tests.bench.report import Row, Single
from tests.bench.servers import KINDS, REPOSITORY, Server
from tests.bench.sizes import size
from tests.support.powercut_control import why_not

NOTE: Final = (
    "filled first, the fill ended with a flush: our VDI is in write-back mode, as the page cache is for the others; "
    "fio sends no further flush unless the case says so; every server rested before each point"
)
FILL: Final = next(case for case in FIO_CASES if case.name == "first-fill")
MEMORY_FILE_SYSTEMS: Final = frozenset({"tmpfs", "ramfs"})
RSS_BYTES_MAX: Final = 400 << 20
OPEN_SECONDS_MAX: Final = 2.0
P99_RATIO_MAX: Final = 3.0
SCRUB_RATIO_MIN, SCRUB_P99_RATIO_MAX = 0.7, 1.2
RECOVERY_RATIO_MIN, RECOVERY_P99_RATIO_MAX = 0.6, 2.0
LIBRARY_RATIO_MIN = 2.0
METRICS_RATIO_MAX: Final = 1.03
HOSTILE_RATIO_MIN: Final = 0.9
TLS_RATIO_MIN = 0.7
LIMIT_ERROR_MAX, SHARE_RATIO_MIN, READ_P99_RATIO_MAX = 0.05, 0.9, 3.0
PAUSE_SECONDS_MAX, HANG_SECONDS_MAX = 0.1, 0.5
SNAPSHOT_RATIO_MAX, SNAPSHOT_SECONDS_MAX = 1.2, 0.05
AFTER_SNAPSHOT_RATIO_MIN, CHAIN_RATIO_MIN = 0.9, 0.95
DISCARD_SECONDS_MAX: Final = 2.0
EXPORT_SECONDS_MAX: Final = 5.0
MANY_SECONDS_MAX: Final = {"start": 3.0, "command": 0.5, "exports": 0.02}
MANY_RSS_BYTES_MAX: Final = 500 << 20
DEGRADED_RATIOS_MIN: Final = {"write": 0.9, "read": 0.95}


def _spread(values: Sequence[float], factor: float) -> str:
    """Median, and the least and the most of several."""
    scaled = [value * factor for value in values]
    middle = statistics.median(scaled)
    return f"{middle:.0f}" if len(values) < 2 else f"{middle:.0f} ({min(scaled):.0f}-{max(scaled):.0f})"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    peers = [name for name in KINDS if not name.startswith("sheepfold")]
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"cases to run (default: all): {', '.join(NAMES)}")
    parser.add_argument("--rounds", type=int, default=5, help="points per case and server (default 5)")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a timed point (default 3)")
    parser.add_argument("--size", type=size, default=1 << 30, help="size of the export (default 1G)")
    parser.add_argument("--peers", default=",".join(peers), help="comma-separated; empty for none (default: all)")
    parser.add_argument("--ours", default="sheepfold", choices=[name for name in KINDS if name not in peers])
    parser.add_argument("--dir", type=Path, help="where the disks lie, a real file system (default: system temp dir)")
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="results (default: bench-results)")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of the table")
    parser.add_argument("--log-bytes", type=size, default=4 << 30, help="open-crash: bytes written (default 4G)")
    parser.add_argument("--long-log-bytes", type=size, default=64 << 30, help="open-long: log (default 64G)")
    parser.add_argument("--vdis", type=int, default=1000, help="many: VDIs (default 1000)")
    parser.add_argument("--snapshots", type=int, default=10, help="many: snapshots of each (default 10)")
    parser.add_argument("--turns", type=int, default=8, help="space: how often to overwrite the disk (default 8)")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.names) - set(NAMES))
    if unknown:
        parser.error(f"no such case: {', '.join(unknown)}; there are {', '.join(NAMES)}")
    options.names = options.names or list(NAMES)
    options.peers = [peer for peer in options.peers.split(",") if peer]
    unknown = sorted(set(options.peers) - set(peers))
    if unknown:
        parser.error(f"no such peer: {', '.join(unknown)}; there are {', '.join(peers)}")
    if shutil.which("fio") is None:
        parser.error("fio is not installed: apt-get install fio")
    options.dir = options.dir or Path(tempfile.gettempdir())
    kind = file_system(options.dir)
    if kind in MEMORY_FILE_SYSTEMS:
        parser.error(f"{options.dir} is on {kind}; name a directory on a real file system with --dir")
    return options


def file_system(directory: Path) -> str:
    """Type of the file system below a directory, e.g. ext4."""
    command = ["findmnt", "--noheadings", "--output", "FSTYPE", "--target", str(directory)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Bench:
    """The servers of one run, all up from `fill` to `close`."""

    def __init__(self, options: argparse.Namespace, data: Path, sockets: Path) -> None:
        self.options = options
        self.ours: str = options.ours
        names = [options.ours]
        for peer in options.peers:
            if KINDS[peer].is_installed:
                names.append(peer)
            else:
                say(f"{peer}: {KINDS[peer].program} is not installed, left out")
        self.servers = {name: self._server(name, data, sockets) for name in names}
        self.apart = self._server(self.ours, data / "apart", sockets / "apart")
        self.data = data
        self.sockets = sockets
        self.rows: list[Row] = []
        self.singles: list[Single] = []

    def _server(self, name: str, data: Path, sockets: Path) -> Server:
        sockets.mkdir(exist_ok=True)
        return Server(KINDS[name], data / name, sockets / name, self.options.size)

    def order(self, round_number: int) -> list[Server]:
        """All servers, another one first each time, and every second time backwards."""
        servers = list(self.servers.values())
        turn = round_number % len(servers)
        servers = servers[turn:] + servers[:turn]
        return servers[::-1] if round_number % 2 else servers

    def settle(self, server: Server) -> None:
        server.flush()
        subprocess.run(["sync", "-f", str(self.data)], check=True)
        server.rest()

    def fill(self) -> None:
        for server in self.servers.values():
            say(f"fill {server.kind.name}")
            server.wipe()
            server.start()
            fio.run_case(server, FILL, 0)
            self.settle(server)

    def run_fio_case(self, case: FioCase) -> None:
        row = Row(case)
        self.rows.append(row)
        for round_number in range(self.options.rounds):
            for server in self.order(round_number):
                if case.fresh:
                    server.stop()
                    server.wipe()
                    self.settle_files()
                    server.start()
                point = fio.run_case(server, case, self.options.seconds)
                self.settle(server)
                row.points.setdefault(server.kind.name, []).append(point)
                say(f"{case.name} round {round_number + 1} {server.kind.name}: {point.value(case):.1f} {case.unit}")

    def settle_files(self) -> None:
        subprocess.run(["sync", "-f", str(self.data)], check=True)

    def run_rss(self) -> None:
        for name, server in self.servers.items():
            now, peak = server.rss_bytes()
            text = f"{now / 1e6:.0f} MB now, {peak / 1e6:.0f} MB at its peak"
            met = peak <= RSS_BYTES_MAX if name == self.ours else None
            self.singles.append(Single(f"rss {name}", text, "400 MiB", met, {"now_bytes": now, "peak_bytes": peak}))

    def run_open_clean(self) -> None:
        for name, server in self.servers.items():
            if not server.kind.keeps_data:
                continue
            times = []
            for _ in range(self.options.rounds):
                server.stop()
                times.append(server.start())
            text = f"{statistics.median(times) * 1e3:.0f} ms ({min(times) * 1e3:.0f} - {max(times) * 1e3:.0f})"
            self.singles.append(Single(f"open-clean {name}", text, "", None, {"seconds": times}))

    def run_open_crash(self) -> None:
        self.apart.size_bytes = self.options.log_bytes
        seconds = ours.open_after_crash(self.apart, self.options.log_bytes)
        self.apart.size_bytes = self.options.size
        text = f"{seconds:.2f} s after {self.options.log_bytes / 2**30:g} GiB of single-block writes"
        self.singles.append(Single("open-crash", text, "2 s", seconds < OPEN_SECONDS_MAX, {"seconds": seconds}))

    def run_open_long(self) -> None:
        result = ours.open_long(self.apart, self.options.long_log_bytes, self.options.rounds)
        seconds = statistics.median(result.seconds)
        text = (
            f"{_spread(result.seconds, 1e3)} ms behind {self.options.long_log_bytes / 2**30:g} GiB of log,"
            f" {_spread([float(value) for value in result.peak_bytes], 1e-6)} MB at the peak"
        )
        self.singles.append(Single("open-long", text, "2 s", seconds < OPEN_SECONDS_MAX, asdict(result)))
        say(f"open-long: {text}")

    def run_space(self) -> None:
        result = ours.space(self.apart, self.options.turns)
        worst = max(result.bytes_max.values(), default=0)
        in_the_end = max(result.bytes_at_end.values(), default=0)
        text = (
            f"{worst / 2**20:.0f} MiB at most, {in_the_end / 2**20:.0f} MiB in the end for"
            f" {result.live_bytes / 2**20:.0f} MiB ({result.requests_per_second:.0f} writes/s)"
        )
        limit = f"{result.limit_bytes / 2**20:.0f} MiB"
        self.singles.append(Single("space", text, limit, worst <= result.limit_bytes, asdict(result)))
        ratio = result.p99_seconds / result.p99_baseline_seconds
        text = f"{result.p99_seconds * 1e6:.0f} us, {ratio:.2f} times that of the first quarter of a turn"
        self.singles.append(Single("space-p99", text, "3 times", ratio <= P99_RATIO_MAX, {"ratio": ratio}))

    def _ratio(
        self,
        name: str,
        text: str,
        ratio: float,
        limit: float,
        *,
        most: bool = False,
        data: dict[str, Any] | None = None,
    ) -> None:
        met = ratio <= limit if most else ratio >= limit
        data = {"ratio": ratio, **(data or {})}
        self.singles.append(Single(name, text, f"{limit:g} times", met, data, least=not most))
        say(f"{name}: {text}")

    def run_scrub(self) -> None:
        result = copies.scrub(self.apart, self.options.rounds, self.options.seconds)
        self._beside("scrub", "a plain loop", result, SCRUB_RATIO_MIN, SCRUB_P99_RATIO_MAX)

    def run_recovery(self) -> None:
        result = copies.recovery(self.apart, self.options.rounds, self.options.seconds)
        self._beside("recovery", "cp -r and sync", result, RECOVERY_RATIO_MIN, RECOVERY_P99_RATIO_MAX)

    def _beside(self, name: str, peer: str, result: copies.BesideResult, least: float, p99_most: float) -> None:
        text = (
            f"{_spread(result.rates, 1e-6)} MB/s, {result.ratio:.2f} times {peer}"
            f" ({_spread(result.peer_rates, 1e-6)} MB/s)"
        )
        self._ratio(name, text, result.ratio, least, data=asdict(result))
        text = (
            f"{_spread(result.beside, 1e6)} us, {result.p99_ratio:.2f} times that without"
            f" ({_spread(result.alone, 1e6)} us), at {_spread(result.beside_rates, 1e-6)} MB/s"
        )
        self._ratio(f"{name}-p99", text, result.p99_ratio, p99_most, most=True)

    def run_pause(self) -> None:
        reason = why_not()
        if reason is not None:
            say(f"pause: left out, {reason}")
            return
        for what, (operations, number) in {**faults.ERRORS, **faults.HANGS}.items():
            found = [faults.pause(self.apart, operations, number) for _ in range(self.options.rounds)]
            limit = PAUSE_SECONDS_MAX if number else faults.DEADLINE_SECONDS + HANG_SECONDS_MAX
            before, after = [pair[0] for pair in found], [pair[1] for pair in found]
            text = f"{_spread(after, 1e3)} ms, the longest write + flush before {_spread(before, 1e3)} ms"
            met = statistics.median(after) < limit
            self.singles.append(Single(f"pause {what}", text, f"{limit:g} s", met, {"before": before, "after": after}))
            say(f"pause {what}: {text}")

    def run_degraded(self) -> None:
        result = copies.degraded(self.apart, self.options.rounds, self.options.seconds)
        for load, limit in DEGRADED_RATIOS_MIN.items():
            values = (statistics.median(result.degraded[load]), statistics.median(result.healthy[load]))
            text = f"{values[0]:.0f}/s with two of three zones, {values[1]:.0f}/s with all"
            self._ratio(f"degraded-{load}", text, result.ratio(load), limit)

    def run_library(self) -> None:
        result = library.compare(self.apart, self.options.rounds, self.options.seconds)
        for load in library.LOADS:
            inside, over = statistics.median(result.library[load]), statistics.median(result.nbd[load])
            text = f"{inside / 1e3:.1f} k/s in process, {inside / over:.2f} times NBD ({over / 1e3:.1f} k/s)"
            self._ratio(f"library-{load}", text, inside / over, LIBRARY_RATIO_MIN)

    def run_tls(self) -> None:
        if not tls.PEER.is_installed:
            say("tls: nbdkit is not installed, left out")
            return
        result = tls.compare(self.data / "tls", self.sockets, self.options.rounds, self.options.seconds)
        for load in tls.LOADS:
            found, peer = result.ours[load], result.peer[load]
            ratio = statistics.median(found) / statistics.median(peer)
            text = f"{_spread(found, 1e-6)} MB/s, {ratio:.2f} times nbdkit ({_spread(peer, 1e-6)} MB/s)"
            self._ratio(f"tls-{load}", text, ratio, TLS_RATIO_MIN, data=asdict(result))

    def _seconds(self, name: str, values: Sequence[float], limit: float) -> None:
        text = f"{_spread(values, 1e3)} ms"
        met = statistics.median(values) < limit
        self.singles.append(Single(name, text, f"{limit:g} s", met, {"seconds": values}))
        say(f"{name}: {text}")

    def run_snapshot(self) -> None:
        result = lives.snapshots(self.apart, self.options.rounds, self.options.seconds)
        small, large = lives.SIZES
        for name, values in (("snapshot", result.snapshot), ("clone", result.clone)):
            for each, seconds in values.items():
                self._seconds(f"{name} {each}", seconds, SNAPSHOT_SECONDS_MAX)
            medians = statistics.median(values[large]), statistics.median(values[small])
            text = f"{medians[0] * 1e3:.1f} ms of {large}, {medians[1] * 1e3:.1f} ms of {small}"
            self._ratio(f"{name}-ratio", text, medians[0] / medians[1], SNAPSHOT_RATIO_MAX, most=True)
        for each in lives.SIZES:
            before, after = statistics.median(result.before[each]), statistics.median(result.after[each])
            text = f"{after / 1e3:.1f} k/s, {after / before:.2f} times that before ({before / 1e3:.1f} k/s)"
            data = {"before": result.before[each], "after": result.after[each]}
            self._ratio(f"after-snapshot {each}", text, after / before, AFTER_SNAPSHOT_RATIO_MIN, data=data)

    def run_chain(self) -> None:
        result = lives.chain(self.apart, self.options.rounds, self.options.seconds)
        flat, deep = statistics.median(result.flat), statistics.median(result.chain)
        text = f"{deep / 1e3:.1f} k/s through {lives.CHAIN} clones, {deep / flat:.2f} times flat ({flat / 1e3:.1f} k/s)"
        self._ratio("clone-chain", text, deep / flat, CHAIN_RATIO_MIN, data=asdict(result))

    def run_discard(self) -> None:
        result = lives.discard(self.apart, self.options.rounds)
        self._seconds("discard 2 TiB", result.discard, DISCARD_SECONDS_MAX)
        self._seconds("delete 2 TiB", result.delete, DISCARD_SECONDS_MAX)

    def run_many(self) -> None:
        result = lives.many(self.apart, self.options.rounds, self.options.vdis, self.options.snapshots)
        named = {"start": result.start, "command": result.command, "exports": result.exports}
        for name, values in named.items():
            self._seconds(f"many {name}", values, MANY_SECONDS_MAX[name])
        peak = max(result.rss_bytes)
        text = f"{peak / 1e6:.0f} MB at its peak; {result.opened} logs were open"
        self.singles.append(Single("many rss", text, "500 MiB", peak <= MANY_RSS_BYTES_MAX, asdict(result)))
        say(f"many rss: {text}")

    def run_export_diff(self) -> None:
        result = diffs.exports(self.apart, self.options.rounds)
        self._seconds("export-diff 1 % of 100 GiB", result.fresh, EXPORT_SECONDS_MAX)
        self._seconds("export-diff after collection", result.collected, EXPORT_SECONDS_MAX)
        say(f"export-diff: {result.stream_bytes / 1e6:.0f} MB, {result.freed} segments freed by collection between")

    def run_limits(self) -> None:
        for kind, parts in quality.limits(self.apart, self.options.rounds).items():
            middle = statistics.median(parts)
            text = f"{_spread(parts, 1000)} thousandths of the limit over {quality.LIMIT_SECONDS:g} s"
            met = abs(middle - 1) <= LIMIT_ERROR_MAX
            self.singles.append(Single(f"limit {kind}", text, "950 to 1050", met, {"parts": parts}))
            say(f"limit {kind}: {text}")

    def run_shares(self) -> None:
        result = quality.shares(self.apart, self.options.rounds, self.options.seconds)
        text = (
            f"{_spread(result.beside, 1e-3)} k/s beside {_spread(result.hammer, 1e-3)} k/s,"
            f" {result.of_share:.2f} times half of {_spread(result.alone, 1e-3)} k/s alone"
        )
        self._ratio("shares", text, result.of_share, SHARE_RATIO_MIN, data=asdict(result))
        text = f"{_spread(result.p99_beside, 1e6)} us, {_spread(result.p99_idle, 1e6)} us without writes"
        self._ratio("read-p99-beside-writes", text, result.p99_ratio, READ_P99_RATIO_MAX, most=True)

    def run_hostile(self) -> None:
        apart = self.apart
        ports = (metered.free_port(), metered.free_port())
        servers = [
            Server(
                metered.kind(apart.kind, ["--listen", f"tcp://127.0.0.1:{port}"], busy_poll=True),
                self.data / name,
                apart.socket.with_name(name),
                apart.size_bytes,
            )
            for name, port in zip(("attacked", "spared"), ports, strict=True)
        ]
        try:
            result = hostile.compare(servers[0], servers[1], ports, self.options.rounds, self.options.seconds)
        finally:
            for server in servers:
                server.stop()
        for load in hostile.LOADS:
            values = [_spread(each[load], 1e-3) for each in (result.attacked, result.spared)]
            text = f"{values[0]} k/s while others attack the server, {values[1]} while they attack another one"
            self._ratio(f"hostile-{load}", text, result.ratio(load), HOSTILE_RATIO_MIN, data=asdict(result))

    def run_metrics(self) -> None:
        port = metered.free_port()
        servers = [
            Server(
                metered.kind(self.apart.kind, more),
                self.data / name,
                self.apart.socket.with_name(name),
                self.apart.size_bytes,
            )
            for name, more in (("plain", []), ("metered", ["--metrics", f"tcp://127.0.0.1:{port}"]))
        ]
        try:
            result = metered.compare(servers[0], servers[1], port, self.options.rounds, self.options.seconds)
        finally:
            for server in servers:
                server.stop()
        for load in result.plain:
            values = [_spread(each[load], 1e9) for each in (result.metered, result.plain)]
            text = f"{values[0]} ns of processor time for a request, {values[1]} without"
            self.singles.append(Single(f"metrics {load}", text, "", None, {"ratio": result.ratio(load)}))
            say(f"metrics {load}: {text}")
        text = f"{result.mean_ratio:.3f} times the processor time for a request"
        self._ratio("metrics", text, result.mean_ratio, METRICS_RATIO_MAX, most=True, data=asdict(result))

    def run(self, names: Sequence[str]) -> None:
        wanted = set(names) | (set(CPU_CASES) if CPU in names else set())
        loads = [case for case in FIO_CASES if case.name in wanted]
        for case in loads:
            if case.fresh:
                for server in self.servers.values():
                    server.wipe()
                    server.start()
                self.run_fio_case(case)
                for server in self.servers.values():
                    server.stop()
        if any(not case.fresh for case in loads) or wanted & {"rss", "open-clean"}:
            self.fill()
        for case in loads:
            if not case.fresh:
                self.run_fio_case(case)
        if "rss" in wanted:
            self.run_rss()
        if "open-clean" in wanted:
            self.run_open_clean()
        self.close()
        if TLS in wanted:
            self.run_tls()
        if KINDS[self.ours].keeps_data:
            if "open-crash" in wanted:
                self.run_open_crash()
            if "open-long" in wanted:
                self.run_open_long()
            if "space" in wanted:
                self.run_space()
            runs = {
                "scrub": self.run_scrub,
                "recovery": self.run_recovery,
                "degraded": self.run_degraded,
                "pause": self.run_pause,
                "library": self.run_library,
                "metrics": self.run_metrics,
                "hostile": self.run_hostile,
                "snapshot": self.run_snapshot,
                "clone-chain": self.run_chain,
                "discard": self.run_discard,
                "many": self.run_many,
                "export-diff": self.run_export_diff,
                "limits": self.run_limits,
                "shares": self.run_shares,
            }
            for case in (*COPIES_CASES, *LIVES_CASES, *QUALITY_CASES):
                if case in wanted:
                    runs[case]()
        elif wanted & {"open-crash", "open-long", "space", *COPIES_CASES, *LIVES_CASES, *QUALITY_CASES}:
            say(f"{self.ours} keeps nothing: what looks into its store is left out")

    def close(self) -> None:
        for server in (*self.servers.values(), self.apart):
            server.stop()


def about(options: argparse.Namespace) -> dict[str, Any]:
    """Where and how the numbers came about."""

    def first_line(*command: str) -> str:
        if shutil.which(command[0]) is None:
            return "not installed"
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        return (done.stdout or done.stderr).strip().partition("\n")[0]

    processor = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": first_line("git", "rev-parse", "HEAD"),
        "note": NOTE,
        "machine": {
            "processor": processor[0].partition(":")[2].strip() if processor else platform.machine(),
            "cores": os.cpu_count(),
            "kernel": platform.release(),
            "file_system": file_system(options.dir),
            "python": platform.python_version(),
        },
        "versions": {
            "fio": first_line("fio", "--version"),
            "nbdkit": first_line("nbdkit", "--version"),
            "qemu-nbd": first_line("qemu-nbd", "--version"),
        },
        "rounds": options.rounds,
        "seconds": options.seconds,
        "size_bytes": options.size,
    }


def main() -> None:
    options = parse()
    with (
        tempfile.TemporaryDirectory(prefix="sheepfold-bench-", dir=options.dir) as data,
        tempfile.TemporaryDirectory(prefix="sb-") as sockets,
    ):
        bench = Bench(options, Path(data), Path(sockets))
        try:
            bench.run(options.names)
        finally:
            bench.close()
    facts = about(options)
    result = report.as_json(bench.rows, bench.singles, bench.ours, facts)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "bench.json").write_text(json.dumps(result, indent=1) + "\n")
    machine = facts["machine"]
    host = f"{machine['processor']}, {machine['cores']} cores, {machine['file_system']}, Linux {machine['kernel']}"
    chart = report.chart(bench.rows, list(bench.servers), bench.ours, host, NOTE)
    (options.out / "bench.svg").write_text(chart)
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        print(f"medians of {options.rounds} with the spread; {NOTE}")
        print(report.table(bench.rows, bench.singles, list(bench.servers), bench.ours))
        say(f"written: {options.out}/bench.json, {options.out}/bench.svg")


if __name__ == "__main__":
    main()

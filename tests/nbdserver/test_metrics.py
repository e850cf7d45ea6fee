"""The metrics endpoint, and what is built on it: dashboard and alert rules."""

import asyncio
import http.client
import json
import re
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from prometheus_client.core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from nbdserver import metrics_http
from nbdserver.meters import COMMANDS, METERS_MAX, Counts, Meter, Network
from nbdserver.metrics import HEALTHS, ZONE_STATES, Snapshot, exposition
from nbdserver.metrics_http import PORT, MetricsServer, parse_address
from nbdserver.server import Listener, Server
from nbdserver.wire.constants import Command
from objstore.errors import InvalidRequest
from objstore.units import MIB
from objstore.volume.store import Store, open_store
from tests.nbdserver.fake_store import FakeStore
from tests.support.nbd_client import attached
from tests.support.nbd_spec import Command as SpecCommand

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "systemd" / "prometheus-rules.yml"
DASHBOARD = ROOT / "systemd" / "grafana-dashboard.json"
README = (ROOT / "README.md").read_text()

Labels = dict[str, str]


@asynccontextmanager
async def metered(tmp_path: Path, vdis: int = 1) -> AsyncIterator[tuple[Store, Server, MetricsServer]]:
    store = await open_store([tmp_path / "a", tmp_path / "b"], create=True)
    for number in range(vdis):
        await store.create_vdi(f"disk{number}", MIB)
    server = Server(store)
    server.meter()
    metrics = MetricsServer(store, server.network)
    try:
        await metrics.start("tcp://127.0.0.1:0")
        await server.start([Listener.parse(f"unix://{tmp_path / 's'}")])
        yield store, server, metrics
    finally:
        await server.stop()
        await metrics.stop()
        await store.shutdown()


def get(address: tuple[str, int], *, accept: str = "", method: str = "GET", path: str = "/metrics") -> tuple[int, str]:
    connection = http.client.HTTPConnection(*address, timeout=60)
    try:
        connection.request(method, path, headers={"Accept": accept})
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


async def scrape(metrics: MetricsServer) -> dict[str, Metric]:
    status, text = await asyncio.to_thread(get, metrics.address)
    assert status == 200
    return {family.name: family for family in parse_text(text)}


def value(families: dict[str, Metric], name: str, **labels: str) -> float:
    """The one sample of that name with these labels."""
    found = [
        sample.value
        for family in families.values()
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    assert len(found) == 1, f"{name} {labels}: {found}"
    return float(found[0])


@pytest.fixture
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every scrape looks at the store."""
    monkeypatch.setattr(metrics_http, "FRESH_SECONDS", 0.0)


@pytest.mark.usefixtures("_fresh")
async def test_what_a_client_does_shows(tmp_path: Path) -> None:
    async with metered(tmp_path, 2) as (store, server, metrics):
        before = await scrape(metrics)
        assert value(before, "sheepfold_vdis") == 2
        assert not before["sheepfold_request_seconds"].samples
        assert not before["sheepfold_vdi_size_bytes"].samples
        async with attached(str(server.listeners[0]), "disk0") as client:
            await client.write(0, b"x" * 8192)
            await client.flush()
            await client.write(0, b"y" * 4096)
            await client.read(0, 4096)
            await client.call(SpecCommand.TRIM, 2 * MIB, 4096)
            found = await scrape(metrics)
            disk = {"vdi": "disk0"}
            assert value(found, "sheepfold_request_seconds_count", **disk, command="write") == 2
            assert value(found, "sheepfold_request_seconds_bucket", **disk, command="write", le="+Inf") == 2
            assert value(found, "sheepfold_request_seconds_sum", **disk, command="flush") > 0
            assert value(found, "sheepfold_request_bytes_total", **disk, command="write") == 12288
            assert value(found, "sheepfold_request_bytes_total", **disk, command="read") == 4096
            assert value(found, "sheepfold_request_errors_total", **disk, error="EINVAL") == 1
            assert value(found, "sheepfold_vdi_connections", **disk) == 1
            assert value(found, "sheepfold_requests_in_flight", **disk) == 0
            assert value(found, "sheepfold_vdi_size_bytes", **disk) == MIB
            assert value(found, "sheepfold_vdi_dirty_bytes", **disk) == store.vdi("disk0").dirty_bytes
            assert value(found, "sheepfold_vdi_last_flush_timestamp_seconds", **disk) == store.vdi("disk0").last_flush
            assert value(found, "sheepfold_connections", phase="transmission") == 1
            assert value(found, "sheepfold_connections_accepted_total") == 1
            assert value(found, "sheepfold_health", state="ok") == 1
            assert value(found, "sheepfold_zone_state", path=str(tmp_path / "b"), state="in") == 1
            assert value(found, "process_max_fds") > 0
            assert "disk1" not in [s.labels.get("vdi") for family in found.values() for s in family.samples]


@pytest.mark.usefixtures("_fresh")
async def test_the_state_of_a_zone_shows(tmp_path: Path) -> None:
    async with metered(tmp_path) as (store, _server, metrics):
        await store.set_copies("disk0", 1)
        await store.change_zones("drain", str(tmp_path / "b"))
        found = await scrape(metrics)
        assert value(found, "sheepfold_zone_state", path=str(tmp_path / "b"), state="draining") == 1
        assert value(found, "sheepfold_zone_state", path=str(tmp_path / "b"), state="in") == 0


@pytest.mark.usefixtures("_fresh")
async def test_the_zones_space_comes_with_a_later_scrape(tmp_path: Path) -> None:
    async with metered(tmp_path) as (_store, _server, metrics):
        await scrape(metrics)
        while metrics._measuring is not None:
            await asyncio.wait([metrics._measuring])
        found = await scrape(metrics)
        assert value(found, "sheepfold_zone_free_bytes", zone="0") > 0
        assert value(found, "sheepfold_zone_used_bytes", zone="0") > 0


async def test_scrapes_at_the_same_time_look_once(tmp_path: Path) -> None:
    async with metered(tmp_path) as (store, _server, metrics):
        await scrape(metrics)
        await store.create_vdi("later", MIB)
        assert value(await scrape(metrics), "sheepfold_vdis") == 1


async def test_only_reading_is_possible(tmp_path: Path) -> None:
    async with metered(tmp_path) as (_store, _server, metrics):
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            status, _ = await asyncio.to_thread(get, metrics.address, method=method)
            assert status == 405
        assert (await asyncio.to_thread(get, metrics.address, method="HEAD"))[0] == 200
        assert (await asyncio.to_thread(get, metrics.address, path="/v1/vdis"))[0] == 404
        assert (await asyncio.to_thread(get, metrics.address, path="/"))[0] == 200


async def test_garbage_is_answered_and_the_next_scrape_works(tmp_path: Path) -> None:
    async with metered(tmp_path) as (_store, _server, metrics):

        def garbage() -> bytes:
            with socket.create_connection(metrics.address, timeout=60) as sock:
                sock.sendall(b"\0\xff no HTTP\r\n\r\n")
                return sock.recv(100)

        assert b" 400 " in await asyncio.to_thread(garbage)
        await scrape(metrics)


async def test_connections_are_few_and_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those too many are closed at once, the others after a while, also if they never ask."""
    monkeypatch.setattr(metrics_http, "CONNECTIONS_MAX", 3)
    monkeypatch.setattr(metrics_http, "LIFE_SECONDS", 0.1)
    async with metered(tmp_path) as (_store, _server, metrics):
        loop = asyncio.get_running_loop()
        socks = [socket.create_connection(metrics.address) for _ in range(5)]
        try:
            for sock in reversed(socks):
                sock.setblocking(False)
                assert await loop.sock_recv(sock, 1) == b""
        finally:
            for sock in socks:
                sock.close()
        await scrape(metrics)


async def test_open_metrics_for_those_who_ask_for_it(tmp_path: Path) -> None:
    async with metered(tmp_path) as (_store, _server, metrics):
        accept = "application/openmetrics-text; version=1.0.0"
        status, text = await asyncio.to_thread(get, metrics.address, accept=accept)
        assert status == 200
        assert {family.name for family in parse_openmetrics(text)} >= {"sheepfold_health", "sheepfold_bad_copies"}


async def test_closed_vdis_make_no_time_series(tmp_path: Path) -> None:
    """With a thousand VDIs, of which three are open, about as many lines as with three."""
    async with metered(tmp_path) as (store, server, metrics):
        few = sum(len(family.samples) for family in (await scrape(metrics)).values())
        for number in range(1, 1000):
            await store.create_vdi(f"disk{number}", MIB)
        async with (
            attached(str(server.listeners[0]), "disk1") as one,
            attached(str(server.listeners[0]), "disk500") as two,
            attached(str(server.listeners[0]), "disk999") as three,
        ):
            for client in (one, two, three):
                await client.read(0, 512)
            await asyncio.sleep(metrics_http.FRESH_SECONDS)
            found = await scrape(metrics)
            assert value(found, "sheepfold_vdis") == 1000
            assert sum(len(family.samples) for family in found.values()) < few + 200


def test_as_many_exports_as_possible_make_a_bounded_page() -> None:
    """A name of the longest kind, all commands and some errors each."""
    meters = []
    for number in range(METERS_MAX):
        meter = Meter(f"{number:d}".ljust(40, "x"))
        for command in (Command.READ, Command.WRITE, Command.FLUSH):
            meter.one(command, 4096, 100_000)
        meters.append(meter)
    body, _ = exposition(Snapshot(network(meters), asyncio.run(FakeStore().status()), []), "")
    assert len(body) < 16 * MIB


def network(meters: list[Meter]) -> Network:
    return Network(
        meters=meters,
        clients=[],
        counts=Counts(),
        fenced=0,
        buffer_bytes=0,
        buffer_bytes_max=1,
        connections_max=1,
    )


@pytest.mark.parametrize(
    "text", ["", "127.0.0.1:9847", "unix:///x", "tcp://", "tcp://h:x", "tcp://h:1/metrics", "tcp://h?a"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(InvalidRequest, match="metrics address"):
        parse_address(text)


def test_addresses() -> None:
    assert parse_address("tcp://127.0.0.1:1") == ("127.0.0.1", 1)
    assert parse_address("tcp://[::1]") == ("::1", PORT)


async def test_an_address_that_is_taken(tmp_path: Path) -> None:
    async with metered(tmp_path) as (store, server, metrics):
        with pytest.raises(InvalidRequest, match="in use"):
            await MetricsServer(store, server.network).start(f"tcp://127.0.0.1:{metrics.address[1]}")


# -- what is built on it ------------------------------------------------------------------------------------------

WORDS = frozenset(("by", "on", "and", "or", "unless", "without", "ignoring"))
TARGET_LABELS = frozenset(("instance", "job"))
"""Prometheus itself adds them."""
CLOSED_LABELS = {
    "command": {"read", "write", "flush", "trim", "cache", "write_zeroes", "block_status"},
    "error": {"EPERM", "EIO", "ENOMEM", "EINVAL", "ENOSPC", "EOVERFLOW", "ENOTSUP", "ESHUTDOWN"},
    "phase": {"handshake", "transmission", "closing"},
}
STATES = {"sheepfold_health": set(HEALTHS), "sheepfold_zone_state": set(ZONE_STATES)}
SELECTOR = re.compile(r"(?<![\w$])([a-zA-Z_:][\w:]*)(?![\w:])(\{[^}]*\})?(?!\s*\()")
MATCHER = re.compile(r'(\w+)\s*(=~|!=|=|!~)\s*"([^"]*)"')


def rule_expressions() -> list[str]:
    return re.findall(r"^ +expr: (.+)$", RULES.read_text(), re.MULTILINE)


def dashboard_expressions() -> list[str]:
    return [target["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel["targets"]]


def selectors(expression: str) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """Metric names of an expression, with their matchers."""
    plain = re.sub(r"\[[^\]]*\]", "", expression)
    plain = re.sub(r"\b(by|without|on|ignoring)\s*\([^)]*\)", "", plain)
    for name, matchers in SELECTOR.findall(plain):
        if name not in WORDS and not name.isdecimal():
            yield name, MATCHER.findall(matchers)


def groupings(expression: str) -> Iterator[str]:
    for labels in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", expression):
        yield from (label.strip() for label in labels.split(","))


@pytest.fixture(scope="module")
def known() -> dict[str, set[str]]:
    """Every sample name that a server in use can show, with its labels."""

    async def collect() -> dict[str, set[str]]:
        meter = Meter("disk")
        for command in COMMANDS:
            meter.one(command, 1, 1)
        meter.error("EIO")
        net = network([meter])
        net.counts.refuse("connections_max")
        status = await FakeStore().status()
        vdi = await FakeStore().create_vdi("disk", MIB)
        body, _ = exposition(Snapshot(net, status, [vdi], status.zones), "")
        found: dict[str, set[str]] = {}
        for family in parse_text(body.decode()):
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
        return found

    return asyncio.run(collect())


@pytest.mark.parametrize("expression", [*rule_expressions(), *dashboard_expressions()])
def test_every_expression_is_about_metrics_and_labels_that_there_are(
    known: dict[str, set[str]], expression: str
) -> None:
    used = list(selectors(expression))
    assert used
    labels: set[str] = set()
    for name, matchers in used:
        assert name in known, f"{name} is not in /metrics"
        labels |= known[name] | TARGET_LABELS
        for label, _, wanted in matchers:
            assert label in known[name] | TARGET_LABELS, f"{name} has no label {label}"
            values = STATES.get(name) if label == "state" else CLOSED_LABELS.get(label)
            if values is not None:
                assert set(wanted.split("|")) <= values, f"{name} has no {label} {wanted}"
    for label in groupings(expression):
        assert label in labels


def test_annotations_name_labels_that_their_expressions_keep(known: dict[str, set[str]]) -> None:
    rules = RULES.read_text().split("- alert: ")[1:]
    assert len(rules) == len(rule_expressions()) >= 10
    for rule in rules:
        (expression,) = re.findall(r"expr: (.+)", rule)
        first = next(selectors(expression))[0]
        kept = set(groupings(expression)) if " by (" in expression else known[first] | TARGET_LABELS
        assert set(re.findall(r"\$labels\.(\w+)", rule)) <= kept, rule
        assert re.search(r"severity: (warning|critical)\}", rule)
        assert re.search(r"summary: \".+\"\}", rule)


def test_the_dashboard_has_panels_that_do_not_overlap() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    cells = [
        (panel["gridPos"]["x"] + dx, panel["gridPos"]["y"] + dy)
        for panel in panels
        for dx in range(panel["gridPos"]["w"])
        for dy in range(panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert len({panel["id"] for panel in panels}) == len(panels) > 10


def test_every_metric_is_described(known: dict[str, set[str]]) -> None:
    for name in sorted(known):
        if not name.startswith("sheepfold_") or name.endswith(("_created", "_bucket", "_sum")):
            continue
        assert f"`{name.removesuffix('_count')}`" in README, name


def test_the_judge_of_expressions_can_say_no(known: dict[str, set[str]]) -> None:
    for wrong in (
        "sheepfold_nothing > 0",
        'sheepfold_health{colour="ok"} == 1',
        'sheepfold_health{state="sick"} == 1',
        "sum by (colour) (sheepfold_health)",
        "rate(sheepfold_bad_copies[5m])",
    ):
        with pytest.raises(AssertionError):
            test_every_expression_is_about_metrics_and_labels_that_there_are(known, wrong)

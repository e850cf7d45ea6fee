"""What /metrics says: a snapshot of the server and its store as metric families of Prometheus.

Names and labels are an interface: README.md, "Monitoring", describes them, and the dashboard and the alert rules under
systemd/ use them. Each open VDI and each export in use makes a bounded number of time series, a closed one none.
Making the text takes milliseconds for hundreds of exports, so it is made in a thread, from copies.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

from prometheus_client import ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from nbdserver.meters import BOUNDS_SECONDS, COMMANDS, Network
from nbdserver.wire.constants import Command
from objstore.volume.status import StoreStatus, VdiStatus, ZoneStatus

HEALTHS: Final = ("ok", "degraded", "stopped")
ZONE_STATES: Final = ("in", "draining", "failed", "out")
PHASES: Final = ("handshake", "transmission", "closing")
BYTE_COMMANDS: Final = (Command.READ, Command.WRITE, Command.TRIM, Command.WRITE_ZEROES)
_BOUNDS: Final = (*(repr(bound) for bound in BOUNDS_SECONDS), "+Inf")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that one scrape shows. space: the zones with used_bytes and free_bytes, which are measured less often;
    empty = not measured yet."""

    network: Network
    store: StoreStatus
    vdis: Sequence[VdiStatus]
    space: Sequence[ZoneStatus] = ()


def exposition(snapshot: Snapshot, accept: str) -> tuple[bytes, str]:
    """Body and content type for a scraper that accepts `accept`. In any thread."""
    encode, content_type = choose_encoder(accept)
    return encode(_Families(snapshot)), content_type


class _Families(Collector):
    """A snapshot as the encoders want it."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        yield from families(self._snapshot)
        yield from ProcessCollector(registry=None).collect()


def families(snapshot: Snapshot) -> Iterator[Metric]:
    """Every metric family of ours."""
    yield _gauge("build_info", "Always 1; the version of the program.", {(snapshot.store.version,): 1}, ("version",))
    yield from _requests(snapshot.network)
    yield from _connections(snapshot.network)
    yield from _store(snapshot.store)
    yield from _vdis(snapshot.vdis)
    yield from _zones(snapshot.store.zones, snapshot.space)


Values = Mapping[Any, float]
"""The labels of each time series, in a tuple, and its value."""


def _gauge(name: str, help_: str, values: Values, labels: Sequence[str] = ()) -> Metric:
    family = GaugeMetricFamily("sheepfold_" + name, help_, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _counter(name: str, help_: str, values: Values, labels: Sequence[str] = ()) -> Metric:
    family = CounterMetricFamily("sheepfold_" + name, help_, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _state(name: str, help_: str, states: Iterable[str], current: str) -> Metric:
    return _gauge(name, help_, {(state,): state == current for state in states}, ("state",))


def _requests(network: Network) -> Iterator[Metric]:
    meters = network.meters
    seconds = HistogramMetricFamily(
        "sheepfold_request_seconds",
        "From taking a request to handing over its answer. The rate of its sum is the mean number of requests in work.",
        labels=("vdi", "command"),
    )
    used = [
        (meter, number, name) for meter in meters for number, name in COMMANDS.items() if any(meter.buckets[number])
    ]
    for meter, number, name in used:
        buckets = list(zip(_BOUNDS, accumulate(meter.buckets[number]), strict=True))
        seconds.add_metric((meter.name, name), buckets, meter.nanoseconds[number] / 1e9)
    yield seconds
    yield _counter(
        "request_bytes",
        "Lengths of the requests that were answered without an error.",
        {(m.name, name): m.answered_bytes[number] for m, number, name in used if number in BYTE_COMMANDS},
        ("vdi", "command"),
    )
    yield _counter(
        "requests_immediate",
        "Requests that were answered without waiting for anything: out of memory or the page cache, or into the log.",
        {(m.name, name): m.immediate[number] for m, number, name in used},
        ("vdi", "command"),
    )
    yield _counter(
        "request_errors",
        "Requests that were answered with an error.",
        {(m.name, error): count for m in meters for error, count in sorted(m.errors.items())},
        ("vdi", "error"),
    )
    in_flight = {(m.name,): 0 for m in meters if m.connections}
    for client in network.clients:
        key = (client.export or "",)
        if client.in_flight and key in in_flight:
            in_flight[key] += client.in_flight
    yield _gauge("requests_in_flight", "Requests that wait for the store now.", in_flight, ("vdi",))
    connected = {(m.name,): m.connections for m in meters if m.connections}
    yield _gauge("vdi_connections", "Connections that use an export.", connected, ("vdi",))


def _connections(network: Network) -> Iterator[Metric]:
    counts = network.counts
    phases = dict.fromkeys(((phase,) for phase in PHASES), 0)
    for client in network.clients:
        phases[(client.state if client.state in PHASES else "handshake",)] += 1
    yield _gauge("connections", "Connections by phase.", phases, ("phase",))
    yield _gauge("connections_max", "Connections that are possible at once.", {(): network.connections_max})
    yield _counter("connections_accepted", "Connections that were accepted.", {(): counts.accepted})
    yield _counter(
        "connections_refused",
        "Connections that were closed unanswered.",
        {(reason,): count for reason, count in sorted(counts.refused.items())},
        ("reason",),
    )
    yield _counter(
        "handshakes_failed", "Handshakes that ended by an error or deadline.", {(): counts.failed_handshakes}
    )
    yield _counter("connections_broken", "Connections whose client broke the protocol.", {(): counts.broken})
    yield _counter(
        "connections_stalled", "Connections that were cut off as they stood in others' way.", {(): counts.stalled}
    )
    yield _counter("slow_requests", "Requests that took longer than slow_request_seconds.", {(): counts.slow_requests})
    yield _gauge("clients_fenced", "Clients that are kept out.", {(): network.fenced})
    yield _gauge("buffer_bytes", "Memory that requests and replies hold.", {(): network.buffer_bytes})
    yield _gauge("buffer_bytes_max", "Memory that requests and replies may hold.", {(): network.buffer_bytes_max})


def _store(store: StoreStatus) -> Iterator[Metric]:
    yield _state("health", "1 for the state that the store is in.", HEALTHS, store.health)
    yield _gauge("started_timestamp_seconds", "When the store was opened, Unix time.", {(): store.started})
    yield _gauge("epoch", "Number of the membership of zones in force.", {(): store.epoch})
    yield _gauge("vdis", "VDIs that there are.", {(): store.vdis})
    yield _gauge("dirty_bytes", "Acknowledged and not yet durable, all VDIs.", {(): store.dirty_bytes})
    yield _gauge("dirty_bytes_max", "At so many dirty bytes writes wait.", {(): store.dirty_bytes_max})
    yield _gauge("map_bytes", "Block maps in memory.", {(): store.map_bytes})
    yield _gauge("map_bytes_max", "Block maps that are kept in memory.", {(): store.map_bytes_max})
    yield _gauge("map_waiting", "Requests that wait for memory of block maps.", {(): store.map_waiting})
    yield _counter("map_pages_loaded", "Pages of block maps that were read from zones.", {(): store.loaded_map_pages})
    yield _counter("map_pages_rebuilt", "Pages of block maps that no zone had whole.", {(): store.rebuilt_pages})
    yield _counter("collection_moved_bytes", "Data that collection wrote again, one copy.", {(): store.moved_bytes})
    yield _counter("segments_freed", "Segments whose space was freed.", {(): store.freed_segments})
    yield _gauge("vdis_crowded", "VDIs whose writes wait until collection has freed space.", {(): store.crowded_vdis})
    yield _counter("bad_copies", "Blocks that a zone returned with a wrong checksum.", {(): store.bad_copies})
    recovery = store.recovery
    yield _gauge("recovery_running", "1 while copies are being made.", {(): recovery.running})
    yield _gauge(
        "recovery_copies_missing", "Copies that should be somewhere and are not.", {(): recovery.copies_missing}
    )
    yield _gauge(
        "recovery_objects_unreachable", "Objects of which no zone has a copy.", {(): recovery.objects_unreachable}
    )
    yield _gauge("recovery_bytes_left", "What is left to copy.", {(): recovery.bytes_total - recovery.bytes_done})
    yield _counter("recovery_copies_made", "Copies that recovery has made.", {(): recovery.copies_made})
    scrub = store.scrub
    yield _gauge("scrub_running", "1 while a scrub runs.", {(): scrub.running})
    yield _gauge("scrub_bytes_done", "What the scrub under way, or the last one, has read.", {(): scrub.bytes_done})
    yield _gauge("scrub_bytes_total", "What it has to read.", {(): scrub.bytes_total})
    yield _gauge(
        "scrub_finished_timestamp_seconds",
        "When the last whole scrub ended, Unix time; 0 = never.",
        {(): scrub.finished or 0},
    )
    yield _gauge(
        "scrub_copies_bad", "Bad copies that the scrub under way, or the last one, found.", {(): scrub.copies_bad}
    )
    yield _gauge("scrub_copies_unrepaired", "Bad copies that could not be replaced.", {(): scrub.copies_unrepaired})
    yield _counter("read_repairs", "Copies that were replaced because a read found them bad.", {(): scrub.read_repairs})


def _vdis(vdis: Sequence[VdiStatus]) -> Iterator[Metric]:
    def each(name: str, help_: str, values: Mapping[str, float]) -> Metric:
        return _gauge("vdi_" + name, help_, {(vdi,): value for vdi, value in values.items()}, ("vdi",))

    yield each("size_bytes", "Size of an open VDI.", {vdi.name: vdi.size_bytes for vdi in vdis})
    yield each("live_bytes", "Data of an open VDI, one copy.", {vdi.name: vdi.live_bytes for vdi in vdis})
    yield each("dirty_bytes", "Acknowledged and not yet durable.", {vdi.name: vdi.dirty_bytes for vdi in vdis})
    yield each("damaged_bytes", "Bytes that no zone has whole.", {vdi.name: vdi.damaged_bytes for vdi in vdis})
    yield each("failed", "1 while an open VDI takes no writes.", {vdi.name: vdi.state == "failed" for vdi in vdis})
    yield each(
        "last_flush_timestamp_seconds",
        "When the last flush ended, Unix time; 0 = none since the store was opened.",
        {vdi.name: vdi.last_flush or 0 for vdi in vdis},
    )


def _zones(zones: Sequence[ZoneStatus], space: Sequence[ZoneStatus]) -> Iterator[Metric]:
    labels = ("zone", "path")
    keys = {zone.number: (str(zone.number), zone.path) for zone in zones}
    states = {(*keys[zone.number], state): zone.state == state for zone in zones for state in ZONE_STATES}
    yield _gauge("zone_state", "1 for the state that a zone is in.", states, (*labels, "state"))
    lag = {keys[zone.number]: zone.lag_seconds for zone in zones}
    yield _gauge("zone_lag_seconds", "Age of the oldest data that a zone owes.", lag, labels)
    errors = {keys[zone.number]: zone.read_errors for zone in zones}
    yield _gauge("zone_read_errors", "Reads that a zone has failed since it takes part.", errors, labels)
    measured = [zone for zone in space if zone.number in keys and zone.used_bytes + zone.free_bytes]
    used = {keys[zone.number]: zone.used_bytes for zone in measured}
    yield _gauge("zone_used_bytes", "What a zone's files take.", used, labels)
    free = {keys[zone.number]: zone.free_bytes for zone in measured}
    yield _gauge("zone_free_bytes", "What a zone has free.", free, labels)

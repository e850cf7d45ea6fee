"""Imports point one way: from the command line down to backends and bytes."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What everything may import: values and errors, nothing that does anything.
BASE = {
    "objstore.errors",
    "objstore.units",
    "objstore.clock",
    "objstore.stages",
    "objstore.access.api",
    "objstore.names",
    "objstore.version",
    "objstore.volume.base",
    "objstore.volume.settings",
    "objstore.volume.status",
}
WIRE = {"nbdserver.wire", "nbdserver.buffers"}
MACHINES = {"nbdserver.handshake", "nbdserver.transmission"}
TLS = {"nbdserver.tls", "nbdserver.tls_stream"}
IDENTITY = {
    "nbdserver.access",
    "nbdserver.keepalive",
    "nbdserver.watching",
    "nbdserver.identity",
    "nbdserver.meters",
    "nbdserver.slow",
}
CONNECTION = {
    "nbdserver.exports",
    "nbdserver.dispatch",
    "nbdserver.common",
    "nbdserver.connection",
    "nbdserver.settings",
}
SERVER = {
    "nbdserver.admission",
    "nbdserver.listening",
    "nbdserver.server",
    "nbdserver.config",
    "nbdserver.runtime",
    "nbdserver.systemd",
}
CONTROL = {
    "nbdserver.operations",
    "nbdserver.control_data",
    "nbdserver.control_clients",
    "nbdserver.control_server",
    "nbdserver.control",
    "nbdserver.control_client",
}

MAY_IMPORT = {  # layer (the longest prefix that fits counts): what of ours it may import besides itself and BASE
    "objstore.backend": set(),
    "objstore.format": set(),
    "objstore.check": set(),
    "objstore.replica": {"objstore.backend", "objstore.format"},
    "objstore.log": {"objstore.replica", "objstore.backend", "objstore.format"},
    "objstore.access.buffers": set(),
    "objstore.access.transfer": {"objstore.access.buffers"},
    "objstore.access.handle": {"objstore.access.buffers", "objstore.access.transfer"},
    "objstore.access.local_vdi": {"objstore.access.handle"},
    "objstore.access": {
        "objstore.format.stream",
        "objstore.volume.directories",
        "objstore.volume.imports",
        "objstore.volume.store",
    },
    "objstore.volume": {"objstore.log", "objstore.replica", "objstore.backend", "objstore.format"},
    "nbdserver.wire": set(),
    "nbdserver.buffers": set(),
    "nbdserver.complaints": set(),
    "nbdserver.turns": set(),
    "nbdserver.identity": set(),
    "nbdserver.failures": WIRE | {"nbdserver.complaints"},
    "nbdserver.admission": {"nbdserver.settings"},
    "nbdserver.stalls": set(),
    "nbdserver.keepalive": set(),
    "nbdserver.watching": set(),
    "nbdserver.access": {"nbdserver.identity"},
    "nbdserver.http_log": set(),
    "nbdserver.meters": WIRE,
    "nbdserver.slow": {"nbdserver.complaints", "nbdserver.meters"},
    "nbdserver.metrics": WIRE | {"nbdserver.meters"},
    "nbdserver.metrics_http": {"nbdserver.http_log", "nbdserver.meters", "nbdserver.metrics"},
    "nbdserver.exports": WIRE | {"nbdserver.access", "nbdserver.identity"},
    "nbdserver.handshake": WIRE | {"nbdserver.exports"},
    "nbdserver.entrance": WIRE | IDENTITY | {"nbdserver.common", "nbdserver.exports", "nbdserver.failures"},
    "nbdserver.transmission": WIRE,
    "nbdserver.chunks": WIRE,
    "nbdserver.dispatch": WIRE
    | MACHINES
    | {"nbdserver.exports", "nbdserver.chunks", "nbdserver.failures", "nbdserver.meters", "nbdserver.slow"},
    "nbdserver.tls": {"nbdserver.handshake"},
    "nbdserver.tls_stream": set(),
    "nbdserver.tls_make": {"nbdserver.tls"},
    "nbdserver.cli_tls": {"nbdserver.tls_make", "nbdserver.cli_output"},
    "nbdserver.sending": WIRE | {"nbdserver.tls_stream"},
    "nbdserver.settings": {"nbdserver.handshake"},
    "nbdserver.common": WIRE
    | MACHINES
    | IDENTITY
    | TLS
    | {"nbdserver.exports", "nbdserver.dispatch", "nbdserver.settings", "nbdserver.complaints", "nbdserver.turns"},
    "nbdserver.connection": WIRE
    | MACHINES
    | IDENTITY
    | TLS
    | {"nbdserver.common", "nbdserver.exports", "nbdserver.dispatch", "nbdserver.sending", "nbdserver.settings"}
    | {"nbdserver.entrance", "nbdserver.turns"},
    "nbdserver.listening": WIRE,
    "nbdserver.server": WIRE
    | {"nbdserver.listening"}
    | MACHINES
    | CONNECTION
    | IDENTITY
    | {"nbdserver.tls", "nbdserver.admission", "nbdserver.stalls"},
    "nbdserver.config": {"nbdserver.access", "nbdserver.server", "nbdserver.tls"},
    "nbdserver.runtime": set(),
    "nbdserver.systemd": set(),
    "nbdserver.flusher": set(),
    "nbdserver.heartbeat": {"nbdserver.systemd"},
    "nbdserver.control_server": {"nbdserver.operations"},
    "nbdserver.operations": set(),
    "nbdserver.control": {
        "nbdserver.http_log",
        "nbdserver.operations",
        "nbdserver.control_data",
        "nbdserver.control_trash",
    },
    "nbdserver.control_trash": {"nbdserver.operations"},
    "nbdserver.control_data": {"nbdserver.operations", "objstore.access.local_vdi", "objstore.volume.imports"},
    "nbdserver.control_client": set(),
    "nbdserver.control_clients": IDENTITY | {"nbdserver.operations"},
    "nbdserver.service": SERVER
    | CONTROL
    | {"nbdserver.access", "nbdserver.flusher", "nbdserver.heartbeat", "nbdserver.tls", "nbdserver.handshake"}
    | {"nbdserver.metrics_http", "nbdserver.logs"}
    | {"objstore.volume.directories", "objstore.volume.store"},
    "nbdserver.attach": set(),
    "nbdserver.cli": {"nbdserver.attach", "nbdserver.cli_arguments", "nbdserver.cli_commands"},
    "nbdserver.cli_arguments": {
        "nbdserver.attach",
        "nbdserver.cli_diff_arguments",
        "nbdserver.cli_library_arguments",
        "nbdserver.cli_server_arguments",
    },
    "nbdserver.cli_diff_arguments": set(),
    "nbdserver.cli_diff": {"nbdserver.cli_output", "nbdserver.cli_progress", "objstore.access"},
    "nbdserver.cli_server_arguments": set(),
    "nbdserver.logs": set(),
    "nbdserver.cli_top": CONTROL | {"nbdserver.cli_output"},
    "nbdserver.cli_clients": CONTROL | {"nbdserver.cli_output"},
    "nbdserver.cli_library_arguments": set(),
    "nbdserver.cli_library": CONTROL
    | {
        "nbdserver.cli_admin",
        "nbdserver.cli_output",
        "nbdserver.cli_progress",
        "nbdserver.cli_diff",
        "nbdserver.cli_transfer",
        "nbdserver.cli_trash",
        "nbdserver.cli_jobs",
        "objstore.access",
    },
    "nbdserver.cli_jobs": {"nbdserver.cli_output", "objstore.access"},
    "nbdserver.cli_transfer": {"nbdserver.cli_output", "nbdserver.cli_progress", "objstore.access"},
    "nbdserver.cli_trash": {"nbdserver.cli_output", "nbdserver.cli_progress", "objstore.access"},
    "nbdserver.cli_progress": set(),
    "nbdserver.cli_output": CONTROL,
    "nbdserver.cli_copies": {"nbdserver.cli_admin", "nbdserver.cli_output"},
    "nbdserver.cli_tree": set(),
    "nbdserver.cli_snapshots": {
        "nbdserver.cli_admin",
        "nbdserver.cli_output",
        "nbdserver.cli_progress",
        "nbdserver.cli_tree",
    },
    "nbdserver.cli_admin": CONTROL | {"nbdserver.cli_progress", "objstore.volume.directories", "objstore.volume.store"},
    "nbdserver.cli_check": {"nbdserver.cli_progress", "nbdserver.cli_output", "objstore.check"},
    "nbdserver.cli_commands": SERVER
    | {
        "nbdserver.attach",
        "nbdserver.service",
        "nbdserver.tls",
        "nbdserver.cli_tls",
        "nbdserver.cli_check",
        "nbdserver.cli_arguments",
        "nbdserver.cli_admin",
        "nbdserver.cli_output",
        "nbdserver.cli_copies",
        "nbdserver.cli_library",
        "nbdserver.cli_snapshots",
        "nbdserver.cli_clients",
        "nbdserver.cli_top",
        "nbdserver.logs",
        "nbdserver.cli_progress",
    },
    "nbdserver.__main__": {"nbdserver.cli"},
    **{name: BASE for name in BASE},
}
NO_IO = ("nbdserver.wire", "nbdserver.handshake", "nbdserver.transmission", "nbdserver.chunks", "objstore.format")
IO = {
    "asyncio",
    "uvloop",
    "socket",
    "ssl",
    "select",
    "selectors",
    "threading",
    "time",
    "random",
    "os",
    "io",
    "subprocess",
}


def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    found = {}
    for package in ("nbdserver", "objstore"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str) -> Iterator[str]:
    """Dotted names of all that the module imports, inside functions too; `from package import module` is the module."""
    tree = ast.parse(MODULES[name].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            assert node.module is not None
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in MODULES else node.module


def layer(name: str) -> str | None:
    """The layer that a module belongs to."""
    fitting = [prefix for prefix in MAY_IMPORT if name == prefix or name.startswith(prefix + ".")]
    return max(fitting, key=len, default=None)


@pytest.mark.parametrize("name", [name for name in MODULES if name not in ("nbdserver", "objstore")])
def test_imports_point_downwards(name: str) -> None:
    own = layer(name)
    assert own is not None, f"{name} belongs to no layer: give it a place in MAY_IMPORT"
    allowed = MAY_IMPORT[own] | BASE | {own}
    for target in imports(name):
        if target.split(".")[0] in ("nbdserver", "objstore"):
            fits = any(target == prefix or target.startswith(prefix + ".") for prefix in allowed)
            assert fits, f"{name} ({own}) imports {target}"


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("objstore.check")])
def test_the_check_is_a_reader_of_its_own(name: str) -> None:
    """It proves nothing about the format if it shares a decoder, or a constant, with what wrote the bytes."""
    shared = {"objstore.errors"}
    ours = {target for target in imports(name) if target.split(".")[0] in ("nbdserver", "objstore")}
    foreign = {target for target in ours if target not in shared and not target.startswith("objstore.check")}
    assert not foreign, f"{name} imports {foreign}"


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith("objstore.check")])
def test_only_the_command_line_imports_the_check(name: str) -> None:
    used = {target for target in imports(name) if target.startswith("objstore.check")}
    assert not used or name == "nbdserver.cli_check", f"{name} imports {used}"


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("nbdserver.attach")])
def test_attach_needs_the_standard_library_only(name: str) -> None:
    """It runs in an initramfs, where nothing else is."""
    for target in imports(name):
        standard = target.split(".")[0] in sys.stdlib_module_names
        assert standard or target.startswith("nbdserver.attach"), f"{name} imports {target}"


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith(NO_IO)])
def test_protocol_and_format_do_no_io(name: str) -> None:
    used = {target.split(".")[0] for target in imports(name)} & IO
    assert not used, f"{name} imports {used}"


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {name: {target for target in imports(name) if target in MODULES} for name in MODULES}
    while graph:
        free = [name for name, targets in graph.items() if not targets & graph.keys() - {name}]
        assert free, f"a circle among {sorted(graph)}"
        for name in free:
            del graph[name]

"""TLS: our server and nbdkit over volumes in memory, so that what differs is the network side and its cipher.

Both negotiate TLS 1.3 with AES-256-GCM and check the client's certificate. fio's NBD engine takes no certificates from
a URI; libnbd finds them below $HOME, for root only in /etc, hence the user namespace.
"""

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nbdserver.tls_make import make_certificates
from tests.bench import fio
from tests.bench.ours import FILL
from tests.bench.servers import Kind, Server

LOADS: Final = {
    "read-1m": {"rw": "read", "bs": "1m", "iodepth": "8"},
    "read-qd32": {"rw": "randread", "bs": "4k", "iodepth": "32"},
}
SIZE_BYTES: Final = 512 << 20
CERTIFICATES: Final = "certificates"


def _ours(data: Path, sock: Path, size: int) -> list[str]:
    command = [sys.executable, "-m", "tests.support.memserver", "--unix", str(sock), "--size", str(size)]
    return [*command, "--tls-certificates", str(data.parent / CERTIFICATES)]


def _nbdkit(data: Path, sock: Path, size: int) -> list[str]:
    options = ["--tls=on", f"--tls-certificates={data.parent / CERTIFICATES}", "--tls-verify-peer"]
    return ["nbdkit", "-f", "-U", str(sock), *options, "memory", str(size)]


OURS: Final = Kind("sheepfold-tls", "Sheepfold, TLS", _ours, export="disk", keeps_data=False)
PEER: Final = Kind("nbdkit-tls", "nbdkit memory, TLS", _nbdkit, program="nbdkit", keeps_data=False)


@dataclass
class TlsResult:
    """Bytes per second of each round, by load."""

    ours: dict[str, list[float]]
    peer: dict[str, list[float]]


def compare(data: Path, sockets: Path, rounds: int, seconds: float) -> TlsResult:
    """Both in turns, the disks full of data."""
    folder = data / CERTIFICATES
    make_certificates(folder, hosts=["localhost"], clients=["client"], days=1)
    home = data / "home"
    shutil.copytree(folder / "client", home / ".pki" / "libnbd")
    prefix = ["unshare", "--user"] if os.geteuid() == 0 else []
    tls = fio.TlsClient([*prefix, "env", f"HOME={home}"])
    servers = [Server(kind, data / kind.name, sockets / kind.name, SIZE_BYTES) for kind in (OURS, PEER)]
    result = TlsResult({load: [] for load in LOADS}, {load: [] for load in LOADS})
    try:
        for server in servers:
            server.wipe()
            server.start()
            fio.run(server, {**FILL, "size": str(SIZE_BYTES)})
        for number in range(rounds):
            turns = list(zip(servers, (result.ours, result.peer), strict=True))
            for server, rates in turns[::-1] if number % 2 else turns:
                for load, options in LOADS.items():
                    timing = {"time_based": "1", "runtime": f"{max(1, round(seconds * 1000))}ms"}
                    point = fio.run(server, {**options, **timing, "size": str(SIZE_BYTES)}, tls)
                    rates[load].append(point.bytes_per_second)
    finally:
        for server in servers:
            server.stop()
    return result

"""A server over one memory volume, to try clients and measure the network side: python -m tests.support.memserver."""

import argparse
import asyncio
import contextlib
import logging
import signal
from pathlib import Path

import uvloop

from nbdserver.server import Listener, Server, ServerSettings
from nbdserver.tls import Tls, TlsSettings, load_tls
from objstore.volume.memory import MemorySource, MemoryVolume


def parse_size(text: str) -> int:
    """A number of bytes with an optional K, M, G or T."""
    units = {"K": 10, "M": 20, "G": 30, "T": 40}
    if text[-1:].upper() in units:
        return int(text[:-1]) << units[text[-1].upper()]
    return int(text)


async def serve(listeners: list[Listener], size_bytes: int, settings: ServerSettings, tls: Tls | None) -> None:
    server = Server(MemorySource({"disk": MemoryVolume("disk", size_bytes)}), settings, tls=tls)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await server.start(listeners)
    for listener in server.listeners:
        print(listener.uri("disk"), flush=True)
    await stop.wait()
    await server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--unix", metavar="PATH", action="append", default=[])
    parser.add_argument("--tcp", metavar="HOST:PORT", action="append", default=[])
    parser.add_argument("--size", type=parse_size, default=1 << 30)
    parser.add_argument("--busy-poll", type=float, metavar="SECONDS", default=ServerSettings.busy_poll_seconds)
    parser.add_argument("--socket-buffer", type=parse_size, default=ServerSettings.socket_buffer_bytes)
    parser.add_argument("--tls-certificates", type=Path, metavar="DIR", help="offer TLS (selective)")
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.DEBUG if arguments.verbose else logging.WARNING)
    listeners = [Listener(path=path) for path in arguments.unix]
    listeners += [Listener.parse(f"tcp://{address}") for address in arguments.tcp]
    settings = ServerSettings(busy_poll_seconds=arguments.busy_poll, socket_buffer_bytes=arguments.socket_buffer)
    certificates = arguments.tls_certificates
    tls = None if certificates is None else load_tls(TlsSettings("selective", certificates))
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(serve(listeners, arguments.size, settings, tls))


if __name__ == "__main__":
    main()

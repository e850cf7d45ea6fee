"""The commands `attach` and `detach`: arguments, what can be wrong with them, and the agent's process."""

import argparse
import contextlib
import errno
import os
import re
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from nbdserver.attach.agent import Agent, say_to_kernel_log
from nbdserver.attach.errors import IN_USE, NOT_FOUND, UNAVAILABLE, USAGE, AttachError
from nbdserver.attach.handshake import CAN_MULTI_CONN, Export, Place, Refused, connect, parse_place
from nbdserver.attach.netlink import Kernel

try:
    import ctypes
except ImportError:  # an initramfs may be without it
    ctypes = None  # type: ignore[assignment]

CONNECTIONS_MAX: Final = 16
TIMEOUT_SECONDS: Final = 10
DEAD_SECONDS: Final = 600
BLOCK_BYTES: Final = (512, 1024, 2048, 4096)
PR_SET_IO_FLUSHER: Final = 57
MCL_CURRENT_AND_FUTURE: Final = 3
_DEVICE: Final = re.compile(r"(?:/dev/)?nbd(\d{1,6})")


def add_attach(parser: argparse.ArgumentParser) -> None:
    """Arguments of `attach`."""
    parser.add_argument(
        "export", metavar="EXPORT", help="NBD URI, or the name of an export behind /run/sheepfold/sheepfold.sock"
    )
    parser.add_argument("device", metavar="DEVICE", nargs="?", help="/dev/nbdN (default: one that is free)")
    parser.add_argument(
        "--connections", metavar="N", type=int, default=4, help="connections to the server, 1 to 16 (default: 4)"
    )
    parser.add_argument(
        "--block-size", metavar="BYTES", type=int, default=512, help="512, 1024, 2048 or 4096 (default: 512)"
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=int,
        default=TIMEOUT_SECONDS,
        help=f"after so long without an answer a request is sent again (default: {TIMEOUT_SECONDS})",
    )
    parser.add_argument(
        "--dead-timeout",
        metavar="SECONDS",
        type=int,
        default=DEAD_SECONDS,
        help=f"after so long without a server there are I/O errors (default: {DEAD_SECONDS})",
    )
    parser.add_argument(
        "--also", metavar="URI", action="append", default=[], help="where else the same disk may be (repeatable)"
    )
    parser.add_argument("--foreground", action="store_true", help="don't put the agent in the background")


def add_detach(parser: argparse.ArgumentParser) -> None:
    """Arguments of `detach`."""
    parser.add_argument("device", metavar="DEVICE", help="/dev/nbdN")
    parser.add_argument("--force", action="store_true", help="although it is mounted or otherwise in use")


def attach(arguments: argparse.Namespace) -> int:
    """Attach, print the device, and keep it attached in the background or, with --foreground, here. AttachError."""
    places = [parse_place(place) for place in (arguments.export, *arguments.also)]
    _check(arguments)
    kernel = Kernel()
    with contextlib.ExitStack() as opened:
        opened.callback(kernel.close)
        agent = Agent(kernel, places, dead_seconds=arguments.dead_timeout, say=_say_to_stderr)
        opened.callback(agent.close)
        _take_device(kernel, agent, places, arguments)
        device = f"/dev/nbd{agent.index}"
        print(device, flush=True)
        if not arguments.foreground:
            if os.fork():
                return 0
            _into_background()
            agent.say = lambda line: say_to_kernel_log(f"{device}: {line}")
        _stay_in_memory()
        _ready()
        return agent.run()


def detach(arguments: argparse.Namespace) -> int:
    """Flush the device and give it back. AttachError."""
    index = parse_device(arguments.device)
    with contextlib.closing(Kernel()) as kernel:
        if not kernel.connected(index):
            raise AttachError(f"/dev/nbd{index} is not attached", NOT_FOUND)
        if not arguments.force:
            _flush_unused(index)
        try:
            kernel.disconnect(index)
        except OSError as error:
            raise AttachError(f"/dev/nbd{index}: {error.strerror}", UNAVAILABLE) from error
    return 0


def parse_device(text: str) -> int:
    """The number in /dev/nbdN. AttachError."""
    found = _DEVICE.fullmatch(text)
    if found is None:
        raise AttachError(f"{text!r} is no device: /dev/nbdN is", USAGE)
    return int(found[1])


def _check(arguments: argparse.Namespace) -> None:
    if not 1 <= arguments.connections <= CONNECTIONS_MAX:
        raise AttachError(f"{arguments.connections} connections are not possible: 1 to {CONNECTIONS_MAX} are", USAGE)
    if arguments.block_size not in BLOCK_BYTES:
        raise AttachError(f"block size {arguments.block_size} is not possible: 512, 1024, 2048 or 4096 is", USAGE)
    for option in ("timeout", "dead_timeout"):
        if not 1 <= getattr(arguments, option) <= 1 << 20:
            raise AttachError(f"--{option.replace('_', '-')} {getattr(arguments, option)} is not possible", USAGE)


def _take_device(kernel: Kernel, agent: Agent, places: Sequence[Place], arguments: argparse.Namespace) -> None:
    """Connect the device, or take over one that is this disk already and has lost its agent."""
    index = None if arguments.device is None else parse_device(arguments.device)
    with contextlib.ExitStack() as opened:
        place, first, export = _first(places)
        opened.callback(first.close)
        identifier = export.identity or f"nbd {place}"
        if export.size_bytes < arguments.block_size:
            raise AttachError(f"export {place} is smaller than a block of {arguments.block_size} bytes", USAGE)
        if export.size_bytes % arguments.block_size:
            rest = export.size_bytes % arguments.block_size
            _say_to_stderr(f"the last {rest} bytes can't be reached with blocks of {arguments.block_size} bytes")
        connections = arguments.connections if export.flags & CAN_MULTI_CONN else 1
        sockets = [first, *(opened.enter_context(_same(place, export)) for _ in range(connections - 1))]
        try:
            index = kernel.connect(
                index,
                [one.fileno() for one in sockets],
                export,
                identifier,
                block_bytes=arguments.block_size,
                timeout_seconds=arguments.timeout,
                dead_seconds=arguments.dead_timeout,
            )
        except OSError as error:
            if error.errno == errno.EBUSY and index is not None and backend(index) == identifier:
                agent.take(index, export, identifier, connections=connections, lost=connections)
                return
            code = IN_USE if error.errno == errno.EBUSY else UNAVAILABLE
            which = "a device" if index is None else f"/dev/nbd{index}"
            raise AttachError(f"{which} can't be attached: {error.strerror}", code) from error
        agent.take(index, export, identifier, connections=connections)


def _first(places: Sequence[Place]) -> tuple[Place, socket.socket, Export]:
    """The first place that has the export. AttachError: what the last one said."""
    last: Exception | None = None
    for place in places:
        try:
            return place, *connect(place)
        except (OSError, Refused) as error:
            last = error
    code = NOT_FOUND if isinstance(last, Refused) and last.unknown else UNAVAILABLE
    raise AttachError(f"export {places[-1]}: {last}", code) from last


def _same(place: Place, export: Export) -> socket.socket:
    """One more connection, which must be to the same disk."""
    try:
        sock, again = connect(place)
    except (OSError, Refused) as error:
        raise AttachError(f"export {place}: {error}", UNAVAILABLE) from error
    if again != export:
        sock.close()
        raise AttachError(f"export {place} has changed while it was attached", UNAVAILABLE)
    return sock


def backend(index: int) -> str:
    """The backend identifier of a device, "" if it has none."""
    try:
        return Path(f"/sys/block/nbd{index}/backend").read_text().rstrip("\n")
    except OSError:
        return ""


def _flush_unused(index: int) -> None:
    """What was written to the device itself goes to the server. AttachError: it is mounted, swapped to, or the like."""
    device = f"/dev/nbd{index}"
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_EXCL)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise AttachError(f"{device} is in use (mounted?); --force detaches it nevertheless", IN_USE) from error
        if error.errno != errno.EROFS and error.errno != errno.EACCES:
            raise AttachError(f"{device}: {error.strerror}", UNAVAILABLE) from error
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise AttachError(f"{device} can't be flushed: {error.strerror}; --force loses it", UNAVAILABLE) from error
    finally:
        os.close(descriptor)


def _into_background() -> None:
    os.setsid()
    os.chdir("/")
    null = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)


def _stay_in_memory() -> None:
    """The agent must not be waited for by the kernel whose disk it brings back: see nbdserver/flusher.py."""
    if ctypes is not None:
        libc = ctypes.CDLL(None)
        libc.prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0)
        libc.mlockall(MCL_CURRENT_AND_FUTURE)


def _ready() -> None:
    """sd_notify(3), as nbdserver/systemd.py has it, which is not here in an initramfs."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address.startswith(("/", "@")):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender, contextlib.suppress(OSError):
            sender.sendto(b"READY=1", "\0" + address[1:] if address[0] == "@" else address)


def _say_to_stderr(line: str) -> None:
    print("sheepfold:", line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python3 -m nbdserver.attach attach|detach ...`."""
    parser = argparse.ArgumentParser(prog="python3 -m nbdserver.attach", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    add_attach(commands.add_parser("attach"))
    add_detach(commands.add_parser("detach"))
    parsed = parser.parse_args(arguments)
    try:
        return attach(parsed) if parsed.command == "attach" else detach(parsed)
    except AttachError as error:
        print("sheepfold: error:", error, file=sys.stderr)
        return error.code

"""Talk with systemd: how the service is doing (sd_notify(3), Type=notify), its watchdog, and sockets that it has opened
for us (sd_listen_fds(3)). Without systemd all of it is nothing.
"""

import os
import socket
import time
from collections.abc import MutableMapping
from typing import Final, NamedTuple

from objstore.errors import InvalidRequest

FIRST_DESCRIPTOR: Final = 3
"""SD_LISTEN_FDS_START."""
DESCRIPTORS_MAX: Final = 1024


class HandedSocket(NamedTuple):
    """A listening socket of the service manager's. name: its FileDescriptorName=, empty if it has none."""

    name: str
    socket: socket.socket


def notify(*states: str) -> None:
    """Send e.g. "READY=1", "STATUS=..." to the socket that NOTIFY_SOCKET names. A service manager that went away is no
    error."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            sender.sendto("\n".join(states).encode(), "\0" + address[1:] if address[0] == "@" else address)
        except OSError:
            pass


def reloading() -> None:
    """Say that the configuration is being read again; "READY=1" ends it."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")


def watchdog_seconds(environ: MutableMapping[str, str], pid: int) -> float | None:
    """Longest time between two "WATCHDOG=1" that the manager puts up with; None: it doesn't watch this process."""
    if environ.get("WATCHDOG_PID", str(pid)) != str(pid):
        return None
    micros = environ.get("WATCHDOG_USEC", "")
    return int(micros) / 1e6 if micros.isascii() and micros.isdigit() and int(micros) else None


def handed_sockets(environ: MutableMapping[str, str], pid: int) -> list[HandedSocket]:
    """The listening sockets that were opened for process `pid`, in their order; the caller's from now on, and the
    variables that tell of them are gone. InvalidRequest: what was handed over is no socket."""
    mine = environ.get("LISTEN_PID") == str(pid)
    count = environ.get("LISTEN_FDS", "")
    names = environ.get("LISTEN_FDNAMES", "").split(":")
    for variable in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        environ.pop(variable, None)
    if not mine or not (count.isascii() and count.isdigit()):
        return []
    if int(count) > DESCRIPTORS_MAX:
        raise InvalidRequest(f"LISTEN_FDS={count}: at most {DESCRIPTORS_MAX} sockets are taken")
    found: list[HandedSocket] = []
    for index in range(int(count)):
        name = names[index] if index < len(names) else ""
        descriptor = FIRST_DESCRIPTOR + index
        try:
            os.set_inheritable(descriptor, False)
            found.append(HandedSocket(name, socket.socket(fileno=descriptor)))
        except OSError as error:
            for taken in found:
                taken.socket.close()
            raise InvalidRequest(f"descriptor {descriptor} ({name or 'no name'}) of LISTEN_FDS: {error}") from error
    return found

"""Tell systemd how the service is doing (sd_notify(3), Type=notify); does nothing anywhere else."""

import os
import socket


def notify(state: str) -> None:
    """Send e.g. "READY=1" to the socket that NOTIFY_SOCKET names. A service manager that went away is no error."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            sender.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)
        except OSError:
            pass

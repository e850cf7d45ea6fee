"""The agent that keeps a device attached."""

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Sequence
from typing import Final

from nbdserver.attach.errors import GAVE_UP
from nbdserver.attach.handshake import Export, Place, Refused, ask, connect
from nbdserver.attach.netlink import Kernel, dead_links, read_dead_links

LOOK_SECONDS: Final = 1.0
"""How often it looks whether the device is still attached."""
REFRESH_SECONDS: Final = 10.0
"""How often the server is asked for the size."""
RETRY_SECONDS: Final = (0.1, 2.0)
"""First and longest pause between tries to connect."""

STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Agent:
    """Keeps one device attached: `watch` before it is connected, then `run`.

    say: told what people should know. dead_seconds: after so long without any connection it gives the device up.
    """

    def __init__(
        self, kernel: Kernel, places: Sequence[Place], *, dead_seconds: float, say: Callable[[str], None]
    ) -> None:
        self._kernel = kernel
        self._places = places
        self._dead_seconds = dead_seconds
        self.say = say
        self._dead_links = dead_links(kernel.group)
        self.index = -1
        self.connections = 0
        self.lost = 0
        """Connections that the kernel has no more."""
        self._identifier = ""
        self._export = Export(0, 0, "")
        self._pause_seconds = RETRY_SECONDS[0]
        self._none_since: float | None = None

    def take(self, index: int, export: Export, identifier: str, *, connections: int, lost: int = 0) -> None:
        """This is the device. lost: connections that have to be made first."""
        self.index, self.connections, self.lost = index, connections, lost
        self._export, self._identifier = export, identifier

    def close(self) -> None:
        self._dead_links.close()

    def run(self) -> int:
        """Until the device is detached, or a signal comes, which leaves it attached: 0. GAVE_UP: it was given up."""
        receiver, sender = socket.socketpair()
        receiver.setblocking(False)
        sender.setblocking(False)
        before = signal.set_wakeup_fd(sender.fileno())
        handlers = [(number, signal.signal(number, lambda *_: None)) for number in STOP_SIGNALS]
        try:
            return self._run(receiver)
        finally:
            signal.set_wakeup_fd(before)
            for number, handler in handlers:
                signal.signal(number, handler)
            receiver.close()
            sender.close()

    def _run(self, stop: socket.socket) -> int:
        poll = select.poll()
        poll.register(stop, select.POLLIN)
        poll.register(self._dead_links, select.POLLIN)
        refreshed = time.monotonic()
        while True:
            if not self._kernel.connected(self.index):
                self.say("it is detached")
                return 0
            if self.lost:
                failure = self._reconnect()
                if failure:
                    self.say(f"given up: {failure}")
                    with contextlib.suppress(OSError):
                        self._kernel.disconnect(self.index)
                    return GAVE_UP
            elif time.monotonic() - refreshed >= REFRESH_SECONDS:
                self._refresh()
                refreshed = time.monotonic()
            pause = self._pause_seconds if self.lost else LOOK_SECONDS
            if any(descriptor == stop.fileno() for descriptor, _ in poll.poll(int(pause * 1000))):
                self.say("the agent ends; the device stays attached, and nobody connects it again")
                return 0
            self._count_lost()

    def _count_lost(self) -> None:
        devices = read_dead_links(self._dead_links)
        before = self.lost
        gone = self.connections if devices is None else devices.count(self.index)
        self.lost = min(self.connections, self.lost + gone)
        if self.lost > before:
            self.say(f"{self.lost} of {self.connections} connections are lost")
        if self.lost < self.connections:
            self._none_since = None
        elif self._none_since is None:
            self._none_since = time.monotonic()

    def _reconnect(self) -> str:
        """Try to replace the connections that are lost; why the device has to be given up, "" = it has not."""
        while self.lost:
            reason = ""
            for place in self._places:
                try:
                    sock, export = connect(place)
                except (OSError, Refused) as error:
                    reason = f"{place}: {error}"
                    continue
                with sock:
                    if export.identity != self._export.identity or export.size_bytes < self._export.size_bytes:
                        return f"{place} is another disk now, or has lost writes that it had acknowledged"
                    try:
                        self._kernel.reconfigure(self.index, [sock.fileno()], export.size_bytes, self._identifier)
                    except OSError as error:  # it may just have been detached
                        reason = f"the kernel does not take a new connection: {error}"
                        continue
                self._export = export
                self.lost -= 1
                break
            else:
                return self._try_later(reason)
        self.say("all connections are there again")
        self._pause_seconds = RETRY_SECONDS[0]
        self._none_since = None
        return ""

    def _try_later(self, reason: str) -> str:
        if self._none_since is not None and time.monotonic() - self._none_since > self._dead_seconds:
            return f"no connection for {self._dead_seconds:.0f} s: {reason}"
        self._pause_seconds = min(2 * self._pause_seconds, RETRY_SECONDS[1])
        return ""

    def _refresh(self) -> None:
        """Pass a new size on to the kernel."""
        for place in self._places:
            try:
                export = ask(place)
            except (OSError, Refused):
                continue
            if export.identity == self._export.identity and export.size_bytes > self._export.size_bytes:
                with contextlib.suppress(OSError):  # it may just have been detached
                    self._kernel.reconfigure(self.index, [], export.size_bytes, self._identifier)
                    self._export = export
                    self.say(f"it has {export.size_bytes} bytes now")
            return


def say_to_kernel_log(line: str) -> None:
    """For an agent without a terminal."""
    with contextlib.suppress(OSError):
        descriptor = os.open("/dev/kmsg", os.O_WRONLY)
        try:
            os.write(descriptor, f"<5>sheepfold: {line}\n".encode())
        finally:
            os.close(descriptor)

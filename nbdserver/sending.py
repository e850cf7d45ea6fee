"""The sending half of a connection: replies go to the socket at once if it takes them, else they wait in a queue.

Memory: the queue keeps pooled buffers and copies, both counted in the pool; the connection stops taking requests while
`unsent_bytes` is at its bound.
"""

import asyncio
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Final

from nbdserver.buffers import Buffer, BufferPool
from nbdserver.tls_stream import TlsStream

IOV_MAX: Final = min(os.sysconf("SC_IOV_MAX"), 1024)


class Sender:
    """Sends on a non-blocking socket, watched for writability only while it is full.

    area: where dispatch packs the replies of a batch.
    lost: called when the socket fails; it calls `drop`.
    moved: called when a socket that was full has taken bytes, or what tasks had queued has left.
    """

    def __init__(
        self,
        sock: socket.socket,
        pool: BufferPool,
        area: memoryview,
        *,
        lost: Callable[[OSError], None],
        moved: Callable[[], None],
    ) -> None:
        self.unsent_bytes = 0
        self.sent_bytes = 0
        self.in_batch = False
        """A batch is being answered; `send` follows it, so nothing need be scheduled."""
        self.waiting_since: float | None = None
        """Monotonic time since which the full socket has taken nothing; None: it is not full."""
        self.stream: socket.socket | TlsStream = sock
        """Where replies go: the socket itself, or TLS on it. Changed only while nothing is queued."""
        self._sock = sock
        self._pool = pool
        self._area = area
        self._lost = lost
        self._moved = moved
        self._loop = asyncio.get_running_loop()
        self._queue: deque[tuple[memoryview, Buffer | None, int]] = deque()
        self._scheduled = False
        self._dropped = False

    def put(self, views: Sequence[memoryview | bytes], buffer: Buffer | None = None) -> None:
        """Queue views to be sent in order, together with whatever else is queued in this turn of the loop."""
        if self._dropped:
            self._give_back(buffer, 0)
            return
        last = len(views) - 1
        for index, view in enumerate(views):
            self._queue.append((memoryview(view), buffer if index == last else None, 0))
            self.unsent_bytes += len(view)
        if not self.in_batch and not self._scheduled and self.waiting_since is None:
            self._scheduled = True
            self._loop.call_soon(self._send_scheduled)

    def put_area(self, length: int) -> None:
        """Send the first `length` bytes of the area, copying what the socket does not take."""
        if self._dropped:
            return
        view = self._area[:length]
        sent = 0
        if not self._queue:
            try:
                sent = self.stream.send(view)
            except BlockingIOError:
                pass
            except OSError as error:
                self._lost(error)
                return
            self.sent_bytes += sent
            if sent == length:
                return
        rest = length - sent
        self._pool.charge(rest)
        self._queue.append((memoryview(bytes(view[sent:])), None, rest))
        self.unsent_bytes += rest

    def send(self) -> None:
        """Send as much of the queue as the socket takes; watch it if that is not all."""
        queue = self._queue
        if not queue or self.waiting_since is not None:
            return
        if not self._send_queue():
            self.waiting_since = time.monotonic()
            self._loop.add_writer(self._sock.fileno(), self._on_writable)

    def drop(self) -> None:
        """Send nothing more; buffers go back."""
        self._dropped = True
        self._stop_watching()
        while self._queue:
            _, buffer, charged = self._queue.popleft()
            self._give_back(buffer, charged)
        self.unsent_bytes = 0

    @property
    def idle(self) -> bool:
        """Everything has been sent."""
        return not self._queue

    def _send_scheduled(self) -> None:
        self._scheduled = False
        self.send()
        if not self._queue:
            self._moved()

    def _on_writable(self) -> None:
        self.waiting_since = time.monotonic()
        if self._send_queue():
            self._stop_watching()
        if not self._dropped:
            self._moved()

    def _send_queue(self) -> bool:
        """True: the queue is empty (or was dropped); False: the socket is full."""
        queue = self._queue
        while queue:
            try:
                if len(queue) == 1:
                    sent = self.stream.send(queue[0][0])
                else:
                    sent = self.stream.sendmsg([entry[0] for entry in islice(queue, IOV_MAX)])
            except BlockingIOError:
                return False
            except OSError as error:
                self._lost(error)
                return True
            self.sent_bytes += sent
            self.unsent_bytes -= sent
            while queue:
                view, buffer, charged = queue[0]
                if sent < len(view):
                    queue[0] = (view[sent:], buffer, charged)
                    break
                sent -= len(view)
                queue.popleft()
                self._give_back(buffer, charged)
        return True

    def _stop_watching(self) -> None:
        if self.waiting_since is not None:
            self.waiting_since = None
            self._loop.remove_writer(self._sock.fileno())

    def _give_back(self, buffer: Buffer | None, charged: int) -> None:
        if buffer is not None:
            self._pool.release(buffer)
        if charged:
            self._pool.discharge(charged)

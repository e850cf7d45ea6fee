"""What the connections of one event loop share: settings, exports, memory, counters."""

import itertools
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from nbdserver.access import Attachments
from nbdserver.buffers import BufferPool
from nbdserver.complaints import Complaints
from nbdserver.dispatch import REPLY_AREA_BYTES
from nbdserver.exports import Exports
from nbdserver.identity import Fences
from nbdserver.meters import Counts, Meters
from nbdserver.settings import ServerSettings
from nbdserver.slow import SlowLog
from nbdserver.tls import Tls
from nbdserver.transmission import RECEIVE_BYTES
from nbdserver.turns import Turns
from nbdserver.watching import BusyPoll

log = logging.getLogger(__name__)


class Common:
    """What the connections of one event loop share."""

    def __init__(
        self,
        settings: ServerSettings,
        exports: Exports,
        entered: Callable[[Any], Awaitable[None]],
        tls: Tls | None = None,
    ) -> None:
        self.settings = settings
        self.tls = tls
        """For connections that begin from now on; None: TLS is off."""
        self.exports = exports
        self.attachments = Attachments()
        self.entered = entered
        """Awaited with a connection that has taken its volume, before its first request."""
        self.complain = Complaints(log)
        self.fences = Fences()
        self.counts = Counts()
        self.slow = SlowLog(self.counts)
        self.meters: Meters | None = None
        """Set before the first connection: requests are counted for each export."""
        self.numbers = itertools.count(1)
        self.pool = BufferPool(settings.buffer_bytes_max)
        self.sealed_buffer = memoryview(bytearray(RECEIVE_BYTES))
        self.receive_buffer = memoryview(bytearray(RECEIVE_BYTES))
        self.reply_area = memoryview(bytearray(REPLY_AREA_BYTES))
        self.turns = Turns()
        self.last_active: object = None
        """The connection that moved last."""
        self.busy_poll = BusyPoll()

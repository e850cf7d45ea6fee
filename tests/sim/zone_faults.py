"""One zone of a seed that is in trouble, life after life, in every way that a zone can be.

The contract: with all other zones well and every VDI in two copies or more, nothing that was flushed is lost, reads
show the log's state, and clients go on without an error. Between two lives an administrator may be asked for the zone.

    eio      writes and syncs of the zone answer EIO from some call on
    hang     its calls don't return: for less than the deadline, until it was put out, or ever
    lie      its syncs say that they succeeded and do nothing; the power fails at the end of that life
    missing  it is not there when the store starts
    backup   it is put back as it was some lives ago
    wiped    it is a new, empty directory
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Final

from objstore.errors import InvalidRequest, StoreError
from tests.support.fakefs import Image

if TYPE_CHECKING:
    from tests.sim.world import World

KINDS: Final = ("eio", "hang", "lie", "missing", "backup", "wiped")
IMAGES_MAX: Final = 3
REFUSALS_MAX: Final = 2
NEEDED_HANG_SECONDS: Final = 300.0


class ZoneFaults:
    """What happens to `zone`. kinds: those that may. kind: of the present life, "" = it is well.

    absent: the zone is to be left out when the store is opened. behind: it may lack something that was flushed.
    """

    def __init__(self, world: World, seed: int, kinds: tuple[str, ...]) -> None:
        self.world = world
        self.rng = rng = random.Random(seed * 7 + 3)
        self.zone = rng.randrange(len(world.zones))
        self.kinds = kinds
        self.kind = ""
        self.absent = False
        self.behind = False
        self._images: list[Image] = []
        self._refusals = 0
        self._alone = len(world.zones) == 2

    def before_life(self, *, last: bool) -> None:
        """Between two processes: what this life meets."""
        rng, fs = self.rng, self.world.zones[self.zone]
        fs.lies = False
        self.absent = False
        self.kind = "" if last or not self.kinds or rng.random() < 0.35 else rng.choice(self.kinds)
        if (self.kind == "backup" and not self._images) or (self._alone and self.kind in ("backup", "wiped", "lie")):
            self.kind = ""  # of two zones both are needed once one of them has forgotten something
        self._refusals = 0
        if not self.kind:
            return
        self.behind = self.world.zone_rots = True
        self.met(self.kind)
        if self.kind == "missing":
            self.absent = True
        elif self.kind == "wiped":
            fs.wipe(f"/zone{self.zone}")
        elif self.kind == "backup":
            fs.restore(rng.choice(self._images))
        elif self.kind == "lie":
            fs.lies = True

    def after_life(self) -> None:
        """Between two processes: what a backup may put back."""
        self.world.zones[self.zone].lies = False
        if "backup" in self.kinds and self.rng.random() < 0.4:
            self._images.append(self.world.zones[self.zone].image())
            del self._images[:-IMAGES_MAX]

    def opening_refused(self, error: StoreError) -> None:
        """The store does not open like this: the administrator brings the zone back, or empties it."""
        self._refusals += 1
        if self._refusals > REFUSALS_MAX:
            raise error
        if isinstance(error, InvalidRequest):
            # The second: a backup from before the store was made, begun under another identity.
            if f"/zone{self.zone} is neither empty nor a zone" not in str(error) and " to store " not in str(error):
                raise error
            self.world.zones[self.zone].wipe(f"/zone{self.zone}")
            self.met("foreign")
            return
        if f"zones are missing: /zone{self.zone}; a store is first opened" in str(error) and not self.absent:
            # A zone that lied has lost its superblock; nothing was ever kept in this store.
            self.world.zones[self.zone].wipe(f"/zone{self.zone}")
            self.met("refused")
            return
        if not self.absent and not self._alone:
            raise error
        self.met("refused")
        self.absent = False

    @property
    def power_fails(self) -> bool:
        """A lie comes out only so."""
        return self.kind == "lie"

    async def while_serving(self) -> None:
        """The faults that come under way."""
        rng, world = self.rng, self.world
        if self.kind == "eio":
            await asyncio.sleep(rng.random() * 0.2)
            world.failing_zones.add(self.zone)
            if rng.random() < 0.5:
                await asyncio.sleep(rng.random() * 3)
                world.failing_zones.discard(self.zone)
        elif self.kind == "hang":
            await asyncio.sleep(rng.random() * 0.2)
            executor = world.executor
            assert executor is not None
            executor.hang(self.zone)
            # Where one device carries all zones they all hang, and nobody can do without them.
            shared = len({fs.device for fs in world.zones}) == 1
            longest = rng.choice((1.0, 4.0, 8.0, 8.0 if shared else 0.0))
            # A zone with what no other has enough copies of is not put out, and everybody waits for it: it comes back.
            await asyncio.sleep(rng.random() * longest if longest else NEEDED_HANG_SECONDS)
            executor.release(self.zone)
            self.met("hang-ended")

    def met(self, what: str) -> None:
        self.world.faults[f"zone-{what}"] += 1
        self.world.note(f"ZONE {self.zone}: {what}")

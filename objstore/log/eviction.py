"""Which clean regions of the block map leave memory first.

A clock for which reads and writes leave no marks, since they must stay cheap: what tells that a region is in use is
that it comes back. The hand passes a region once after it was loaded, twice if it had been evicted shortly before.
"""

from collections.abc import Callable, Collection
from typing import Final

GHOSTS_MAX: Final = 4096
"""Evicted regions that are remembered."""
SCAN_MAX: Final = 1 << 13
"""Regions that one call looks at (0.3 us each): a map full of dirty regions must not stop the event loop."""
CHANCES_LOADED: Final = 1
CHANCES_GHOST: Final = 2


class EvictionClock:
    """Order of eviction; knows region numbers only."""

    __slots__ = ("_chances", "_ghosts", "_hand")

    def __init__(self) -> None:
        self._hand: list[int] = []
        self._chances: dict[int, int] = {}
        self._ghosts: dict[int, None] = {}

    def loaded(self, region: int) -> None:
        """A region came into memory."""
        known = self._ghosts.pop(region, self) is None
        self._chances[region] = CHANCES_GHOST if known else CHANCES_LOADED

    def evicted(self, region: int) -> None:
        """A region left memory."""
        self._chances.pop(region, None)
        self._ghosts[region] = None
        if len(self._ghosts) > GHOSTS_MAX:
            del self._ghosts[next(iter(self._ghosts))]

    def forget(self, region: int) -> None:
        """A region is no more."""
        self._chances.pop(region, None)

    def candidates(self, regions: Collection[int], may_go: Callable[[int], bool], count_max: int) -> list[int]:
        """Up to count_max of the regions that may go, the least wanted first; call again for more.

        Looks at SCAN_MAX regions at most. Goes on to another turn of the clock only if nothing could go without using
        up a chance, so a map within that bound yields something if anything may go.
        """
        found: dict[int, None] = {}
        passed = True
        steps = SCAN_MAX
        while passed and not found:
            passed = False
            turn = min(len(regions), steps)
            steps -= turn
            for _ in range(turn):
                if len(found) >= count_max:
                    break
                if not self._hand:
                    self._hand = list(regions)
                    self._hand.reverse()
                region = self._hand.pop()
                if region in found or not may_go(region):
                    continue
                chances = self._chances.pop(region, 0)
                if not chances:
                    found[region] = None
                    continue
                passed = True
                if chances > 1:
                    self._chances[region] = chances - 1
        return list(found)

"""Which zones hold an object: weighted rendezvous hashing, a pure function of the zones, the key and the copies.

Each zone draws a number u in (0, 1) from xxh3_64 of its id and the key, and scores -weight / ln(u); the highest scores
win. So a zone gets a share of the keys in proportion to its weight, every process on every machine chooses alike, and
a zone that comes or goes moves only the keys that it wins or held. 7 us for 3 of 16 zones: placements are made per
run of segments and are stored with it, so nothing computes them on the hot path.
"""

from collections.abc import Sequence
from math import log
from typing import Final

from xxhash import xxh3_64_intdigest

KEY_INT_BYTES: Final = 8
"""An int key is hashed as that many bytes, little-endian."""

_UNIT: Final = 1.0 / (1 << 53)


def choose(zones: Sequence[tuple[str, float]], key: bytes | int, copies: int) -> list[str]:
    """The ids of the `copies` zones for `key`, best first; all that there are, if they are fewer.

    zones: (id, weight) in any order, ids distinct; a zone of weight 0 is never chosen. Weights are relative.
    key: what is placed; an int in 0..2**64 - 1.
    """
    if isinstance(key, int):
        key = key.to_bytes(KEY_INT_BYTES, "little")
    scored = [(_score(zone, weight, key), zone) for zone, weight in zones if weight > 0]
    scored.sort(reverse=True)
    return [zone for _, zone in scored[:copies]]


def _score(zone: str, weight: float, key: bytes) -> float:
    # The id's own hash is the seed, so that no id and key run together into those of another pair. 53 bits fill a
    # double exactly; the half keeps u off 0 and 1.
    digest = xxh3_64_intdigest(key, seed=xxh3_64_intdigest(zone.encode()))
    return -weight / log(((digest >> 11) + 0.5) * _UNIT)

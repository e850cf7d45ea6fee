"""The root of a checkpoint in memory against a plain dictionary."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from objstore.format.checkpoint import ROOT
from objstore.log.regionmap import PageRef
from objstore.log.root import Root, in_checkpoints, live_bytes, merged, without

refs = st.builds(PageRef, st.integers(1, 5), st.integers(0, 1 << 40), st.integers(1, 9000))
tables = st.dictionaries(st.integers(0, 40) | st.integers(0, (1 << 32) - 1), refs, max_size=30)


def rows_of(table: dict[int, PageRef]) -> np.ndarray:
    return np.array([(region, ref.checkpoint, ref.length, ref.offset) for region, ref in table.items()], ROOT)


async def table_of(root: Root) -> dict[int, PageRef]:
    assert sorted(root.regions.tolist()) == root.regions.tolist() == root.rows["region"].tolist()
    pages = await root.pages()
    assert len(pages) == len(root)
    assert all(root.get(region) == ref for region, ref in pages.items())
    return pages


@given(tables, tables, st.sets(st.integers(0, 40)))
async def test_changes(old: dict[int, PageRef], new: dict[int, PageRef], gone: set[int]) -> None:
    root = Root(rows_of(old))
    assert await table_of(root) == old
    less = without(root, np.array(sorted(gone), np.uint64))
    assert await table_of(less) == {region: ref for region, ref in old.items() if region not in gone}
    assert await table_of(merged(root, rows_of(new))) == {**old, **new}
    assert await table_of(root) == old
    assert all(root.get(region) is None for region in gone - old.keys())


@given(tables, st.sets(st.integers(1, 5)), st.integers(0, 40000))
def test_pages_by_checkpoint(table: dict[int, PageRef], numbers: set[int], bytes_max: int) -> None:
    root = Root(rows_of(table))
    sizes: dict[int, int] = {}
    for ref in table.values():
        sizes[ref.checkpoint] = sizes.get(ref.checkpoint, 0) + ref.length
    assert live_bytes(root) == sizes
    wanted = [(region, ref) for region, ref in sorted(table.items()) if ref.checkpoint in numbers]
    assert sorted(table) == sorted(region for number in range(1, 6) for region in root.in_checkpoint(number))
    found = in_checkpoints(root, numbers, bytes_max)
    assert found == wanted[: len(found)]
    before = sum(ref.length for _, ref in found[:-1])
    assert not found or before < bytes_max
    assert len(found) == len(wanted) or before + found[-1][1].length >= bytes_max if found else True


def test_nothing() -> None:
    root = Root()
    assert len(root) == 0
    assert root.get(7) is None
    assert live_bytes(root) == {}
    assert in_checkpoints(root, {1}, 100) == []

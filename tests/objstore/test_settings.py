"""Settings of a store refuse what they can't keep."""

import pytest

from objstore.errors import InvalidRequest
from objstore.units import GIB, MIB
from objstore.volume.settings import MODES, StoreSettings, check_mode


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dirty_bytes_max", 0),
        ("dirty_bytes_max", 17 * GIB),
        ("dirty_age_seconds", 0.0),
        ("dirty_age_seconds", float("nan")),
        ("segment_bytes", 16 * MIB + 4096),
        ("segment_bytes", MIB + 1),
        ("map_memory_bytes", -1),
    ],
)
def test_values_out_of_range_name_the_field(field: str, value: float) -> None:
    with pytest.raises(InvalidRequest, match=field):
        StoreSettings(**{field: value})  # type: ignore[arg-type]


def test_an_unknown_mode_is_named_with_those_that_exist() -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_mode("writeahead")
    assert "'writeahead'" in str(caught.value)
    assert all(mode in str(caught.value) for mode in MODES)

"""Names of VDIs."""

import pytest

from objstore.errors import InvalidRequest
from objstore.names import check_name


@pytest.mark.parametrize(
    "name", ["a", "disk", "Datenträger 1", "a.b-c_d", "盘", "x" * 200, "é" * 100, "100%", "a\\b", "~"]
)
def test_good_names(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("a/b", "'/'"),
        ("disk@tag", "'@'"),
        ("disk:1", "':'"),
        ("-a", "'-'"),
        (".a", "'.'"),
        ("a\nb", "'\\n'"),
        ("a\x00", "'\\x00'"),
        ("a\x7f", "'\\x7f'"),
        ("a\x85", "'\\x85'"),
        ("a\u2028b", "'\\u2028'"),
        ("a\udcff", "'\\udcff'"),
        ("é" * 101, "202 bytes"),
        ("x" * 201, "201 bytes"),
        ("", "empty"),
    ],
)
def test_bad_names_are_refused_and_the_offender_is_named(name: str, named: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_name(name)
    message = str(caught.value)
    assert named in message
    assert message.isprintable()

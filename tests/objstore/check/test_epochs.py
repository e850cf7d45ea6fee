"""Which epoch is in force, and who is believed: small histories written out by hand."""

from collections.abc import Sequence

from objstore.check.documents import CatalogHead, Epoch, Member
from objstore.check.epochs import choose, line_of

HEAD = CatalogHead(0, 1, 0, 0, 0)


def zone(letter: str) -> bytes:
    return letter.encode() * 16


def epoch(
    number: int,
    name: str,
    parent: str,
    members: str,
    *,
    w: int | None = None,
    start: bool = False,
    complete: bool = True,
    forced: bool = False,
) -> Epoch:
    zones = tuple(Member(ord(letter) - ord("a"), zone(letter), letter, True, "") for letter in members)
    needed = -(-len(members) // 2) if w is None else w
    return Epoch(number, zone(name), zone(parent), zones, (), needed, start, complete, forced, HEAD)


def held(epochs: Sequence[Epoch], **zones: str) -> dict[bytes, dict[int, bytes]]:
    """zones: which epochs each zone has, by the letters of their ids."""
    known = {chr(record.id[0]): record for record in epochs}
    return {zone(letter): {known[name].number: known[name].id for name in names} for letter, names in zones.items()}


def chosen(epochs: Sequence[Epoch], **zones: str) -> tuple[str, bool] | None:
    choice = choose({record.id: record for record in epochs}, held(epochs, **zones))
    return None if choice is None else (chr(choice.epoch.id[0]), choice.openable)


FIRST = epoch(1, "1", "0", "abc", start=True)


def test_a_majority_of_the_members_is_enough() -> None:
    assert chosen([FIRST], a="1", b="1", c="1") == ("1", True)
    assert chosen([FIRST], a="1", c="1") == ("1", True)
    assert chosen([FIRST], a="1") == ("1", False)
    assert chosen([]) is None


def test_a_zone_that_was_left_out_does_not_bring_the_past_back() -> None:
    second = epoch(2, "2", "1", "ab")
    assert chosen([FIRST, second], a="12", b="12", c="1") == ("2", True)
    assert chosen([FIRST, second], b="12", c="1") == ("2", False), "a may have gone on alone"
    assert chosen([FIRST], c="1") == ("1", False)


def test_a_change_that_reached_some_members_is_dead() -> None:
    second = epoch(2, "2", "1", "abc", complete=False)
    assert chosen([FIRST, second], a="12", b="1", c="1") == ("1", True)
    assert chosen([FIRST, second], a="12", b="12", c="12") == ("2", True)


def test_rivals_of_one_number() -> None:
    """Written when the other one's zones were away: ids and parents tell, not numbers."""
    second, rival = epoch(2, "2", "1", "bc", complete=False), epoch(2, "x", "1", "ac", start=True)
    assert chosen([FIRST, second, rival], a="1x", b="12", c="1x") == ("x", True)


def test_force_leaves_the_other_branch_behind() -> None:
    lost = epoch(2, "2", "1", "bc")
    alone = epoch(3, "f", "1", "a", start=True, forced=True)
    assert chosen([FIRST, lost, alone], a="1f", b="12", c="12") == ("f", True)
    assert chosen([FIRST, lost], a="1", b="12", c="12") == ("2", True)


def test_who_is_believed_behind_a_head() -> None:
    """c was put out during the run; its copy of what was begun before is shorter, and looks whole."""
    second, third = epoch(2, "2", "1", "ab"), epoch(3, "3", "2", "abc", start=True)
    records = {record.id: record for record in (FIRST, second, third)}
    line = line_of(third, records, held([FIRST, second, third], a="123", b="123", c="13"))
    assert line.holders([zone("a"), zone("b"), zone("c")], zone("1")) == {zone("a"), zone("b")}
    assert line.holders([zone("b"), zone("c")], zone("1")) == {zone("b")}
    assert line.holders([zone("c")], zone("1")) == {zone("c")}, "it had no other; nothing flushed was left to c alone"
    assert line.holders([zone("a"), zone("c")], zone("3")) == {zone("a"), zone("c")}


def test_a_holder_without_the_record_of_its_time_is_a_backup() -> None:
    line = line_of(FIRST, {FIRST.id: FIRST}, held([FIRST], a="1", b="1", c=""))
    assert line.holders([zone("b"), zone("c")], zone("1")) == {zone("b")}


def test_what_may_lie_in_missing_zones_alone() -> None:
    line = line_of(FIRST, {FIRST.id: FIRST}, held([FIRST], a="1", b="1"))
    assert line.unknown_end(zone("1"), 2) == []
    assert line.unknown_end(zone("1"), 1) == [zone("c")]
    assert line.unknown_end(zone("?"), 2) == [zone("c")], "an epoch that is not known any more: all must be here"


def test_a_zone_that_was_removed_is_not_missed() -> None:
    """Nothing was left on c when it went, and b is away."""
    second = epoch(2, "2", "1", "ab")
    line = line_of(second, {FIRST.id: FIRST, second.id: second}, held([FIRST, second], a="12"))
    assert line.unknown_end(zone("1"), 2) == []
    assert line.unknown_end(zone("1"), 1) == [zone("b")]
    assert line_of(FIRST, {FIRST.id: FIRST}, held([FIRST], a="1")).unknown_end(zone("1"), 2) == [zone("b"), zone("c")]

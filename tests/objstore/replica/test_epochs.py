"""Which epoch may be opened: rules against a model that knows what really was in force."""

from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from objstore.errors import Unavailable
from objstore.format.document import CatalogHead, Epoch, Member
from objstore.replica.epochs import NO_EPOCH, History, choose_epoch, default_w, meets, quorums_of

HEAD = CatalogHead(snapshot=0, generation=0, first_number=0, position=0, previous_crc=0)


def record(
    name: str,
    number: int,
    members: str,
    parent: Epoch | None = None,
    *,
    complete: bool = True,
    start: bool = True,
    forced: bool = False,
) -> Epoch:
    """An epoch whose id is `name` and whose zones are the letters of `members`."""
    return Epoch(
        number=number,
        id=name,
        parent=parent.id if parent is not None else NO_EPOCH,
        members=[Member(number=ord(z) - 97, id=z, path=f"/{z}") for z in members],
        out=[],
        w=default_w(len(members)),
        wall=0.0,
        start=start,
        catalog=HEAD,
        next_zone=0,
        complete=complete,
        forced=forced,
    )


def unmarked(epoch: Epoch) -> Epoch:
    return msgspec.structs.replace(epoch, complete=False)


FIRST = record("first", 1, "abc")


def chosen(held: dict[str, list[Epoch]]) -> str:
    epoch = choose_epoch(held).epoch
    assert epoch is not None
    return epoch.id


@pytest.mark.parametrize(("members", "w"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (64, 32)])
def test_half_of_the_members_rounded_up(members: int, w: int) -> None:
    assert default_w(members) == w


def test_where_two_may_fail_at_once_opening_needs_all_three() -> None:
    assert default_w(3, losses=2) == 1


def test_nothing_was_ever_written() -> None:
    assert choose_epoch({"a": [], "b": []}).epoch is None


def test_two_of_three_are_enough_and_one_is_not() -> None:
    assert chosen({"a": [FIRST], "b": [FIRST]}) == "first"
    with pytest.raises(Unavailable, match=r"zones are missing: /b \(zone b\), /c \(zone c\)"):
        choose_epoch({"a": [FIRST]})


def test_a_zone_that_went_on_alone_must_be_there() -> None:
    second = record("second", 2, "ab", FIRST, start=False)
    third = record("third", 3, "a", second, start=False)
    assert chosen({"a": [FIRST, second, third]}) == "third"
    with pytest.raises(Unavailable, match="missing: /a"):
        choose_epoch({"b": [FIRST, second], "c": [FIRST]})


def test_equal_numbers_are_not_equal_epochs() -> None:
    """2 = {b, c} reached b alone; a and c went on with another 2: b's number says nothing."""
    dead = record("dead", 2, "bc", FIRST, complete=False)
    live = record("live", 2, "ac", FIRST)
    choice = choose_epoch({"a": [FIRST, live], "b": [FIRST, dead], "c": [FIRST, live]})
    assert choice.epoch == live
    assert choice.holders == {"a": {"first", "live"}, "b": {"first"}, "c": {"first", "live"}}


def test_a_record_that_did_not_reach_a_member_is_dead() -> None:
    partial = record("partial", 2, "abc", FIRST, complete=False)
    assert chosen({"a": [FIRST, partial], "b": [FIRST], "c": [FIRST]}) == "first"


def test_a_record_that_may_have_been_in_force_elsewhere_is_believed_only_with_enough_of_its_parent() -> None:
    big = record("big", 1, "abcde")
    unsure = record("unsure", 2, "abc", big, complete=False)
    with pytest.raises(Unavailable, match="/c"):
        choose_epoch({"a": [big, unsure], "b": [big, unsure]})
    choice = choose_epoch({"a": [big, unsure], "b": [big, unsure], "d": [big]})
    assert choice.epoch == unsure
    members = [Member(number=0, id=z, path="") for z in "abd"]
    assert meets(members, choice.quorums)
    assert not meets(members[:2], choice.quorums)


def test_a_backup_is_unmasked_by_the_mark_of_the_others() -> None:
    second = record("second", 2, "abc", FIRST)
    choice = choose_epoch({"a": [FIRST, second], "b": [FIRST], "c": [FIRST, second]})
    assert choice.epoch == second
    history = History(choice.chain, choice.holders)
    assert history.current("second") == {"a", "c"}
    assert history.current("first") == {"a", "b", "c"}


def test_a_backup_is_no_witness() -> None:
    """b was put back to the first epoch; what a and b did later may be on a alone."""
    second = record("second", 2, "ab", FIRST, start=False)
    with pytest.raises(Unavailable, match=r"missing: /a .*another past: /b"):
        choose_epoch({"b": [FIRST], "c": [FIRST, second]})


def test_zones_that_were_away_for_long_neither_count_nor_disturb() -> None:
    old = record("old", 3, "abc")
    chain = [record("e50", 50, "ab")]
    for number in range(51, 60):
        chain.append(record(f"e{number}", number, "ab", chain[-1]))
    assert chosen({"a": chain, "b": chain, "c": [old]}) == "e59"


def test_force_opens_what_is_there_and_overrules_what_comes_back() -> None:
    second = record("second", 2, "abc", FIRST)
    third = record("third", 3, "ab", second, start=False)
    with pytest.raises(Unavailable):
        choose_epoch({"c": [FIRST, second]})
    assert choose_epoch({"c": [FIRST, second]}, force=True).epoch == second
    forced = record("forced", 3, "c", second, forced=True)
    everything = {"a": [FIRST, second, third], "b": [FIRST, second, third], "c": [FIRST, second, forced]}
    choice = choose_epoch(everything)
    assert choice.epoch == forced
    assert choice.dropped == (third,)


def test_current_is_who_was_there_all_the_time() -> None:
    """b went and came back within one run: it lacks what was flushed meanwhile."""
    e1 = record("e1", 1, "abc")
    e2 = record("e2", 2, "ac", e1, start=False)
    e3 = record("e3", 3, "abc", e2, start=False)
    e4 = record("e4", 4, "abc", e3)
    history = History([e4, e3, e2, e1], {z: {"e1", "e2", "e3", "e4"} for z in "abc"})
    assert history.current("e1") == {"a", "c"}
    assert history.current("e3") == {"a", "b", "c"}
    assert [e.id for e in history.run_from("e2")] == ["e2", "e3"]


def test_an_epoch_that_nobody_marked_ends_no_run() -> None:
    e1 = record("e1", 1, "abc")
    e2 = record("e2", 2, "ab", e1, start=False, complete=False)
    history = History([e2, e1], {"a": {"e1", "e2"}, "b": {"e1", "e2"}, "c": {"e1"}})
    assert history.current("e1") == {"a", "b", "c"}


class Model:
    """Zones that hold records, processes that die anywhere; `force` is the last epoch that really was in force."""

    def __init__(self, zones: str) -> None:
        self.held: dict[str, dict[str, Epoch]] = {z: {} for z in zones}
        self.in_force: Epoch | None = None
        self.count = 0

    def here(self, zones: Sequence[str]) -> dict[str, list[Epoch]]:
        return {z: list(self.held[z].values()) for z in zones}

    def write(self, data: st.DataObject, members: list[str], parent: Epoch | None, number: int, *, start: bool) -> bool:
        """One record to each, in any order, then the marks; the process may die before any of them."""
        self.count += 1
        epoch = record(f"e{self.count}", number, "".join(members), parent, complete=False, start=start)
        order = [*data.draw(st.permutations(members)), *data.draw(st.permutations(members))]
        # Dying late and dying not at all are as likely as dying early.
        end = data.draw(st.integers(0, len(order)) | st.just(len(order)))
        for i, zone in enumerate(order[:end]):
            self.held[zone][epoch.id] = epoch if i < len(members) else msgspec.structs.replace(epoch, complete=True)
        if end == len(order):
            self.in_force = msgspec.structs.replace(epoch, complete=True)
        return end == len(order)

    def run(self, data: st.DataObject) -> None:
        """A process opens with some zones, and goes on without some of them."""
        zones = data.draw(st.lists(st.sampled_from(sorted(self.held)), min_size=1, unique=True))
        try:
            choice = choose_epoch(self.here(zones))
        except Unavailable:
            return
        if choice.epoch is None and len(zones) < len(self.held):
            return  # a new store is made of all its zones
        self.check(choice.epoch)
        members = data.draw(st.lists(st.sampled_from(sorted(zones)), min_size=1, unique=True))
        if choice.epoch is None:
            members = zones
        if not meets(record("", 0, "".join(members)).members, choice.quorums):
            return
        number = choice.highest + 1
        alive = self.write(data, sorted(members), choice.epoch, number, start=True)
        while alive and len(members) > 1 and data.draw(st.booleans()):
            parent = self.in_force
            assert parent is not None
            joining = [z for z in zones if z not in members] if data.draw(st.booleans()) else []
            members = [*data.draw(st.lists(st.sampled_from(sorted(members)), min_size=1, unique=True)), *joining]
            number += 1
            if not meets(record("", 0, "".join(members)).members, quorums_of((parent,))):
                return
            alive = self.write(data, sorted(members), parent, number, start=False)

    def check(self, epoch: Epoch | None) -> None:
        """Whatever was in force is in the past of what is opened now."""
        if self.in_force is None:
            return
        everything = {e.id: e for records in self.held.values() for e in records.values()}
        past = set()
        while epoch is not None:
            past.add(epoch.id)
            epoch = everything.get(epoch.parent)
        assert self.in_force.id in past, f"{self.in_force} is forgotten"


@settings(max_examples=300, deadline=None)
@given(st.data(), st.integers(2, 5))
def test_what_was_in_force_is_never_forgotten(data: st.DataObject, count: int) -> None:
    """Any zones are there or not at each start, and the process dies between any two records. With all of them there
    the store always opens."""
    model = Model("abcde"[:count])
    for _ in range(data.draw(st.integers(1, 12))):
        model.run(data)
        model.check(choose_epoch(model.here(sorted(model.held))).epoch)


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(3, 5))
def test_a_zone_from_a_backup_is_found_out_if_the_others_are_there(data: st.DataObject, count: int) -> None:
    zones = "abcde"[:count]
    model = Model(zones)
    backups: list[dict[str, Epoch]] = []
    for _ in range(data.draw(st.integers(2, 10))):
        backups.append(dict(model.held["a"]))
        model.run(data)
    present = dict(model.held["a"])
    model.held["a"] = data.draw(st.sampled_from(backups))
    try:
        choice = choose_epoch(model.here(sorted(zones)))
    except Unavailable:
        return
    in_force = model.in_force
    if in_force is None or {m.id for m in in_force.members} == {"a"}:
        return  # nobody else knows
    model.check(choice.epoch)
    history = History(choice.chain, choice.holders)
    if in_force.id in present and in_force.id not in model.held["a"]:
        assert "a" not in history.current(in_force.id)

"""Goal: service is counted as stated, raw totals are exact, and bad totals and weights are refused with a reason.

Method: examples for the definition, properties for sums; `Lowest` is held to a plain minimum over random histories.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cost_service.charges import MAX_COUNT, NOTHING, Served, ServiceKind, ServiceUnit, checked_weight
from cost_service.lowest import SPARE_ENTRIES, Lowest

COUNTS = st.builds(Served, *[st.integers(0, 10**12)] * 4)


def test_an_output_token_counts_as_two_input_tokens_and_a_cached_one_is_free() -> None:
    assert ServiceUnit().service(Served(100, 50, 10, 7)) == 100 + 2 * 10


def test_seconds_are_the_predicted_engine_time_alone() -> None:
    assert ServiceUnit(ServiceKind.SECONDS).service(Served(100, 50, 10, 1_500_000)) == 1.5


@given(COUNTS, COUNTS)
def test_sums_and_differences_are_exact(a: Served, b: Served) -> None:
    assert a.plus(b).minus(b) == a
    assert a.largest(b) == b.largest(a)
    assert a.largest(b).minus(a).largest(NOTHING) == a.largest(b).minus(a)


@pytest.mark.parametrize("value", [-1, MAX_COUNT, 2**60, 1.5, True, float("nan")])
def test_a_total_that_is_no_exact_count_is_refused_by_name(value: int) -> None:
    with pytest.raises(ValueError, match=r"num_output_tokens of tenant f is .*must be an integer from 0 up to 2\^53"):
        Served(num_output_tokens=value).checked("tenant f")


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf"), 1e-4, 1e7])
def test_a_weight_out_of_range_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match=r"The weight is"):
        checked_weight(weight)


class LowestMachine(RuleBasedStateMachine):
    """Keys rise silently and fall with a word; the lowest is always the plain minimum."""

    names = st.sampled_from("abcdefgh")

    def __init__(self) -> None:
        super().__init__()
        self.keys = dict.fromkeys("abcdefgh", 0.0)
        self.members: set[str] = set()
        self.lowest = Lowest(self.keys.__getitem__)

    @rule(name=names)
    def join_or_leave(self, name: str) -> None:
        if name in self.members:
            self.members.discard(name)
            self.lowest.discard(name)
        else:
            self.members.add(name)
            self.lowest.add(name)

    @rule(name=names, by=st.floats(0, 10))
    def rise(self, name: str, by: float) -> None:
        self.keys[name] += by

    @rule(name=names, by=st.floats(0, 10))
    def fall(self, name: str, by: float) -> None:
        self.keys[name] -= by
        self.lowest.fell(name)

    @invariant()
    def the_lowest_is_the_minimum(self) -> None:
        expected = min(((self.keys[name], name) for name in self.members), default=None)
        assert self.lowest.lowest() == expected


TestLowest = LowestMachine.TestCase


def test_a_key_that_falls_again_and_again_does_not_fill_the_heap() -> None:
    keys = {"f": 0.0, "g": -1e9}
    lowest = Lowest(keys.__getitem__)
    lowest.add("f")
    lowest.add("g")
    for _ in range(10_000):
        keys["f"] -= 1.0
        lowest.fell("f")
    assert len(lowest._heap) <= 2 * 2 + SPARE_ENTRIES


def test_entries_of_before_are_thrown_out_once_and_not_corrected_after_every_rise() -> None:
    keys, asked = {"a": 0.0, "b": 100.0}, 0

    def key(name: str) -> float:
        nonlocal asked
        asked += 1
        return keys[name]

    lowest = Lowest(key)
    lowest.add("a")
    lowest.add("b")
    for _ in range(SPARE_ENTRIES - 4):
        keys["b"] -= 1.0
        lowest.fell("b")
    asked, rises = 0, 100
    for _ in range(rises):
        keys["a"] += 20.0
        keys["b"] += 20.0
        assert lowest.lowest() == (keys["a"], "a")
    assert asked <= 4 * rises

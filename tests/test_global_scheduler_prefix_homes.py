"""Goal: a router knows which replicas may still have a prompt's beginning, of few marks a prompt and in bounded memory.

Method: texts that share a beginning are compared by their marks; homes are driven by hand through use, eviction, crashes.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from global_scheduler.prefix_homes import (
    MARK_BYTES,
    MARK_RATIO,
    MAX_HOMES,
    Mark,
    PrefixHomes,
    mark_places,
    prompt_marks,
)


def marks_of(text: bytes, salt: str = "") -> list[Mark]:
    return prompt_marks([text], salt=salt, bytes_per_token=4)


def homes(*replicas: str, max_marks: int = 100) -> PrefixHomes:
    made = PrefixHomes(max_marks)
    for name in replicas:
        made.up(name)
    return made


@given(num=st.integers(0, 100_000))
def test_marks_are_few_and_never_further_apart_than_their_ratio(num: int) -> None:
    places = mark_places(num)
    assert len(places) <= 55
    assert places == sorted(set(places))
    for before, after in zip(places, [*places[1:], num], strict=False):
        assert after <= max(before + 1, before * MARK_RATIO)
    assert mark_places(num + 1)[: len(places)] == places, "a longer prompt has the same marks and more"


@given(shared=st.binary(max_size=20_000), one=st.binary(max_size=600), other=st.binary(max_size=600))
def test_prompts_have_those_marks_in_common_up_to_which_they_are_equal(
    shared: bytes, one: bytes, other: bytes
) -> None:  # fmt: skip
    first, second = marks_of(shared + one), marks_of(shared + other)
    common = next(
        (n for n, (a, b) in enumerate(zip(shared + one, shared + other, strict=False)) if a != b),
        min(len(shared + one), len(shared + other)),
    )
    num = len(mark_places(common // MARK_BYTES))
    assert first[:num] == second[:num]
    assert not {mark.key for mark in first[num:]} & {mark.key for mark in second[num:]}


def test_marks_hang_on_the_text_and_not_on_its_pieces() -> None:
    text = bytes(range(256)) * 8
    assert prompt_marks([text[:100], text[100:]], salt="s", bytes_per_token=4) == marks_of(text, "s")


def test_two_salts_share_nothing() -> None:
    text = b"x" * 5000
    assert not {mark.key for mark in marks_of(text, "a")} & {mark.key for mark in marks_of(text, "b")}


def test_a_short_prompt_has_no_marks_and_a_long_one_counts_its_tokens() -> None:
    assert marks_of(b"x" * (MARK_BYTES - 1)) == []
    assert [mark.num_tokens for mark in marks_of(b"x" * MARK_BYTES * 3)] == [64, 128, 192]


def test_the_longest_beginning_of_each_replica_is_found() -> None:
    known = homes("a", "b", "c")
    long = [Mark(1, 64), Mark(2, 128), Mark(3, 192)]
    known.serve(long[:1], "a", 100)
    known.serve(long, "b", 100)
    assert known.cached([*long, Mark(4, 256)]) == {"a": 64, "b": 192}
    assert known.cached([Mark(9, 64)]) == {}


def test_a_beginning_is_taken_for_evicted_after_a_pools_worth_of_new_tokens() -> None:
    known = homes("a")
    known.set_pool("a", 1000)
    mark = [Mark(1, 64)]
    known.serve(mark, "a", 64)
    known.serve([Mark(2, 64)], "a", 1000)
    assert known.cached(mark) == {"a": 64}
    known.serve([], "a", 1)
    assert known.cached(mark) == {}
    known.serve(mark, "a", 64)
    assert known.cached(mark) == {"a": 64}


def test_a_replica_that_comes_back_has_nothing() -> None:
    known = homes("a", "b")
    mark = [Mark(1, 64)]
    known.serve(mark, "a", 64)
    known.down("a")
    assert known.cached(mark) == {}
    known.up("a")
    assert known.cached(mark) == {}
    known.check()


def test_memory_is_bounded_in_marks_and_in_replicas_of_each() -> None:
    names = [f"r{number}" for number in range(MAX_HOMES + 2)]
    known = homes(*names, max_marks=3)
    for name in names:
        known.serve([Mark(1, 64)], name, 64)
    assert set(known.cached([Mark(1, 64)])) == set(names[2:]), "those that served it last"
    known.serve([Mark(key, 64) for key in (2, 3, 4)], "r0", 64)
    assert known.cached([Mark(1, 64)]) == {}, "the mark used longest ago makes room"
    known.check()


def test_a_replica_comes_up_once() -> None:
    known = homes("a")
    with pytest.raises(AssertionError, match="up already"):
        known.up("a")

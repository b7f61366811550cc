"""Goal: the host pool never loses a slot, never lends one twice, and says no instead of lending too much.

Method: sentences about single operations, and a state machine of random histories against a plain dict.
"""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from replicas.host_pool import HostBlockPool, SavedBlocks


def test_a_new_pool_is_all_free() -> None:
    pool = HostBlockPool(5)
    assert (pool.num_slots, pool.num_free_slots, pool.num_used_slots) == (5, 5, 0)
    pool.check()


def test_slots_are_handed_out_lowest_first_so_that_a_history_repeats_exactly() -> None:
    pool = HostBlockPool(6)
    assert pool.save("a", num_tokens=20, num_blocks=2) == SavedBlocks(20, (0, 1))
    assert pool.save("b", num_tokens=33, num_blocks=3) == SavedBlocks(33, (2, 3, 4))
    assert pool.release("a") == 2
    assert pool.save("c", num_tokens=40, num_blocks=3) == SavedBlocks(40, (0, 1, 5))


def test_a_request_that_does_not_fit_changes_nothing() -> None:
    pool = HostBlockPool(3)
    pool.save("a", num_tokens=10, num_blocks=2)
    assert pool.save("b", num_tokens=10, num_blocks=2) is None
    assert pool.get("b") is None
    assert pool.num_free_slots == 1
    pool.check()


def test_a_request_that_fits_exactly_takes_the_last_slot() -> None:
    pool = HostBlockPool(2)
    assert pool.save("a", num_tokens=10, num_blocks=2) is not None
    assert pool.num_free_slots == 0


def test_a_pool_of_zero_slots_saves_nothing() -> None:
    pool = HostBlockPool(0)
    assert pool.save("a", num_tokens=1, num_blocks=1) is None
    pool.check()


def test_releasing_twice_or_a_stranger_frees_nothing() -> None:
    pool = HostBlockPool(2)
    pool.save("a", num_tokens=10, num_blocks=2)
    assert pool.release("stranger") == 0
    assert pool.release("a") == 2
    assert pool.release("a") == 0
    pool.check()


def test_release_all_empties_the_pool_and_counts_what_was_held() -> None:
    pool = HostBlockPool(6)
    pool.save("a", num_tokens=10, num_blocks=2)
    pool.save("b", num_tokens=10, num_blocks=3)
    assert pool.release_all() == 5
    assert pool.release_all() == 0
    assert pool.get("a") is None
    assert pool.num_used_slots == 0
    pool.check()


def test_a_negative_size_is_refused_with_the_mend() -> None:
    with pytest.raises(ValueError, match="0 turns swapping off"):
        HostBlockPool(-1)


def test_a_second_copy_of_one_request_is_a_bug_of_the_caller() -> None:
    pool = HostBlockPool(4)
    pool.save("a", num_tokens=10, num_blocks=1)
    with pytest.raises(AssertionError, match="already has blocks"):
        pool.save("a", num_tokens=10, num_blocks=1)


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 1), (1, 0), (-1, 1), (1, -1)])
def test_saving_nothing_is_a_bug_of_the_caller(num_tokens: int, num_blocks: int) -> None:
    with pytest.raises(AssertionError):
        HostBlockPool(4).save("a", num_tokens=num_tokens, num_blocks=num_blocks)


@pytest.mark.parametrize(
    ("free", "saved", "complaint"),
    [
        ([0], {}, "free 1"),
        ([0, 1], {"a": SavedBlocks(1, (1,))}, "free 2"),
        ([0], {"a": SavedBlocks(1, (0,))}, "both free and held"),
        ([], {"a": SavedBlocks(1, (0,)), "b": SavedBlocks(1, (0,))}, "held twice"),
        ([0], {"a": SavedBlocks(1, (7,))}, "outside the pool"),
    ],
)
def test_check_finds_broken_books(free: list[int], saved: dict[str, SavedBlocks], complaint: str) -> None:
    pool = HostBlockPool(2)
    pool._free, pool._saved = free, saved
    with pytest.raises(AssertionError, match=complaint):
        pool.check()


class HostPoolMachine(RuleBasedStateMachine):
    """Random histories of one pool, beside a dict of what must be in it."""

    @initialize(num_slots=st.integers(0, 12))
    def start(self, num_slots: int) -> None:
        self.pool = HostBlockPool(num_slots)
        self.model: dict[str, SavedBlocks] = {}

    def num_free(self) -> int:
        return self.pool.num_slots - sum(len(saved.slots) for saved in self.model.values())

    @rule(name=st.sampled_from("abcdef"), num_blocks=st.integers(1, 6), num_tokens=st.integers(1, 100))
    def save(self, name: str, num_blocks: int, num_tokens: int) -> None:
        if name in self.model:
            return
        free = sorted(set(range(self.pool.num_slots)) - {s for saved in self.model.values() for s in saved.slots})
        saved = self.pool.save(name, num_tokens=num_tokens, num_blocks=num_blocks)
        if num_blocks > len(free):
            assert saved is None
        else:
            assert saved == SavedBlocks(num_tokens, tuple(free[:num_blocks]))
            self.model[name] = saved

    @rule(name=st.sampled_from("abcdef"))
    def release(self, name: str) -> None:
        expected = self.model.pop(name, None)
        assert self.pool.release(name) == (len(expected.slots) if expected else 0)

    @precondition(lambda self: self.model)
    @rule()
    def release_all(self) -> None:
        assert self.pool.release_all() == sum(len(saved.slots) for saved in self.model.values())
        self.model.clear()

    @invariant()
    def books_agree(self) -> None:
        self.pool.check()
        assert self.pool.num_free_slots == self.num_free()
        assert self.pool.num_used_slots == self.pool.num_slots - self.num_free()
        assert {name: self.pool.get(name) for name in "abcdef" if self.pool.get(name)} == self.model


TestAnyHistoryOfThePool = HostPoolMachine.TestCase
TestAnyHistoryOfThePool.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)

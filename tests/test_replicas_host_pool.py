"""Goal: the host pool never loses a slot, never lends one twice, keeps tenants within their caps, and reuses what it has.

Method: sentences about single operations on small pools; random histories are in `test_replicas_swap_properties.py`.
"""

import math

import pytest

from replicas.host_pool import HostBlockPool, Reservation, SavedBlocks

BLOCK_SIZE = 10


def pool_of(num_slots: int, max_tenant_fraction: float = 1.0) -> HostBlockPool:
    return HostBlockPool(num_slots, block_size=BLOCK_SIZE, max_tenant_fraction=max_tenant_fraction)


def save(pool: HostBlockPool, request_id: str, num_tokens: int, *, tenant: str = "t") -> Reservation | None:
    return pool.save(request_id, tenant=tenant, num_tokens=num_tokens)


def save_and_retain(pool: HostBlockPool, request_id: str, num_tokens: int, *, tenant: str = "t") -> None:
    assert save(pool, request_id, num_tokens, tenant=tenant)
    pool.retain(request_id, num_tokens=num_tokens)


def counts(pool: HostBlockPool) -> tuple[int, int, int]:
    """Slots that are free, saved and retained, from books that are in order."""
    pool.check()
    return pool.num_free_slots, pool.num_used_slots, pool.num_retained_slots


def slots_of(pool: HostBlockPool, request_id: str) -> tuple[int, ...]:
    saved = pool.get(request_id)
    assert saved is not None
    return saved.slots


def test_a_new_pool_is_all_free() -> None:
    assert counts(pool_of(5)) == (5, 0, 0)


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (10, 1), (11, 2)])
def test_a_partly_filled_block_counts_as_one(num_tokens: int, num_blocks: int) -> None:
    assert pool_of(0).num_blocks(num_tokens) == num_blocks


def test_slots_are_handed_out_lowest_first_so_that_a_history_repeats_exactly() -> None:
    pool = pool_of(6)
    save(pool, "a", 20)
    save(pool, "b", 23)
    assert pool.get("b") == SavedBlocks(tenant="t", num_tokens=23, slots=(2, 3, 4))
    assert pool.release("a") == 2
    assert save(pool, "c", 30) == Reservation(num_kept_blocks=0, new_slots=[0, 1, 5], zero_slots=[])


def test_a_request_that_does_not_fit_changes_nothing() -> None:
    pool = pool_of(3)
    save(pool, "a", 20)
    assert save(pool, "b", 20) is None
    assert pool.get("b") is None
    assert counts(pool) == (1, 2, 0)


def test_a_request_that_fits_exactly_takes_the_last_slot() -> None:
    pool = pool_of(2)
    assert save(pool, "a", 20)
    assert counts(pool) == (0, 2, 0)


def test_a_pool_of_zero_slots_saves_nothing() -> None:
    assert save(pool_of(0), "a", 1) is None


def test_releasing_twice_or_a_stranger_frees_nothing() -> None:
    pool = pool_of(2)
    save(pool, "a", 20)
    assert [pool.release(name) for name in ("stranger", "a", "a")] == [0, 2, 0]


def test_full_blocks_stay_retained_when_a_request_is_back_and_the_partly_filled_one_is_freed() -> None:
    pool = pool_of(5)
    save_and_retain(pool, "a", 25)
    assert pool.get("a") is None
    assert pool.num_retained_blocks("a") == 2
    assert counts(pool) == (3, 0, 2)


def test_blocks_that_did_not_come_back_as_they_were_are_not_retained() -> None:
    pool = pool_of(5)
    save(pool, "a", 40)
    pool.retain("a", num_tokens=39)  # the last token of the last block is computed anew
    assert pool.num_retained_blocks("a") == 3


def test_a_retained_copy_of_no_full_block_is_none() -> None:
    pool = pool_of(2)
    save_and_retain(pool, "a", 9)
    assert counts(pool) == (2, 0, 0)


def test_a_request_saved_again_keeps_its_retained_slots_and_takes_new_ones_for_the_rest() -> None:
    pool = pool_of(6)
    save_and_retain(pool, "a", 25)
    save(pool, "b", 10)  # takes slot 2, which held the partly filled block
    assert save(pool, "a", 41) == Reservation(num_kept_blocks=2, new_slots=[3, 4, 5], zero_slots=[])
    assert slots_of(pool, "a") == (0, 1, 3, 4, 5)
    assert pool.num_retained_blocks("a") == 0


def test_a_request_that_is_behind_its_retained_copy_keeps_what_it_needs_of_it_and_frees_the_rest() -> None:
    pool = pool_of(6)
    save_and_retain(pool, "a", 40)
    assert save(pool, "a", 15) == Reservation(num_kept_blocks=2, new_slots=[], zero_slots=[])
    assert counts(pool) == (4, 2, 0)


def test_the_request_retained_first_gives_way_first_from_its_last_block_on() -> None:
    pool = pool_of(6)
    save_and_retain(pool, "old", 30)
    save_and_retain(pool, "young", 30)
    save(pool, "c", 20)
    assert slots_of(pool, "c") == (1, 2)
    assert (pool.num_retained_blocks("old"), pool.num_retained_blocks("young")) == (1, 3)
    save(pool, "d", 20)
    assert slots_of(pool, "d") == (0, 5)
    assert (pool.num_retained_blocks("old"), pool.num_retained_blocks("young")) == (0, 2)


def test_a_copy_retained_again_is_the_youngest() -> None:
    pool = pool_of(4)
    save_and_retain(pool, "a", 20)
    save_and_retain(pool, "b", 20)
    save_and_retain(pool, "a", 20)
    save(pool, "c", 10)
    assert (pool.num_retained_blocks("a"), pool.num_retained_blocks("b")) == (2, 1)


def test_nothing_is_evicted_while_slots_are_free_or_for_one_that_does_not_fit_anyway() -> None:
    pool = pool_of(5)
    save_and_retain(pool, "a", 30)
    assert save(pool, "b", 20)
    assert save(pool, "c", 40) is None
    assert pool.num_retained_blocks("a") == 3


def test_what_a_request_has_retained_is_not_evicted_for_itself() -> None:
    pool = pool_of(4)
    save_and_retain(pool, "a", 20)
    save_and_retain(pool, "b", 20)
    assert pool.num_available_slots("t", "a") == 2
    assert save(pool, "a", 40)
    assert slots_of(pool, "a") == (0, 1, 2, 3)


def test_what_is_available_are_free_and_retained_slots_but_ones_own() -> None:
    pool = pool_of(10, 0.7)
    save(pool, "saved", 40, tenant="other")
    save_and_retain(pool, "a", 20)
    save_and_retain(pool, "b", 10)
    assert [pool.num_available_slots("t", name) for name in (None, "stranger", "a", "b")] == [6, 6, 4, 5]


def test_a_tenant_saves_no_more_than_its_fraction_and_others_have_the_rest() -> None:
    pool = pool_of(8, 0.5)
    assert save(pool, "a", 30)
    assert pool.num_available_slots("t") == 1
    assert save(pool, "b", 20) is None
    assert save(pool, "b", 10)
    assert pool.num_available_slots("t") == 0
    assert pool.num_available_slots("other") == 4
    assert save(pool, "c", 40, tenant="other")
    assert counts(pool) == (0, 8, 0)


def test_retained_slots_do_not_count_against_the_cap_until_they_are_saved_again() -> None:
    pool = pool_of(8, 0.5)
    save_and_retain(pool, "a", 40)
    save_and_retain(pool, "b", 30)
    assert pool.num_available_slots("t") == 4
    assert save(pool, "c", 20)
    assert pool.num_available_slots("t", "a") == -1  # its three would not even fit by themselves
    assert save(pool, "a", 40) is None
    assert pool.num_retained_blocks("a") == 3


def test_a_fraction_is_rounded_down_to_slots() -> None:
    assert pool_of(7, 0.5).num_available_slots("t") == 3


def test_the_cap_is_given_back_at_the_end_of_a_copy() -> None:
    pool = pool_of(4, 0.5)
    save(pool, "a", 20)
    pool.release("a")
    assert save(pool, "b", 20)


def test_a_slot_has_a_new_generation_whenever_it_is_handed_out_and_only_then() -> None:
    pool = pool_of(3)
    assert pool.generations([0, 1, 2]) == [0, 0, 0]
    save_and_retain(pool, "a", 25)
    assert pool.generations([0, 1, 2]) == [1, 1, 1]
    save(pool, "a", 25)  # two blocks kept, one slot filled anew
    assert pool.generations([0, 1, 2]) == [1, 1, 2]
    pool.release("a")
    assert pool.generations([2, 0]) == [2, 1]


def test_a_slot_is_zeroed_before_another_tenant_has_it_and_only_then() -> None:
    pool = pool_of(4)
    save(pool, "a", 20, tenant="one")
    pool.release("a")
    again = save(pool, "b", 20, tenant="one")
    assert again is not None
    assert again.zero_slots == []
    pool.release_all()
    other = save(pool, "c", 30, tenant="two")
    assert other is not None
    assert (other.new_slots, other.zero_slots) == ([0, 1, 2], [0, 1])
    pool.release("c")
    assert save(pool, "d", 10, tenant="two") == Reservation(num_kept_blocks=0, new_slots=[0], zero_slots=[])


def test_an_evicted_slot_is_zeroed_for_another_tenant_too() -> None:
    pool = pool_of(1)
    save_and_retain(pool, "a", 10, tenant="one")
    taken = save(pool, "b", 10, tenant="two")
    assert taken is not None
    assert taken.zero_slots == [0]


def test_release_all_frees_saved_and_retained_slots_and_counts_them() -> None:
    pool = pool_of(6)
    save_and_retain(pool, "a", 20)
    save(pool, "b", 30)
    assert pool.release_all() == 5
    assert pool.release_all() == 0
    assert pool.num_retained_blocks("a") == 0
    assert counts(pool) == (6, 0, 0)


@pytest.mark.parametrize(
    ("num_slots", "block_size", "fraction", "mend"),
    [
        (-1, 1, 1.0, "num_slots must not be negative; 0 turns swapping off"),
        (1, 0, 1.0, "block_size must be at least 1"),
        *((1, 1, bad, "max_tenant_fraction must be above 0 and at most 1") for bad in (0.0, -0.1, 1.01, math.nan)),
    ],
)
def test_a_number_out_of_range_is_refused_with_the_mend(
    num_slots: int, block_size: int, fraction: float, mend: str
) -> None:
    with pytest.raises(ValueError, match=mend):
        HostBlockPool(num_slots, block_size=block_size, max_tenant_fraction=fraction)


def test_a_second_copy_of_one_request_is_a_bug_of_the_caller() -> None:
    pool = pool_of(4)
    save(pool, "a", 10)
    with pytest.raises(AssertionError, match="already has blocks"):
        save(pool, "a", 10)


def test_a_pool_of_any_size_keeps_only_what_was_used() -> None:
    pool = pool_of(1 << 50)
    save(pool, "a", 3 * BLOCK_SIZE)
    assert pool.release("a") == 3
    save(pool, "b", 4 * BLOCK_SIZE)
    assert slots_of(pool, "b") == (0, 1, 2, 3)
    assert pool.generations([0, 1, 2, 3, 4]) == [2, 2, 2, 1, 0]
    assert pool.num_free_slots == (1 << 50) - 4


def test_saving_nothing_is_a_bug_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="num_tokens is 0"):
        save(pool_of(4), "a", 0)


def test_a_request_that_changes_its_tenant_is_a_bug_of_the_caller() -> None:
    pool = pool_of(4)
    save_and_retain(pool, "a", 10, tenant="one")
    with pytest.raises(AssertionError, match="changed its tenant"):
        save(pool, "a", 10, tenant="two")


def copy(*slots: int) -> SavedBlocks:
    return SavedBlocks(tenant="t", num_tokens=BLOCK_SIZE * len(slots), slots=slots)


@pytest.mark.parametrize(
    ("free", "saved", "retained", "complaint"),
    [
        ([0], {}, {}, "free 1"),
        ([0, 1], {"a": copy(1)}, {}, "free 2"),
        ([0], {"a": copy(0)}, {}, "in two places"),
        ([], {"a": copy(0)}, {"b": [0]}, "in two places"),
        ([0], {}, {"a": [7]}, "outside the pool"),
        ([0], {}, {"a": [1]}, "0 counted as retained, not 1"),
        ([0, 1], {}, {"a": []}, "a retained copy of nothing"),
        ([0], {"a": copy(1)}, {}, "a slot of another tenant"),
    ],
)
def test_check_finds_broken_books(
    free: list[int], saved: dict[str, SavedBlocks], retained: dict[str, list[int]], complaint: str
) -> None:
    pool = pool_of(2)
    pool._free, pool._saved, pool._retained = free, saved, retained
    pool._num_fresh, pool._generations, pool._last_tenant = 0, [1, 1], ["", ""]
    with pytest.raises(AssertionError, match=complaint):
        pool.check()

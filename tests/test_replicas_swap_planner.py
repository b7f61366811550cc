"""Goal: a step's plan copies what is needed, nothing twice, and never takes a slot that the same step still reads.

Method: sentences about single plans; histories of many, executed on bytes, are in `test_replicas_swap_properties.py`.
"""

import pickle
from collections.abc import Callable

import pytest

from replicas.host_pool import HostBlockPool, SavedBlocks
from replicas.swap_planner import SwapPlan, SwapPlanner


def planner_of(num_slots: int, block_size: int = 32, max_tenant_fraction: float = 1.0) -> SwapPlanner:
    return SwapPlanner(HostBlockPool(num_slots, block_size=block_size, max_tenant_fraction=max_tenant_fraction))


def swap_out(
    planner: SwapPlanner, request_id: str, num_tokens: int, block_ids: list[int], *, tenant: str = "t"
) -> int | None:
    return planner.swap_out(request_id, tenant=tenant, num_tokens=num_tokens, block_ids=block_ids)


def swapped_out(num_slots: int = 8, num_tokens: int = 70) -> SwapPlanner:
    """A planner between steps whose request "a" is in host memory, from the first slot on."""
    planner = planner_of(num_slots)
    assert swap_out(planner, "a", num_tokens, [40, 7, 23]) is not None
    planner.take_plan()
    return planner


def counts(planner: SwapPlanner) -> tuple[int, int, int]:
    """Host slots that are free, saved and retained, from books that are in order."""
    pool = planner.pool
    pool.check()
    return pool.num_free_slots, pool.num_used_slots, pool.num_retained_slots


def test_a_victims_blocks_are_paired_with_slots_in_their_order_the_partial_last_one_included() -> None:
    planner = planner_of(8)
    assert swap_out(planner, "a", 70, [40, 7, 23]) == 3
    assert planner.take_plan() == SwapPlan(out_blocks=[40, 7, 23], out_slots=[0, 1, 2], out_generations=[1, 1, 1])
    assert planner.pool.get("a") == SavedBlocks(tenant="t", num_tokens=70, slots=(0, 1, 2))


def test_blocks_allocated_beyond_the_computed_tokens_stay_behind() -> None:
    planner = planner_of(8)
    assert swap_out(planner, "a", 64, [40, 7, 23]) == 2
    assert planner.take_plan().out_blocks == [40, 7]


@pytest.mark.parametrize("planner", [planner_of(2), planner_of(4, max_tenant_fraction=0.5)], ids=["pool", "cap"])
def test_a_victim_that_does_not_fit_changes_neither_plan_nor_pool(planner: SwapPlanner) -> None:
    assert swap_out(planner, "a", 70, [40, 7, 23]) is None
    assert not planner.take_plan()
    assert planner.pool.num_used_slots == 0


def test_fewer_blocks_than_the_tokens_need_is_a_bug_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="70 tokens need 3 blocks, got 2"):
        swap_out(planner_of(8), "a", 70, [1, 2])


def test_a_plan_is_handed_out_once_and_survives_pickling() -> None:
    planner = planner_of(8)
    swap_out(planner, "a", 1, [5])
    plan = planner.take_plan()
    assert plan
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert not planner.take_plan()


@pytest.mark.parametrize(
    ("saved", "wanted", "cached", "loadable"),
    [
        (70, 71, 0, 70),  # the usual resume: all but the token that was sampled last
        (70, 70, 0, 69),  # one token always stays to be computed
        (70, 71, 64, 6),  # only what the prefix cache does not have
        (70, 71, 70, 0),
        (70, 71, 96, 0),  # the prefix cache has more than was saved
        (64, 200, 32, 32),  # a prefill that was preempted half-way
    ],
)
def test_a_resume_loads_what_is_saved_beyond_the_prefix_cache(
    saved: int, wanted: int, cached: int, loadable: int
) -> None:
    planner = swapped_out(num_tokens=saved)
    assert planner.num_loadable_tokens("a", num_tokens=wanted, num_cached_tokens=cached) == loadable


def test_a_stranger_has_nothing_to_load() -> None:
    planner = planner_of(8)
    assert planner.num_loadable_tokens("a", num_tokens=10, num_cached_tokens=0) == 0
    planner.swap_in("a", num_cached_tokens=0, num_loaded_tokens=0, block_ids=[1])
    assert not planner.take_plan()
    with pytest.raises(AssertionError, match="nothing saved"):
        planner.swap_in("a", num_cached_tokens=0, num_loaded_tokens=5, block_ids=[1])


def test_a_resume_copies_only_the_blocks_behind_the_cached_ones_and_retains_all_full_ones() -> None:
    planner = swapped_out()
    planner.swap_in("a", num_cached_tokens=32, num_loaded_tokens=38, block_ids=[11, 12, 13, 14])
    assert planner.take_plan() == SwapPlan(in_slots=[1, 2], in_blocks=[12, 13], in_generations=[1, 1])
    assert counts(planner) == (6, 0, 2)


def test_a_block_whose_last_token_is_computed_anew_is_not_retained() -> None:
    planner = swapped_out(num_tokens=64)
    num_loaded = planner.num_loadable_tokens("a", num_tokens=64, num_cached_tokens=0)
    planner.swap_in("a", num_cached_tokens=0, num_loaded_tokens=num_loaded, block_ids=[11, 12])
    planner.take_plan()
    assert planner.pool.num_retained_blocks("a") == 1


@pytest.mark.parametrize(("num_cached", "num_retained"), [(0, 0), (32, 1), (96, 2)])
def test_of_a_copy_that_is_not_read_only_what_the_prefix_cache_has_too_is_retained(
    num_cached: int, num_retained: int
) -> None:
    planner = swapped_out()
    planner.swap_in("a", num_cached_tokens=num_cached, num_loaded_tokens=0, block_ids=[11, 12, 13])
    assert not planner.take_plan()
    assert counts(planner) == (8 - num_retained, 0, num_retained)


@pytest.mark.parametrize(
    ("cached", "loaded", "complaint"), [(33, 5, "end inside a block"), (32, 40, "72 tokens wanted, 70 saved")]
)
def test_a_load_that_cannot_be_right_is_a_bug_of_the_caller(cached: int, loaded: int, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        swapped_out().swap_in("a", num_cached_tokens=cached, num_loaded_tokens=loaded, block_ids=[1, 2, 3])


def resumed(num_slots: int = 8) -> SwapPlanner:
    """A planner between steps whose request "a" is back on the device, with slots 0 and 1 retained."""
    planner = swapped_out(num_slots)
    planner.swap_in("a", num_cached_tokens=0, num_loaded_tokens=70, block_ids=[11, 12, 13])
    planner.take_plan()
    return planner


def test_a_block_that_is_retained_in_host_memory_is_not_copied_out_again() -> None:
    planner = resumed()
    assert swap_out(planner, "a", 100, [11, 12, 13, 14]) == 2
    assert planner.take_plan() == SwapPlan(out_blocks=[13, 14], out_slots=[2, 3], out_generations=[2, 1])
    assert planner.num_loadable_tokens("a", num_tokens=101, num_cached_tokens=0) == 100
    planner.swap_in("a", num_cached_tokens=0, num_loaded_tokens=100, block_ids=[1, 2, 3, 4])
    assert planner.take_plan().in_generations == [1, 1, 2, 1]


def test_a_victim_of_which_everything_is_retained_is_swapped_out_without_a_copy() -> None:
    planner = resumed()
    assert swap_out(planner, "a", 64, [11, 12]) == 0
    assert not planner.take_plan()
    assert counts(planner) == (6, 2, 0)


def test_a_slot_of_another_tenant_is_zeroed_by_the_plan_that_fills_it() -> None:
    planner = swapped_out()
    planner.release("a")
    swap_out(planner, "b", 128, [1, 2, 3, 4], tenant="another")
    assert planner.take_plan().zero_slots == [0, 1, 2]


@pytest.mark.parametrize(
    "end",
    [lambda planner: planner.release("a"), lambda planner: planner.copies_failed([1, 7])],
    ids=["it ended", "a slot of its copy is lost"],
)
def test_a_request_that_ended_or_whose_copy_failed_holds_nothing_saved_or_retained(
    end: Callable[[SwapPlanner], object],
) -> None:
    for planner in (swapped_out(), resumed()):
        end(planner)
        assert counts(planner) == (8, 0, 0)
        assert planner.num_loadable_tokens("a", num_tokens=71, num_cached_tokens=0) == 0


def test_copies_that_have_no_part_in_lost_slots_stay() -> None:
    planner = swapped_out()
    assert planner.copies_failed([6, 7]) == []
    assert planner.num_loadable_tokens("a", num_tokens=71, num_cached_tokens=0) == 70
    assert planner.copies_failed([2]) == ["a"]


def test_slots_that_a_plan_empties_are_not_taken_before_the_next_plan() -> None:
    planner = swapped_out(num_slots=3)
    planner.swap_in("a", num_cached_tokens=0, num_loaded_tokens=70, block_ids=[11, 12, 13])
    assert swap_out(planner, "b", 1, [5]) is None
    planner.take_plan()
    assert swap_out(planner, "b", 1, [5]) == 1
    assert planner.take_plan().out_slots == [2]
    assert swap_out(planner, "c", 40, [6, 7]) == 2  # takes both retained ones
    assert planner.take_plan().out_slots == [0, 1]


@pytest.mark.parametrize("resuming", [True, False])
def test_slots_of_a_request_that_ends_within_its_step_are_not_taken_before_the_next_plan(resuming: bool) -> None:
    planner = swapped_out(num_slots=3) if resuming else planner_of(3)
    if resuming:
        planner.swap_in("a", num_cached_tokens=0, num_loaded_tokens=70, block_ids=[11, 12, 13])
    else:
        swap_out(planner, "a", 70, [11, 12, 13])
    planner.release("a")
    assert swap_out(planner, "b", 1, [5]) is None
    assert planner.take_plan()
    assert counts(planner) == (3, 0, 0)


def test_a_second_swap_of_one_request_in_a_step_is_a_bug_of_the_caller() -> None:
    planner = swapped_out()
    planner.swap_in("a", num_cached_tokens=0, num_loaded_tokens=70, block_ids=[11, 12, 13])
    with pytest.raises(AssertionError, match="swapped in by this step"):
        swap_out(planner, "a", 70, [11, 12, 13])
    with pytest.raises(AssertionError, match="swapped in twice"):
        planner.swap_in("a", num_cached_tokens=0, num_loaded_tokens=70, block_ids=[11, 12, 13])


def test_a_request_that_goes_and_comes_in_one_step_is_found_when_the_plan_is_taken() -> None:
    planner = planner_of(8)
    swap_out(planner, "a", 70, [40, 7, 23])
    planner.swap_in("a", num_cached_tokens=0, num_loaded_tokens=70, block_ids=[11, 12, 13])
    with pytest.raises(AssertionError, match="both filled and emptied"):
        planner.take_plan()


@pytest.mark.parametrize(
    ("plan", "complaint"),
    [
        (SwapPlan(out_blocks=[1], out_slots=[1]), "copies out do not match"),
        (SwapPlan(in_blocks=[1], in_generations=[1]), "copies in do not match"),
        (SwapPlan(out_blocks=[1, 2], out_slots=[3, 3], out_generations=[1, 2]), "two blocks into one slot"),
        (SwapPlan(in_blocks=[1, 1], in_slots=[3, 4], in_generations=[1, 1]), "two slots into one block"),
        (SwapPlan(zero_slots=[3]), "zeroed that is not filled"),
    ],
)
def test_check_finds_a_plan_that_cannot_be_right(plan: SwapPlan, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        plan.check()


def test_all_copies_are_dropped_between_steps_and_never_within_one() -> None:
    planner = resumed()
    swap_out(planner, "b", 70, [40, 7, 23])
    with pytest.raises(AssertionError, match="inside a step"):
        planner.drop_all()
    planner.take_plan()
    assert planner.drop_all() == 5
    assert planner.num_loadable_tokens("b", num_tokens=71, num_cached_tokens=0) == 0
    assert planner.pool.num_retained_blocks("a") == 0

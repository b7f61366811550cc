"""Goal: free memory is used behind a request that does not fit, within the limit, and that request is admitted in the end.

Method: examples, and random floods of small requests behind one large request in a pool that frees blocks at random.
"""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicas.bypass import Bypass, Need, Plan, Room


def need(name: str, num_blocks: int, num_tokens: int = 0, **fields: Any) -> Need:
    num_tokens = num_tokens or num_blocks
    return Need(
        request_id=name, num_blocks=num_blocks, num_tokens=num_tokens, min_batch_tokens=num_tokens, **fields
    )  # fmt: skip


def step(bypass: Bypass, order: list[Need], free: Room) -> Plan:
    """A step that admits whom the plan says."""
    plan = bypass.plan(order, free)
    bypass.admitted(plan, plan.first)
    return plan


def room(num_free_blocks: int, num_batch_tokens: int = 1000, num_seqs: int = 100) -> Room:
    return Room(num_free_blocks=num_free_blocks, num_batch_tokens=num_batch_tokens, num_seqs=num_seqs)


def test_who_fits_is_admitted_in_order() -> None:
    assert Bypass(0, 0.0).plan([need("a", 2), need("b", 3)], room(5)).first == ["a", "b"]


def test_who_fits_behind_a_blocked_head_goes_ahead_within_the_limit() -> None:
    bypass = Bypass(10, 0.0)
    order = [need("large", 50), *[need(f"s{number}", 4) for number in range(5)]]
    plan = step(bypass, order, room(20))
    assert [(each.request_id, passed) for each, passed in plan.admits] == [("s0", ["large"]), ("s1", ["large"])]
    assert bypass.passed_tokens("large") == 8
    assert "large does not fit and has been passed by 8 tokens" in plan.reason
    assert bypass.plan([order[0], *order[3:]], room(12)).first == []
    assert bypass.plan([order[0], *order[3:]], room(50)).first == ["large"]


def test_a_preempted_request_that_holds_back_is_passed_by_other_tenants_alone() -> None:
    bypass, back = Bypass(10, 0.0), need("back", 9, tenant="f", holds_back=True)
    order = [back, need("own", 2, tenant="f"), need("other", 2, tenant="g")]
    plan = bypass.plan(order, room(5))
    assert [(each.request_id, passed) for each, passed in plan.admits] == [("other", ["back", "own"])]
    assert bypass.left_idle(order, room(5)) == "other"
    assert bypass.left_idle(order[:2], room(5)) is None
    assert bypass.plan(order, room(20)).first == ["back", "own", "other"], "it fits: nobody is held back"


def test_a_full_batch_blocks_nobody() -> None:
    plan = Bypass(100, 0.0).plan([need("a", 1, 500), need("b", 1, 1)], room(10, num_batch_tokens=100))
    assert plan.admits == [], "a would fit memory: nobody may pass it"
    assert Bypass(100, 0.0).plan([need("a", 1)], room(10, num_seqs=0)).first == []


def test_an_offence_against_work_conservation_is_found() -> None:
    bypass = Bypass(10, 0.0)
    assert bypass.left_idle([need("a", 3)], room(3)) == "a"
    assert bypass.left_idle([need("a", 3)], room(2)) is None
    assert bypass.left_idle([need("a", 3), need("b", 2)], room(2)) == "b"
    assert Bypass(1, 0.0).left_idle([need("a", 3), need("b", 2)], room(2)) is None
    assert bypass.left_idle([need("a", 3)], room(3, num_seqs=0)) is None


def test_a_plan_changes_nothing_and_only_who_was_admitted_has_passed() -> None:
    bypass = Bypass(10, 0.0)
    order = [need("large", 50), need("s0", 4), need("s1", 4)]
    plan = bypass.plan(order, room(20))
    assert bypass.plan(order, room(20)) == plan
    bypass.admitted(plan, {"s1"})
    assert bypass.passed_tokens("large") == 4


def test_a_tenant_that_is_ahead_by_more_than_the_limit_passes_nobody_and_others_do_until_they_are() -> None:
    bypass = Bypass(1000, 100.0)
    large = need("large", 50, key=500.0)
    assert bypass.plan([large, need("f", 4, key=600.0)], room(20)).first == ["f"]
    plan = bypass.plan([large, need("f", 4, key=601.0)], room(20))
    assert plan.first == []
    assert "tenant of f is too far ahead" in plan.reason
    assert bypass.plan([large, need("f", 4, key=601.0, weight=0.5)], room(20)).first == ["f"], "50.5 of service"
    assert bypass.left_idle([large, need("f", 4, key=601.0)], room(20)) is None


def test_with_chunked_prefill_a_long_prompt_fits_any_batch_that_has_room() -> None:
    long = Need(request_id="long", num_blocks=5, num_tokens=900)
    assert Bypass(0, 0.0).plan([long, need("b", 1)], room(10, num_batch_tokens=100)).first == ["long"]


@pytest.mark.parametrize(("limits", "name"), [((-1, 0.0), "limit_tokens"), ((0, -1.0), "limit_service")])
def test_a_negative_limit_is_refused_by_name(limits: tuple[int, float], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must"):
        Bypass(*limits)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4)), min_size=1, max_size=80), st.integers(0, 40))
def test_a_large_request_is_never_passed_by_more_than_the_limit_and_is_admitted_at_last(
    flood: list[tuple[int, int]], limit_tokens: int
) -> None:
    bypass, pool = Bypass(limit_tokens, 0.0), 20
    waiting = [need("large", pool)]
    running: list[tuple[int, int]] = [(7, 3)]  # blocks and steps to go
    passed = num_steps = 0
    while any(each.request_id == "large" for each in waiting):
        if num_steps < len(flood):
            waiting.append(need(f"s{num_steps}", flood[num_steps][0]))
        free = room(pool - sum(blocks for blocks, _ in running))
        plan = bypass.plan(waiting, free)
        bypass.admitted(plan, plan.first)
        for each in [each for each in waiting if each.request_id in plan.first]:
            free = free.after(each)
            passed += each.num_tokens if each.request_id != "large" else 0
            running.append((each.num_blocks, 1 + flood[num_steps % len(flood)][1]))
            waiting.remove(each)
        assert free.num_free_blocks >= 0
        assert bypass.left_idle(waiting, free) is None
        running = [(blocks, steps - 1) for blocks, steps in running if steps > 1]
        num_steps += 1
        assert num_steps <= len(flood) * 6 + 20, "the large request starves"
    assert passed <= limit_tokens

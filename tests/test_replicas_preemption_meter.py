"""Goal: what a preemption has cost is told in the unit of its price, whatever else goes on in the engine.

Method: step times and copies are made up so that the cost is known, and read back.
"""

import random

import pytest

from replicas.preemption import Action, PreemptionDecision
from replicas.preemption_cost import Prices
from replicas.preemption_meter import PreemptionMeter, Prefill
from replicas.throttled_link import Direction

DECODE_S, REQUEST_S = 0.004, 0.001
"""A step of decodes takes so long, and so much longer with every request."""


def decision(name: str, action: Action) -> PreemptionDecision:
    return PreemptionDecision(name, action, 4, Prices(recompute_s=0.02, swap_s=0.01, terms_s={}), "because")


def meter_that_knows_decodes(numbers: tuple[int, ...] = (4, 8)) -> PreemptionMeter:
    meter = PreemptionMeter()
    for _ in range(10):
        for num in numbers:
            meter.step(DECODE_S + REQUEST_S * num, num_decodes=num, prefills=[])
    return meter


def give_way(meter: PreemptionMeter, name: str, action: Action, *, blocks: int = 0, tokens: int = 100) -> None:
    meter.preempted(decision(name, action), now_s=1.0, num_tokens=tokens, num_running=5, num_copied_blocks=blocks)


def test_a_recomputation_costs_what_its_step_takes_longer_than_one_of_decodes() -> None:
    meter = meter_that_knows_decodes()
    give_way(meter, "a", Action.RECOMPUTE)
    extra_s = meter.step(DECODE_S + 6 * REQUEST_S + 0.03, num_decodes=6, prefills=[prefill("a", 0, 101)])
    assert extra_s == pytest.approx(0.03)
    (measurement,) = meter.take()
    assert (measurement.request_id, measurement.action) == ("a", Action.RECOMPUTE)
    assert (measurement.predicted_s, measurement.alternative_s) == (0.02, 0.01)
    assert measurement.measured_s == pytest.approx(0.03 * 100 / 101)  # its newest token is no repetition
    assert meter.num_open == 0


def prefill(name: str, first: int, num: int) -> Prefill:
    return Prefill(request_id=name, first=first, num_tokens=num)


def test_prefills_that_share_a_step_share_its_extra_time_and_chunks_add_up() -> None:
    meter = meter_that_knows_decodes()
    give_way(meter, "a", Action.RECOMPUTE, tokens=90)
    meter.step(DECODE_S + 0.04, num_decodes=0, prefills=[prefill("a", 0, 60), prefill("new", 0, 60)])
    assert meter.take() == []
    meter.step(DECODE_S + 0.02, num_decodes=0, prefills=[prefill("a", 60, 30), prefill("new", 60, 90)])
    (measurement,) = meter.take()
    assert measurement.measured_s == pytest.approx(0.04 / 2 + 0.02 / 4)


def test_copies_of_the_same_step_are_no_part_of_a_recomputation() -> None:
    meter = meter_that_knows_decodes()
    give_way(meter, "a", Action.RECOMPUTE)
    give_way(meter, "b", Action.SWAP, blocks=4)
    meter.copied(Direction.OUT, 4, 0.5)
    assert meter.step(DECODE_S + 0.5 + 0.03, num_decodes=0, prefills=[prefill("a", 0, 100)]) == pytest.approx(0.03)


def test_before_any_step_of_decodes_is_known_nothing_is_told() -> None:
    meter = PreemptionMeter()
    give_way(meter, "a", Action.RECOMPUTE)
    assert meter.step(0.5, num_decodes=3, prefills=[prefill("a", 0, 100)]) is None
    assert (meter.take(), meter.num_open) == ([], 0)


def test_with_one_number_of_decodes_seen_its_time_stands_for_all() -> None:
    meter = meter_that_knows_decodes((8,))
    assert meter.step(DECODE_S + 8 * REQUEST_S + 0.1, num_decodes=3, prefills=[prefill("a", 0, 9)]) == pytest.approx(
        0.1
    )


def test_a_swap_costs_its_copies_a_share_of_the_pool_and_a_share_of_the_wait() -> None:
    meter = PreemptionMeter()
    give_way(meter, "a", Action.SWAP, blocks=3)
    meter.copied(Direction.OUT, 3, 0.006)
    meter.loading("a", num_blocks=2, num_pool_blocks=50, held_s=0.5, waited_s=0.7)
    meter.copied(Direction.IN, 2, 0.002)
    (measurement,) = meter.take()
    assert (measurement.predicted_s, measurement.alternative_s) == (0.01, 0.02)
    assert measurement.measured_s == pytest.approx(0.006 + 2 / 50 * 0.5 + 0.7 / 5 + 0.002)


def test_what_swaps_take_beyond_their_price_is_remembered_and_fades_with_recomputations() -> None:
    meter = PreemptionMeter()
    for _ in range(100):
        give_way(meter, "a", Action.SWAP, blocks=1)
        meter.copied(Direction.OUT, 1, 0.05)
        meter.loading("a", num_blocks=0, num_pool_blocks=50)
    assert meter.swap_excess_s == pytest.approx(0.04, rel=1e-3)  # the price says 0.01
    for _ in range(100):
        give_way(meter, "b", Action.RECOMPUTE)
    assert meter.swap_excess_s == pytest.approx(0.04 * 0.97**100, rel=1e-3)


def test_copies_reported_together_are_told_apart_by_their_blocks() -> None:
    meter = PreemptionMeter()
    give_way(meter, "a", Action.SWAP, blocks=3)
    give_way(meter, "gone", Action.SWAP, blocks=5)
    meter.forget("gone")
    give_way(meter, "b", Action.SWAP, blocks=1)
    meter.copied(Direction.OUT, 9, 0.9)
    for name in "ab":
        meter.loading(name, num_blocks=0, num_pool_blocks=50)
    assert [one.measured_s for one in meter.take()] == pytest.approx([0.3, 0.1])


def test_a_request_whose_blocks_were_all_still_there_costs_its_copy_out_only() -> None:
    meter = PreemptionMeter()
    give_way(meter, "a", Action.SWAP, blocks=2)
    meter.copied(Direction.OUT, 2, 0.004)
    meter.loading("a", num_blocks=0, num_pool_blocks=50)
    assert [one.measured_s for one in meter.take()] == [0.004]


def test_more_copies_than_were_planned_are_a_bug() -> None:
    meter = PreemptionMeter()
    give_way(meter, "a", Action.SWAP, blocks=2)
    with pytest.raises((AssertionError, IndexError)):
        meter.copied(Direction.OUT, 3, 0.1)


def test_what_victims_find_when_they_have_blocks_again_is_remembered_once_for_each() -> None:
    meter = PreemptionMeter()
    for name in "ab":
        give_way(meter, name, Action.RECOMPUTE)
    meter.resumed("unknown", 5.0, num_cached_tokens=50)
    assert meter.resume_wait_s == 0.0
    meter.resumed("a", 3.0, num_cached_tokens=50)
    meter.resumed("a", 30.0, num_cached_tokens=0)
    assert meter.resume_wait_s == pytest.approx(0.1 * 2.0)
    assert meter.survival == pytest.approx(0.1 * 0.5)
    meter.resumed("b", 5.0, num_cached_tokens=200)
    assert meter.resume_wait_s == pytest.approx(0.2 + 0.1 * (4.0 - 0.2))
    assert meter.survival == pytest.approx(0.05 + 0.1 * (1.0 - 0.05))


def test_whatever_happens_every_record_ends_and_copies_never_get_out_of_step() -> None:
    rng = random.Random(3)
    meter, num_preempted, num_measured, num_forgotten = meter_that_knows_decodes(), 0, 0, 0
    away: dict[str, Action] = {}
    for step in range(20_000):
        out_blocks, in_blocks = 0, 0
        prefills = []
        if rng.random() < 0.5:
            num_preempted += 1
            name, action = f"r{num_preempted}", rng.choice(list(Action))
            blocks = rng.randint(0, 5) if action is Action.SWAP else 0
            give_way(meter, name, action, blocks=blocks)
            away[name], out_blocks = action, blocks
        elif away and rng.random() < 0.2:
            name = rng.choice(list(away))
            meter.forget(name)
            del away[name]
            num_forgotten += 1
        elif away:
            name = rng.choice(list(away))
            meter.resumed(name, 1.0 + step, num_cached_tokens=rng.randint(0, 120))
            if away.pop(name) is Action.SWAP:
                in_blocks = rng.randint(0, 5)
                meter.loading(name, num_blocks=in_blocks, num_pool_blocks=50)
            else:
                prefills = [prefill(name, 0, 100)]
        for direction, blocks in ((Direction.OUT, out_blocks), (Direction.IN, in_blocks)):
            if blocks:
                meter.copied(direction, blocks, 0.001)
        meter.step(0.02, num_decodes=5, prefills=prefills)
        num_measured += len(meter.take())
        meter.check()
        assert meter.num_open == len(away)
    assert num_measured == num_preempted - num_forgotten - len(away) > 3000

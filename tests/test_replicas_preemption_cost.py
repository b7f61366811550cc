"""Goal: each term of a preemption's price stands for something real, and both ways to compute a price agree.

Method: hand-computed prices; one knob turned at a time; random candidates priced one by one and as a table.
"""

import random
from dataclasses import replace

import numpy as np
import pytest

from cost_service.snapshot import CostSnapshot
from replicas.preemption_cost import Candidate, CandidateTable, Pressure, prefill_s, prices

COSTS = CostSnapshot(
    version=1,
    model="m",
    hardware="cpu",
    parallelism=1,
    block_size=16,
    recompute_fixed_s=0.0,
    ridge_tokens=0.0,
    token_s=1e-3,
    attention_s=1e-6,
    swap_fixed_s=2e-3,
    out_block_s=1e-4,
    in_block_s=2e-4,
)
LINKED = replace(
    COSTS, attention_s=0.0, swap_fixed_s=0.0, out_block_s=0.0, in_block_s=0.0,
    link_latency_s=0.5, link_out_block_s=0.1, link_in_block_s=0.1,
)  # fmt: skip


def candidate(**changes: object) -> Candidate:
    values: dict[str, object] = {"request_id": "a", "num_tokens": 160, "num_blocks": 10, "num_freed_blocks": 10}
    return Candidate(**values | changes)  # type: ignore[arg-type]


def pressure(**changes: object) -> Pressure:
    values: dict[str, object] = {
        "num_needed_blocks": 1, "num_pool_blocks": 100, "num_running": 4, "num_batch_tokens": 4,
        "num_free_host_slots": 1000,
    }  # fmt: skip
    return Pressure(**values | changes)  # type: ignore[arg-type]


def test_recomputing_costs_every_token_and_the_square_of_the_context() -> None:
    assert prices(candidate(), pressure(), COSTS).recompute_s == pytest.approx(160e-3 + 160**2 * 1e-6)


def test_what_was_learned_by_size_is_added() -> None:
    learned = replace(
        COSTS, recompute_knots_s=(0.0,) * 7 + (0.5, 0.5), out_knots_s=(0.0, 0.0, 0.0, 0.25), in_knots_s=(1.0,)
    )
    found = prices(candidate(num_host_blocks=2), pressure(), learned)
    assert found.terms_s["recompute_residual"] == pytest.approx(0.5)
    assert found.terms_s["swap_residual"] == pytest.approx(0.25 + 1.0)
    assert found.recompute_s == pytest.approx(160e-3 + 160**2 * 1e-6 + 0.5)
    nothing_copied = prices(candidate(num_host_blocks=10), pressure(), learned)
    assert nothing_copied.terms_s["swap_residual"] == pytest.approx(1.0)


def test_no_price_is_negative_whatever_was_learned() -> None:
    learned = replace(COSTS, recompute_knots_s=(-9.0,) * 9, out_knots_s=(-9.0,) * 9)
    found = prices(candidate(), pressure(), learned)
    assert (found.recompute_s, found.swap_s) == (0.0, 0.0)
    assert prefill_s([(0, 160)], num_decodes=0, costs=learned) == 0.0
    table = CandidateTable([candidate()], block_size=16, horizon_tokens=1.0).price(pressure(), learned)
    assert table.tolist() == [[0.0, 0.0]]


def test_a_prefill_among_decodes_has_an_overhead_of_its_own() -> None:
    found = prices(candidate(), pressure(), replace(COSTS, recompute_fixed_s=5e-3))
    assert found.recompute_s == pytest.approx(5e-3 + 160e-3 + 160**2 * 1e-6)


def test_tokens_that_survive_in_the_prefix_cache_are_neither_computed_nor_loaded() -> None:
    found = prices(candidate(num_surviving_tokens=64), pressure(), COSTS)
    assert found.recompute_s == pytest.approx(96e-3 + (160**2 - 64**2) * 1e-6)
    assert found.terms_s["swap_stall"] == pytest.approx(10 * 1e-4 + 6 * 2e-4)


def test_blocks_that_are_in_host_memory_already_are_not_copied_out_again() -> None:
    assert prices(candidate(num_host_blocks=7), pressure(), COSTS).terms_s["swap_stall"] == pytest.approx(
        3 * 1e-4 + 10 * 2e-4
    )


def test_swapping_has_a_fixed_overhead_in_each_direction() -> None:
    assert prices(candidate(), pressure(), COSTS).terms_s["swap_overhead"] == pytest.approx(4e-3)


def test_tokens_below_the_ridge_of_the_step_cost_nothing() -> None:
    ridged = replace(COSTS, ridge_tokens=100.0)
    busy, idle = pressure(num_batch_tokens=100), pressure(num_batch_tokens=40)
    assert prices(candidate(), busy, ridged).terms_s["recompute_tokens"] == pytest.approx(160e-3)
    assert prices(candidate(), idle, ridged).terms_s["recompute_tokens"] == pytest.approx(100e-3)


def test_a_slow_link_holds_blocks_idle_while_they_load_and_keeps_the_victim_waiting() -> None:
    terms = prices(candidate(), pressure(out_queue_s=0.3), LINKED).terms_s
    assert terms["swap_hold"] == pytest.approx(10 / 100 * (0.5 + 10 * 0.1))
    assert terms["swap_wait"] == pytest.approx((2 * 0.5 + 0.3 + 0.1 * (10 + 10)) / 4)


def test_the_copy_out_delays_the_victim_only_beyond_the_time_that_it_waits_for_blocks_anyway() -> None:
    out_s, in_s = 0.5 + 0.3 + 0.1 * 10, 0.5 + 0.1 * 10
    for waits_s, expected_s in ((0.0, out_s + in_s), (1.0, out_s - 1.0 + in_s), (out_s, in_s), (99.0, in_s)):
        around = pressure(out_queue_s=0.3, resume_wait_s=waits_s)
        assert prices(candidate(), around, LINKED).terms_s["swap_wait"] == pytest.approx(expected_s / 4)


def test_prefills_of_a_step_are_priced_as_recomputations_of_their_tokens() -> None:
    costs = replace(COSTS, attention_s=1e-6, ridge_tokens=50.0)
    around = pressure(num_batch_tokens=20)
    one = prices(candidate(num_tokens=160, num_surviving_tokens=64), around, costs).recompute_s
    assert prefill_s([(64, 96)], num_decodes=20, costs=costs) == pytest.approx(one)
    assert prefill_s([(0, 10), (30, 15)], num_decodes=20, costs=costs) == pytest.approx(
        costs.recompute_fixed_s + 1e-6 * (100 + 45**2 - 30**2)
    )


def test_a_swap_without_room_is_infinitely_dear_in_the_table() -> None:
    def swap_price(host_slots: int = 1000, **changes: object) -> float:
        table = CandidateTable([candidate(num_host_slots=host_slots)], block_size=16, horizon_tokens=32)
        return float(table.price(pressure(**changes), COSTS)[0, 1])

    assert np.isfinite(swap_price(num_free_host_slots=10))
    assert swap_price(num_free_host_slots=9) == np.inf
    assert swap_price(num_free_host_slots=1000, host_slots=9) == np.inf
    assert swap_price(unsafe="several KV cache groups") == np.inf


def test_a_request_that_ends_soon_is_of_little_use_as_a_victim() -> None:
    table = CandidateTable(
        [candidate(num_remaining_tokens=left) for left in (1, 16, 32, 500)], block_size=16, horizon_tokens=32
    )
    assert table.benefit == pytest.approx([10 / 32, 5, 10, 10])


def knots(rng: random.Random, most: int) -> tuple[float, ...]:
    return tuple(rng.uniform(-0.5, 1.0) for _ in range(rng.choice([0, 0, most])))


def test_the_table_prices_as_the_terms_do() -> None:
    rng = random.Random(7)
    for _ in range(300):
        costs = CostSnapshot(
            version=1,
            model="m",
            hardware="h",
            parallelism=1,
            block_size=16,
            recompute_fixed_s=rng.random(),
            ridge_tokens=rng.choice([0.0, 50.0, 300.0]),
            token_s=rng.random(),
            attention_s=rng.random(),
            swap_fixed_s=rng.random(),
            out_block_s=rng.random(),
            in_block_s=rng.random(),
            link_latency_s=rng.random(),
            link_out_block_s=rng.random(),
            link_in_block_s=rng.random(),
            link_shared_ratio=rng.random(),
            recompute_knots_s=knots(rng, 12),
            out_knots_s=knots(rng, 6),
            in_knots_s=knots(rng, 5),
        )
        around = pressure(
            num_running=rng.randint(1, 50), swap_excess_s=rng.random(), num_batch_tokens=rng.randint(0, 400),
            resume_wait_s=30 * rng.random(), in_queue_s=rng.random(),
            out_queue_s=rng.random(), num_pool_blocks=rng.randint(1, 1000),
        )  # fmt: skip
        candidates = []
        for _ in range(rng.randint(1, 5)):
            tokens = rng.randint(0, 600)
            blocks = -(-tokens // 16)
            candidates.append(
                candidate(
                    num_tokens=tokens, num_blocks=blocks, num_surviving_tokens=min(tokens, rng.randint(0, blocks) * 8),
                    num_host_blocks=rng.randint(0, blocks),
                )
            )  # fmt: skip
        table = CandidateTable(candidates, block_size=16, horizon_tokens=32).price(around, costs)
        for one, row in zip(candidates, table, strict=True):
            expected = prices(one, around, costs)
            assert row == pytest.approx([expected.recompute_s, expected.swap_s])

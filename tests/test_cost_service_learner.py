"""Goal: a replica's snapshot becomes what its engines measure, version by version.

Method: samples drawn from known costs with noise; what the snapshot then says of preemptions, against those costs.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from cost_service.learner import CostLearner
from cost_service.samples import CopySample, LinkSample, PrefillSample, Sample
from cost_service.snapshot import CostSnapshot

TRUTH = CostSnapshot(
    version=0, model="m", hardware="cpu", parallelism=1, block_size=16, recompute_fixed_s=4e-3, ridge_tokens=0.0,
    token_s=2e-4, attention_s=3e-8, swap_fixed_s=1e-3, out_block_s=2e-4, in_block_s=1e-4, link_latency_s=5e-4,
    link_out_block_s=3e-4, link_in_block_s=2e-4, link_shared_ratio=0.5,
)  # fmt: skip
START = replace(
    TRUTH, recompute_fixed_s=1e-3, token_s=1e-4, attention_s=1e-8, swap_fixed_s=1e-4, out_block_s=1e-5, in_block_s=1e-5,
    link_latency_s=0.0, link_out_block_s=1e-5, link_in_block_s=1e-5, link_shared_ratio=0.0,
)  # fmt: skip


def samples(truth: CostSnapshot, num: int, *, seed: int = 0, noise: float = 0.05) -> Iterator[Sample]:
    rng = random.Random(seed)
    for index in range(num):
        factor, blocks = math.exp(rng.gauss(0.0, noise)), rng.randint(1, 40)
        tokens, cached = rng.randint(1, 1000), rng.choice([0, 0, 500])
        attention = float((tokens + cached) ** 2 - cached**2)
        recompute_s = truth.recompute_fixed_s + truth.token_s * tokens + truth.attention_s * attention
        out_s, in_s = (truth.swap_fixed_s + blocks * each for each in (truth.out_block_s, truth.in_block_s))
        direction, shared = rng.choice([("out", truth.link_out_block_s), ("in", truth.link_in_block_s)]), rng.random()
        link_s = truth.link_latency_s + blocks * direction[1] * (1.0 + truth.link_shared_ratio * shared)
        yield (
            PrefillSample(num_tokens=tokens, attention=attention, num_decodes=8, seconds=factor * recompute_s),
            CopySample(direction="out", num_blocks=blocks, seconds=factor * out_s),
            CopySample(direction="in", num_blocks=blocks, seconds=factor * in_s),
            LinkSample(direction=direction[0], num_blocks=blocks, shared=shared, seconds=factor * link_s),
        )[index % 4]


def seconds_of(costs: CostSnapshot, tokens: int, blocks: int) -> list[float]:
    from cost_service.hats import value_at

    recompute_s = costs.recompute_fixed_s + costs.token_s * tokens + costs.attention_s * tokens**2
    return [
        recompute_s + value_at(tokens, costs.recompute_knots_s),
        costs.swap_fixed_s + costs.out_block_s * blocks + value_at(blocks, costs.out_knots_s),
        costs.swap_fixed_s + costs.in_block_s * blocks + value_at(blocks, costs.in_knots_s),
        costs.link_latency_s + costs.link_out_block_s * blocks * (1.0 + costs.link_shared_ratio),
        costs.link_latency_s + costs.link_in_block_s * blocks,
    ]


def test_a_snapshot_becomes_what_is_measured() -> None:
    learner = CostLearner(START)
    assert learner.observe(samples(TRUTH, 1200)) == 1200
    learned = learner.refit()
    learner.check()
    for tokens, blocks in ((60, 4), (500, 30), (900, 20)):
        assert seconds_of(learned, tokens, blocks) == pytest.approx(seconds_of(TRUTH, tokens, blocks), rel=0.1)


def test_versions_rise_with_what_was_learned_and_not_else() -> None:
    learner = CostLearner(START)
    assert learner.refit() is START
    learner.observe(samples(TRUTH, 100))
    first = learner.refit()
    assert first.version == START.version + 1
    assert learner.refit() is first
    learner.observe(samples(TRUTH, 100, seed=1))
    assert learner.refit().version == first.version + 1


def test_what_was_never_measured_stays_as_it_was() -> None:
    learner = CostLearner(START)
    learner.observe(sample for sample in samples(TRUTH, 400) if isinstance(sample, PrefillSample))
    learned = learner.refit()
    assert learned.link_out_block_s == START.link_out_block_s
    assert learned.link_shared_ratio == START.link_shared_ratio
    assert (learned.swap_fixed_s, learned.out_block_s, learned.out_knots_s) == (
        START.swap_fixed_s,
        START.out_block_s,
        (),
    )


def test_a_link_that_becomes_four_times_as_slow_is_known_within_a_hundred_transfers() -> None:
    learner = CostLearner(START)
    learner.observe(samples(TRUTH, 1200))
    learner.refit()
    slow = replace(TRUTH, link_latency_s=4 * TRUTH.link_latency_s, link_out_block_s=4 * TRUTH.link_out_block_s,
                   link_in_block_s=4 * TRUTH.link_in_block_s)  # fmt: skip
    learner.observe([sample for sample in samples(slow, 400, seed=2) if isinstance(sample, LinkSample)])
    learned = learner.refit()
    assert learner.num_changes >= 1
    assert seconds_of(learned, 100, 20)[3:] == pytest.approx(seconds_of(slow, 100, 20)[3:], rel=0.2)


def test_what_is_no_measurement_is_counted() -> None:
    learner = CostLearner(START)
    bad = PrefillSample(num_tokens=3, attention=9.0, num_decodes=1, seconds=math.nan)
    late = CopySample(direction="out", num_blocks=2, seconds=-1.0)
    assert learner.observe([bad, late, next(samples(TRUTH, 1))]) == 1
    assert learner.num_rejected == 2


def test_errors_are_told_of_what_was_measured() -> None:
    learner = CostLearner(START)
    learner.observe(sample for sample in samples(TRUTH, 800) if not isinstance(sample, LinkSample))
    learner.refit()
    learner.observe(sample for sample in samples(TRUTH, 2400, seed=1) if not isinstance(sample, LinkSample))
    learner.refit()
    ratios = learner.error_ratios()
    assert set(ratios) == {"prefill", "out", "in"}
    assert all(ratio < 0.2 for ratio in ratios.values())

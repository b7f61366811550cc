"""Learns the cost snapshot of one kind of replica from what its engines measure.

Data flow: samples -> one `OnlineCost` per cost (prefill, copies out and in, link out and in) -> the next snapshot.

Rules:
- The first snapshot, analytic or fitted to a profile, is the prior: what was never measured keeps its terms, scaled as
  the measured ones are.
- A version is given only to a snapshot that differs; versions rise by one.
"""

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from cost_service.online import LearnedCost, OnlineCost
from cost_service.samples import CopySample, LinkSample, PrefillSample, Sample
from cost_service.snapshot import CostSnapshot

TOKEN_KNOTS = 18
"""Sizes of recomputations: 1 to 131,072 tokens."""

BLOCK_KNOTS = 14
"""Sizes of copies: 1 to 8,192 blocks."""


class CostLearner:
    """Takes samples and gives snapshots; not for a hot path."""

    def __init__(self, start: CostSnapshot) -> None:
        """Begin with what is believed before anything is measured."""
        self.snapshot = start
        self.costs = {
            "prefill": OnlineCost(
                (start.recompute_fixed_s, start.token_s, start.attention_s), num_knots=TOKEN_KNOTS
            ),
            "out": OnlineCost((start.swap_fixed_s, start.out_block_s), num_knots=BLOCK_KNOTS),
            "in": OnlineCost((start.swap_fixed_s, start.in_block_s), num_knots=BLOCK_KNOTS),
            "link_out": OnlineCost(_link_prior(start, start.link_out_block_s), num_knots=BLOCK_KNOTS),
            "link_in": OnlineCost(_link_prior(start, start.link_in_block_s), num_knots=BLOCK_KNOTS),
        }  # fmt: skip

    def observe(self, samples: Iterable[Sample]) -> int:
        """Take note of samples; return how many were measurements (the others are rejected and counted)."""
        return sum(self._observe(sample) for sample in samples)

    def refit(self) -> CostSnapshot:
        """Learn from what was observed; return the newest snapshot."""
        prefill, out, in_, link_out, link_in = (cost.refit() for cost in self.costs.values())
        fixed_s = (out.coefficients[0] + in_.coefficients[0]) / 2
        learned = replace(
            self.snapshot,
            recompute_fixed_s=prefill.coefficients[0],
            token_s=prefill.coefficients[1],
            attention_s=prefill.coefficients[2],
            recompute_knots_s=prefill.knots,
            swap_fixed_s=fixed_s,
            out_block_s=out.coefficients[1],
            out_knots_s=_above(out, fixed_s),
            in_block_s=in_.coefficients[1],
            in_knots_s=_above(in_, fixed_s),
            link_latency_s=(link_out.coefficients[0] + link_in.coefficients[0]) / 2,
            link_out_block_s=link_out.coefficients[1],
            link_in_block_s=link_in.coefficients[1],
            link_shared_ratio=_shared_ratio(self.snapshot, link_out, link_in),
        )
        if learned != self.snapshot:
            self.snapshot = replace(learned, version=self.snapshot.version + 1)
        return self.snapshot

    def predict(self, *, num_tokens: int, attention: float, num_blocks: int) -> dict[str, float]:
        """Seconds of a prefill of tokens beyond the ridge, and of copying blocks, by what was learned last."""
        work: dict[str, tuple[tuple[float, ...], int]] = {"prefill": ((1.0, float(num_tokens), attention), num_tokens)}
        work |= {name: ((1.0, float(num_blocks)), num_blocks) for name in ("out", "in")}
        work |= {name: ((1.0, float(num_blocks), 0.0), num_blocks) for name in ("link_out", "link_in")}
        return {
            name: float(self.costs[name].learned.seconds(np.array([features]), np.array([float(size)]))[0])
            for name, (features, size) in work.items()
        }

    @property
    def num_rejected(self) -> int:
        """Samples that were no measurements."""
        return sum(cost.num_rejected for cost in self.costs.values())

    @property
    def num_changes(self) -> int:
        """How often a cost was found to be another than before."""
        return sum(cost.num_changes for cost in self.costs.values())

    def error_ratios(self) -> dict[str, float]:
        """Median relative error of each cost that was measured, its samples predicted before they were learned."""
        learned = {name: cost.learned for name, cost in self.costs.items()}
        return {name: one.error_ratio for name, one in learned.items() if one.num_samples}

    def check(self) -> None:
        """Assert that what is believed are costs."""
        for cost in self.costs.values():
            cost.check()

    def _observe(self, sample: Sample) -> bool:
        match sample:
            case PrefillSample(num_tokens=num_tokens, attention=attention, num_decodes=num_decodes, seconds=seconds):
                slack = max(0.0, self.snapshot.ridge_tokens - num_decodes)
                features = (1.0, max(0.0, num_tokens - slack), attention)
                return self.costs["prefill"].observe(features, num_tokens, seconds)
            case CopySample(direction=direction, num_blocks=num_blocks, seconds=seconds):
                return self.costs[direction].observe((1.0, num_blocks), num_blocks, seconds)
            case LinkSample(direction=direction, num_blocks=num_blocks, shared=shared, seconds=seconds):
                features = (1.0, num_blocks, num_blocks * shared)
                return self.costs[f"link_{direction}"].observe(features, num_blocks, seconds)
        assert not sample, f"no sample: {type(sample)}"
        return False


def _link_prior(start: CostSnapshot, block_s: float) -> tuple[float, float, float]:
    """Coefficients of a transfer, of its blocks, and of those that went while the other direction was busy."""
    return start.link_latency_s, block_s, block_s * start.link_shared_ratio


def _shared_ratio(before: CostSnapshot, *links: LearnedCost) -> float:
    """How much longer transfers take beside one of the other direction, of both directions together."""
    block_s, shared_s = (sum(link.coefficients[column] for link in links) for column in (1, 2))
    return shared_s / block_s if block_s > 0.0 else before.link_shared_ratio


def _above(cost: LearnedCost, fixed_s: float) -> tuple[float, ...]:
    """The knots of a copy, with what its own fixed part is above the one of both directions."""
    beyond_s = cost.coefficients[0] - fixed_s
    if not cost.knots:
        return (beyond_s,) if not math.isclose(cost.coefficients[0], fixed_s) else ()
    return tuple(knot + beyond_s for knot in cost.knots)

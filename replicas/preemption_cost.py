"""What it costs to take the KV blocks of a running request away, in seconds of engine time, term by term.

Rules:
- One unit: a second in which the engine does nothing for its running requests. What one of R requests waits for by itself
  counts 1/R of that, and so does a part of the pool that lies idle.
- `prices` says it term by term for one candidate, `CandidateTable.price` at once for all; a test holds them together.

Terms (a comparison of FLOPs with bytes alone would always swap; these are what it leaves out):
    recompute = fixed                                            a prefill among decodes, whatever its size
              + token_s * max(0, n - slack) + attention_s * (T^2 - r^2)
              + residual(n)                                  what was learned beside, by size
    swap      = 2 * fixed                                        overhead of two copies
              + out_block_s * copied + in_block_s * loaded       stall of the others while blocks are copied
              + loaded / pool * (latency + link_in_s * loaded)       blocks that are held but idle while they load
              + (in queue + latency + link_in_s * loaded) / running       the victim's own wait for its load
              + max(0, latency + out queue + link_out_s * copied - resume wait) / running      and for its copy out
              + residual(copied) + residual(loaded)              what was learned beside, by size
              + excess                                           what the last swaps took beyond all that (a busy link)
with T tokens held, r of them likely to survive in the prefix cache until resume, n = T - r, slack = tokens that the step
can take for nothing (up to the ridge), copied = blocks not in host memory yet, loaded = blocks beyond the surviving ones.
A victim waits for blocks whatever is done with it (resume wait: how long the last ones did); its copy out delays it only
by what it takes beyond that.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from cost_service.hats import hats, value_at
from cost_service.snapshot import CostSnapshot


class Candidate(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A running request, as far as giving way is concerned. A struct, for hundreds of them are made in a step."""

    request_id: str
    tenant: str = ""
    service: float = 0.0
    """Normalised service that the tenant has had in the cluster."""

    num_tokens: int
    """Tokens whose KV is in the engine's blocks once the steps in flight are done."""

    num_blocks: int
    """KV blocks that hold those tokens; the last may be partly filled."""

    num_freed_blocks: int
    """Blocks that the pool gains: those that no other request holds too."""

    num_surviving_tokens: int = 0
    """Tokens at the front that are likely to be found in the prefix cache at resume."""

    num_host_blocks: int = 0
    """Blocks whose copy is in host memory already."""

    num_host_slots: int = 1 << 40
    """Host slots that the request may take on top, within its tenant's share."""

    num_remaining_tokens: int = 1 << 20
    """Output tokens that are predicted to be still to come at most, or may."""

    num_preemptions: int = 0

    can_load: bool = True
    """Whether the request may read KV that it did not compute just now (not while it wants prompt log-probabilities)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pressure:
    """What surrounds the candidates in this step."""

    num_needed_blocks: int
    """Blocks that must become free."""

    num_pool_blocks: int
    num_running: int
    num_batch_tokens: int
    """Tokens of the step without any re-prefill."""

    num_free_host_slots: int
    """Host slots that can be taken now, one KV block each; retained copies make room."""

    out_queue_s: float = 0.0
    """Seconds until the link to host memory is free."""

    in_queue_s: float = 0.0
    """Seconds until the link is free for a load, with all those that are waiting for it now."""

    step_s: float = 0.0
    """Seconds that the last steps took; 0 when nothing is known yet."""

    resume_wait_s: float = 0.0
    """Seconds for which a victim waits for blocks anyway; a transfer costs it only what it takes beyond them."""

    swap_excess_s: float = 0.0
    """Seconds of engine time that the last swaps took beyond their price: others' transfers, which no price foresees."""

    unsafe: str | None = None
    """Why nothing may be swapped here at all, or None."""

    def __post_init__(self) -> None:
        assert self.num_pool_blocks > 0, f"a pool of {self.num_pool_blocks} blocks"
        assert self.num_running > 0, "pressure without a running request"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """Seconds of engine time that each action would cost, and what they consist of."""

    recompute_s: float
    swap_s: float
    terms_s: dict[str, float]


def prices(candidate: Candidate, pressure: Pressure, costs: CostSnapshot) -> Prices:
    """Price both actions for one candidate."""
    copied, loaded = _copied(candidate), _loaded(candidate, costs.block_size)
    new, slack = candidate.num_tokens - candidate.num_surviving_tokens, _slack(pressure, costs)
    carried_s = costs.link_out_block_s * copied
    carried_s += costs.link_shared_ratio * min(carried_s, pressure.in_queue_s)
    out_s = pressure.out_queue_s + costs.link_latency_s + carried_s
    in_s = costs.link_latency_s + costs.link_in_block_s * loaded
    terms = {
        "recompute_overhead": costs.recompute_fixed_s,
        "recompute_tokens": costs.token_s * max(0.0, new - slack),
        "recompute_attention": costs.attention_s * _attention(candidate),
        "swap_overhead": 2 * costs.swap_fixed_s,
        "swap_stall": costs.out_block_s * copied + costs.in_block_s * loaded,
        "swap_hold": loaded / pressure.num_pool_blocks * in_s,
        "swap_wait": (pressure.in_queue_s + in_s + max(0.0, out_s - pressure.resume_wait_s)) / pressure.num_running,
    }
    terms["swap_excess"] = pressure.swap_excess_s
    terms["recompute_residual"] = value_at(new, costs.recompute_knots_s)
    terms["swap_residual"] = value_at(copied, costs.out_knots_s) + value_at(loaded, costs.in_knots_s)
    of = {
        action: max(0.0, sum(s for name, s in terms.items() if name.startswith(action)))
        for action in ("recompute", "swap")
    }
    return Prices(recompute_s=of["recompute"], swap_s=of["swap"], terms_s=terms)


def prefill_s(chunks: Sequence[tuple[int, int]], *, num_decodes: int, costs: CostSnapshot) -> float:
    """Seconds that prefills add to a step of decodes, as recomputations are priced.

    Args:
        chunks: Per request the tokens that it had before, and those that it computes in this step.
    """
    slack = max(0.0, costs.ridge_tokens - num_decodes)
    attention = sum((first + num) ** 2 - first**2 for first, num in chunks)
    num_tokens = sum(num for _, num in chunks)
    linear_s = costs.recompute_fixed_s + costs.token_s * max(0.0, num_tokens - slack) + costs.attention_s * attention
    return max(0.0, linear_s + value_at(num_tokens, costs.recompute_knots_s))


class CandidateTable:
    """All candidates of a step as columns of numbers, built once; `price` then takes microseconds."""

    __slots__ = ("_extended", "_features", "_of", "_weights", "benefit", "candidates", "num_copied", "num_freed")

    def __init__(self, candidates: Sequence[Candidate], *, block_size: int, horizon_tokens: float) -> None:
        """Build the columns.

        Args:
            horizon_tokens: A request with so many tokens to come, or more, is as good a victim as any; one that ends
                sooner gives its blocks back soon anyway.
        """
        self.candidates = tuple(candidates)
        rows = [
            (
                1.0,
                c.num_tokens - c.num_surviving_tokens,
                _attention(c),
                _copied(c),
                loaded := _loaded(c, block_size),
                loaded * loaded,
                c.num_freed_blocks,
                c.num_remaining_tokens,
            )
            for c in self.candidates
        ]
        table = np.array(rows, dtype=np.float64).reshape(len(rows), 8)
        self._features = np.ascontiguousarray(table[:, :6])
        self._of: CostSnapshot | None = None
        self._extended, self._weights = self._features, np.zeros((6, 3))
        may_load = np.array([c.can_load and _copied(c) <= c.num_host_slots for c in self.candidates], dtype=bool)
        self.num_copied = np.where(may_load, table[:, 3], np.inf)
        self.num_freed = table[:, 6]
        self.benefit = self.num_freed * np.minimum(1.0, table[:, 7] / horizon_tokens)

    def price(self, pressure: Pressure, costs: CostSnapshot) -> NDArray[np.float64]:
        """Seconds of shape (candidates, 2): recompute and swap; a swap that has no room is infinite."""
        pool, running, link = pressure.num_pool_blocks, pressure.num_running, costs.link_in_block_s
        beyond_s = pressure.out_queue_s + costs.link_latency_s - pressure.resume_wait_s
        swap_s = 2 * costs.swap_fixed_s + pressure.swap_excess_s
        swap_s += (pressure.in_queue_s + costs.link_latency_s) / running
        features, weights = self._weighted(costs)
        weights[0, 1], weights[0, 2] = swap_s, beyond_s
        weights[4, 1] = costs.in_block_s + link / running + costs.link_latency_s / pool
        weights[5, 1] = link / pool
        terms: NDArray[np.float64] = features @ weights
        table = terms[:, :2]
        if (shared := costs.link_shared_ratio) > 0.0 and pressure.in_queue_s > 0.0:
            terms[:, 2] += shared * np.minimum(costs.link_out_block_s * self._features[:, 3], pressure.in_queue_s)
        table[:, 1] += np.maximum(0.0, terms[:, 2]) / running
        if slack := _slack(pressure, costs):
            table[:, 0] -= costs.token_s * np.minimum(self._features[:, 1], slack)
        if len(weights) > 6:  # linear costs are never negative
            np.maximum(table, 0.0, out=table)
        if pressure.unsafe is not None:
            table[:, 1] = np.inf
        else:
            table[self.num_copied > pressure.num_free_host_slots, 1] = np.inf
        return table

    def idle_s(self, pressure: Pressure, *, block_size: int) -> NDArray[np.float64]:
        """Seconds of engine time per freed block, of shape (candidates,), that a victim's own room lies idle.

        Its blocks are taken one by one by those who grow, and nobody is admitted before the victim has as many again: half
        of its F blocks lie idle until F are grown, F / 2 of the pool for one block's growth each.
        """
        blocks_per_step = pressure.num_running / block_size
        idle: NDArray[np.float64] = self.num_freed * (
            pressure.step_s / blocks_per_step / (2 * pressure.num_pool_blocks)
        )
        return idle

    def _weighted(self, costs: CostSnapshot) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Features, and their weights as far as they follow from the costs alone; built once for each snapshot.

        Columns of weights: recompute, swap without the wait for the copy out, copy out beyond the resume wait. What was
        learned by size stands behind the linear terms.
        """
        if self._of is not costs:
            self._of, self._extended = costs, self._features
            knots = (costs.recompute_knots_s, costs.out_knots_s, costs.in_knots_s)
            self._weights = np.zeros((6 + sum(map(len, knots)), 3))
            self._weights[:3, 0] = costs.recompute_fixed_s, costs.token_s, costs.attention_s
            self._weights[3] = 0.0, costs.out_block_s, costs.link_out_block_s
            if len(self._weights) > 6:
                sizes = (self._features[:, column] for column in (1, 3, 4))  # computed, copied, loaded
                shares = [hats(size, len(knot)) for size, knot in zip(sizes, knots, strict=True)]
                self._extended = np.ascontiguousarray(np.concatenate((self._features, *shares), axis=1))
                self._weights[6 : 6 + len(knots[0]), 0] = knots[0]
                self._weights[6 + len(knots[0]) :, 1] = (*knots[1], *knots[2])
        return self._extended, self._weights


def _slack(pressure: Pressure, costs: CostSnapshot) -> float:
    return max(0.0, costs.ridge_tokens - pressure.num_batch_tokens)


def _attention(candidate: Candidate) -> float:
    return float(candidate.num_tokens**2 - candidate.num_surviving_tokens**2)


def _copied(candidate: Candidate) -> int:
    return max(0, candidate.num_blocks - candidate.num_host_blocks)


def _loaded(candidate: Candidate, block_size: int) -> int:
    return candidate.num_blocks - candidate.num_surviving_tokens // block_size

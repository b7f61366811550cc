"""Who gives way, and whether the KV blocks of a victim are swapped out or recomputed.

Rules: values in, explained decisions out; no clock, no engine, no randomness. Engine and simulator call the same objects.
- A fixed policy takes always the same action where it can. Engines ask it about vLLM's own victim; asked among several, as
  where tenants are told apart, it takes the last running request of the most-served tenant, and never all.
- The adaptive policy chooses pairs of victim and action by the lowest price per useful block.
- A victim whose blocks cannot be swapped (unsafe here, nothing computed, no room) is recomputed, whoever decides.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cost_service.snapshot import CostSnapshot
from replicas.config import PreemptionPolicy
from replicas.preemption_cost import Candidate, CandidateTable, Pressure, Prices, prices


class Action(StrEnum):
    """What is done with a victim's KV blocks."""

    SWAP = "swap"
    RECOMPUTE = "recompute"


@dataclass(frozen=True, slots=True)
class PreemptionDecision:
    """What to do with one victim, and why."""

    request_id: str
    action: Action
    num_blocks: int
    """KV blocks that leave the engine's pool."""

    prices: Prices
    """What both actions were predicted to cost."""

    reason: str


class Policy(Protocol):
    """Chooses victims and actions."""

    @property
    def ahead(self) -> bool:
        """Whether victims are chosen before vLLM's own loop would take the last running request."""
        ...

    def choose(
        self, candidates: Sequence[Candidate], pressure: Pressure, costs: CostSnapshot
    ) -> list[PreemptionDecision]:
        """Choose victims among the candidates (in the scheduler's order) until enough blocks are free.

        A single candidate is chosen in any case: it is vLLM's own victim, and only its action is left to decide.
        """
        ...


class FixedPolicy:
    """The same action for everybody, on the last of the most-served tenant."""

    ahead = False

    def __init__(self, action: Action) -> None:
        self._action = action

    def choose(
        self, candidates: Sequence[Candidate], pressure: Pressure, costs: CostSnapshot
    ) -> list[PreemptionDecision]:
        """See `Policy`."""
        decisions: list[PreemptionDecision] = []
        remaining = sorted(candidates, key=lambda each: each.service)  # equal ones keep their order
        while not decisions or (len(remaining) > 1 and pressure.num_needed_blocks > 0):
            victim = remaining.pop()
            action = self._act(victim)
            why = no_swap(victim, pressure) if action is Action.SWAP else "the policy recomputes"
            if why is not None:
                action = Action.RECOMPUTE
            decisions.append(_decision(victim, action, pressure, costs, why or "the policy swaps"))
            pressure = _after(pressure, victim, action, costs)
        return decisions

    def _act(self, victim: Candidate) -> Action:
        return self._action


class RandomPolicy(FixedPolicy):
    """Either action by a hash of the request's name and its number of preemptions: for tests of exactness."""

    def __init__(self) -> None:
        super().__init__(Action.SWAP)

    def _act(self, victim: Candidate) -> Action:
        odd = zlib.crc32(f"{victim.request_id}/{victim.num_preemptions}".encode()) & 1
        return Action.SWAP if odd else Action.RECOMPUTE


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptivePolicy:
    """The pairs of victim and action with the lowest price per useful block, with what the block costs while it is idle.

    Dear preemptions are made rare by large victims, cheap ones are taken from those who free little more than is needed: the
    best size is about sqrt(2 * pool * growth per second * price), as with lots that are ordered and stored (Harris 1913).

    The oldest request of the least-served tenant is never a victim while there is another, so that somebody always ends;
    a request that has given way `max_preemptions` times is one only when all have. Victims of other tenants than the most
    served one are dearer by `others_price_factor`.
    """

    ahead: bool = True
    max_preemptions: int = 3
    horizon_tokens: float = 32.0
    """Output tokens still to come from which on a victim's blocks count fully."""

    others_price_factor: float = 3.0
    """The trade-off between fairness and cost: a victim comes from the most-served tenant unless another's price per useful
    block is lower by more than this factor. 1 looks at cost alone."""

    def __post_init__(self) -> None:
        if not 1.0 <= self.others_price_factor < math.inf:
            raise ValueError("others_price_factor must be a number from 1 on; 1 chooses victims by cost alone.")

    def choose(
        self, candidates: Sequence[Candidate], pressure: Pressure, costs: CostSnapshot
    ) -> list[PreemptionDecision]:
        """See `Policy`."""
        table = CandidateTable(candidates, block_size=costs.block_size, horizon_tokens=self.horizon_tokens)
        benefit = table.benefit.copy()
        if len(candidates) > 1:
            benefit[self.excluded(candidates)] = 0.0
        decisions: list[PreemptionDecision] = []
        while (benefit > 0.0).any() and pressure.num_needed_blocks > 0:
            table_s = table.price(pressure, costs)
            price_s = np.full(len(candidates), np.inf)
            np.divide(np.minimum(table_s[:, 0], table_s[:, 1]), benefit, out=price_s, where=benefit > 0.0)
            price_s += table.idle_s(pressure, block_size=costs.block_size)
            if self.others_price_factor > 1.0:
                price_s[~self._most_served(candidates, benefit)] *= self.others_price_factor
            index = int(price_s.argmin())
            victim, benefit[index] = candidates[index], 0.0
            action = Action.SWAP if table_s[index, 1] < table_s[index, 0] else Action.RECOMPUTE
            why = no_swap(victim, pressure) if action is Action.SWAP else None
            if why is not None:
                action = Action.RECOMPUTE
            decisions.append(_decision(victim, action, pressure, costs, why or "lowest price per useful block"))
            pressure = _after(pressure, victim, action, costs)
        if not decisions and len(candidates) == 1:
            decisions = [_decision(candidates[0], Action.RECOMPUTE, pressure, costs, "frees no block")]
        return decisions

    def _most_served(self, candidates: Sequence[Candidate], benefit: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Whose tenant has had the most service among those who can still give way."""
        service = np.array([each.service for each in candidates])
        return service == service[benefit > 0.0].max()

    def excluded(self, candidates: Sequence[Candidate]) -> list[int]:
        """Indices of those who may not be victims; never all of them."""
        leader = min(range(len(candidates)), key=lambda i: (candidates[i].service, i))
        tired = [i for i, c in enumerate(candidates) if c.num_preemptions >= self.max_preemptions]
        if len({leader, *tired}) == len(candidates):
            return [leader]
        return sorted({leader, *tired})


def policy_of(name: PreemptionPolicy) -> Policy:
    """Return the policy of that name."""
    if name is PreemptionPolicy.ADAPTIVE:
        return AdaptivePolicy()
    if name is PreemptionPolicy.RANDOM:
        return RandomPolicy()
    return FixedPolicy(Action(name.value))


def no_swap(victim: Candidate, pressure: Pressure) -> str | None:
    """Why a victim must not be swapped out, or None."""
    if pressure.unsafe is not None:
        return pressure.unsafe
    if victim.num_tokens == 0:
        return "nothing computed yet"
    if not victim.can_load:
        return "the request may not read loaded blocks"
    num_copied = max(0, victim.num_blocks - victim.num_host_blocks)
    if num_copied > pressure.num_free_host_slots:
        return "the host pool has no room"
    if num_copied > victim.num_host_slots:
        return "the tenant's share of the host pool is full"
    return None


def _decision(
    victim: Candidate, action: Action, pressure: Pressure, costs: CostSnapshot, reason: str
) -> PreemptionDecision:
    return PreemptionDecision(
        victim.request_id, action, victim.num_freed_blocks, prices(victim, pressure, costs), reason
    )


def _after(pressure: Pressure, victim: Candidate, action: Action, costs: CostSnapshot) -> Pressure:
    """The pressure that is left once the victim has given way."""
    swapped = action is Action.SWAP
    copied = max(0, victim.num_blocks - victim.num_host_blocks) if swapped else 0
    return replace(
        pressure,
        num_needed_blocks=pressure.num_needed_blocks - victim.num_freed_blocks,
        num_running=max(1, pressure.num_running - 1),
        num_free_host_slots=pressure.num_free_host_slots - copied,
        out_queue_s=pressure.out_queue_s + costs.link_out_block_s * copied,
        in_queue_s=pressure.in_queue_s + (costs.link_in_block_s * victim.num_blocks if swapped else 0.0),
    )

"""The stated bound on unfairness, term by term.

For two tenants f, g that wait all the time, both served by all of the replicas, over any interval:

    |W_f / phi_f - W_g / phi_g| <= (U + epsilon) * (1 / phi_f + 1 / phi_g)
    U = max(w_p * L_in, w_q * (M + B))          what one tenant's admitted requests can still get once it leads
    epsilon = S * staleness + S' * away          how wrong a counter can be

- M, tokens of KV memory: a leader's admitted requests grow into all pools at most, if it is the leader whom a full pool
  takes blocks from (victims from the most-served tenant, who re-enter through the fair order). vLLM's own victims are the
  last that came, whoever they are: then a leader's requests may grow to all that they may generate, at others' cost, and M
  is the sum of max_num_seqs * max_tokens.
- Refill: M alone is not the worst case. Room that one of a leader's requests gives up is filled by its others, while whoever
  is behind waits with a prompt that does not fit. n requests that grow alike and shrink to k by preemption generate at most
  M (1 + 1/(k+1) + ... + 1/n) tokens: the victims' own sizes t_i add up to that, as i alive at size t_i fill M. A request
  is no longer than L, so more than M / L are alive when one gives way. `worst` is the bound with this M; only preemption
  for fairness (not for memory) would do away with it.
- L_in: a step may admit one prompt more after the leader has taken the lead.
- B: tokens of requests that are granted, not yet admitted. Here engines admit by themselves: what a tenant may be ahead by
  and still pass a request that does not fit (`replicas/bypass.py`), as output tokens.
- epsilon: between two answers, replicas admit by counters that lack what others have served since. With tickets from a
  central queue only decode is late, w_q * G * (tau + RTT), and is printed; here requests queue in the engines, so all
  service is late by a report and an answer, S * (2 tau + RTT), S being the most weighted service that all replicas can give
  in a second. At 100 ms they hardly differ. Long prompts and reports every 5 s break the bound with the former.
- away: seconds in which nobody hears of the others, for the scheduler is away. Staleness grows by as much, but not
  everywhere: at a replica at which both f and g wait, its own counters see all that it serves, and hold them together as
  ever (within its part of U). Unseen is what f gets where g does not wait. g waits at one replica at least, so S' is S
  without the slowest replica. Replicas that never hear of each other are no case of it: nothing bounds them.
- absent: seconds until a replica hears of a tenant that is not there, where there are many (`fair_share.py`). f that comes
  to a replica is ordered by a counter that lacks what it got elsewhere in that time, and may do so again and again: the
  same S'.
- What predictions hold in advance is part of the key by which tenants are chosen, but not service. It is at most w_q * M if
  predictions are clipped to what a request may generate, and within U.
- A tenant that can use only some of the replicas is held to its max-min share: `max_min.py` says whom it is compared with.

In seconds of engine time the weights are the most seconds that an input and an output token can take.

Source: `|W_f - W_g| <= 2 U` is theorem 4.4 of VTC (arXiv:2401.00588), M over several engines its appendix C.3; the rest is
own reasoning, held by tests/test_fairness_experiments.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from cost_service.service_messages import ReplicaLimits


class VictimRule(StrEnum):
    """Whose blocks a full pool takes."""

    MOST_SERVED = "most-served tenant"
    LAST_COME = "last come"


def num_refilled_tokens(limits: ReplicaLimits, max_input_tokens: int) -> float:
    """Most output tokens that one tenant's requests can generate on a replica without a new admission; see the rules."""
    num_alive = math.ceil(limits.num_pool_tokens / (max_input_tokens + limits.max_tokens)) - 1
    num_alive = min(max(1, num_alive), limits.max_num_seqs)
    refills = 1.0 + sum(1.0 / num for num in range(num_alive + 1, limits.max_num_seqs + 1))
    return min(refills * limits.num_pool_tokens, float(limits.max_num_seqs * limits.max_tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class FairnessBound:
    """The bound, with every term it was made of."""

    prompt_service: float
    """w_p * L_in"""

    memory_service: float
    """w_q * (M + B)"""

    num_memory_tokens: int
    """M"""

    refill_service: float
    """w_q times the tokens beyond M that a leader's requests can generate in room which its own victims gave up"""

    stale_service: float
    """epsilon, of engines that queue by themselves"""

    unheard_service: float
    """S' * (away + absent), of the time in which replicas do not hear of others, or of who is absent there"""

    decode_stale_service: float
    """epsilon, were admissions charged centrally; no part of the bound"""

    victims: VictimRule

    @property
    def unit(self) -> float:
        """U + epsilon: what one tenant at weight 1 can be ahead."""
        return self.credit + self.unheard_service

    @property
    def credit(self) -> float:
        """The same where all hear of all: what waiting elsewhere is worth at most (`level.py`)."""
        return max(self.prompt_service, self.memory_service) + self.stale_service

    @property
    def worst(self) -> float:
        """The same in the worst case, refills included."""
        memory_service = self.memory_service + self.refill_service
        return max(self.prompt_service, memory_service) + self.stale_service + self.unheard_service

    def pair(self, weight_f: float, weight_g: float) -> float:
        """The bound of two tenants' difference of normalised service."""
        return self.unit * (1.0 / weight_f + 1.0 / weight_g)

    def __str__(self) -> str:
        """Every term in one line."""
        return (
            f"U = max(prompt {self.prompt_service:.0f}, memory {self.memory_service:.0f}"
            f" [M = {self.num_memory_tokens} tokens, victims: {self.victims.value}])"
            f" + stale {self.stale_service:.0f} [decode alone {self.decode_stale_service:.0f}]"
            f" + unheard {self.unheard_service:.0f} = {self.unit:.0f}; weights 1: {self.pair(1.0, 1.0):.0f};"
            f" with refills {self.refill_service:.0f}: {self.worst:.0f}"
        )


def fairness_bound(
    replicas: Sequence[ReplicaLimits], *, max_input_tokens: int, interval_s: float, round_trip_s: float,
    input_weight: float = 1.0, output_weight: float = 2.0, num_granted_tokens: float = 0.0,
    away_s: float = 0.0, absent_s: float = 0.0, victims: VictimRule = VictimRule.MOST_SERVED,
) -> FairnessBound:  # fmt: skip
    """Compute the bound for tenants that all of these replicas serve.

    Args:
        max_input_tokens: L_in, of the longest prompt that is accepted.
        interval_s: tau, between two reports of a replica.
        round_trip_s: RTT, from a report to its answer.
        num_granted_tokens: B.
        away_s: The longest time for which the scheduler is away.
        absent_s: The longest time until a replica hears of who is absent there, beyond the interval.

    Raises:
        ValueError: A weight or limit makes the bound meaningless; the message names it.
    """
    if not 0.0 <= input_weight <= output_weight:
        raise ValueError("output_weight must be at least input_weight, and that not negative: the bound assumes it.")
    for name, value in (
        ("interval_s", interval_s),
        ("round_trip_s", round_trip_s),
        ("num_granted_tokens", num_granted_tokens),
        ("away_s", away_s),
        ("absent_s", absent_s),
    ):
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{name} is {value!r}; it must be a number from 0 on.")
    if victims is VictimRule.MOST_SERVED:
        num_memory_tokens = sum(each.num_pool_tokens for each in replicas)
        num_refilled = sum(num_refilled_tokens(each, max_input_tokens) for each in replicas)
    else:
        num_memory_tokens = sum(each.max_num_seqs * each.max_tokens for each in replicas)
        num_refilled = float(num_memory_tokens)
    services_per_s = [each.max_service_per_s for each in replicas]
    return FairnessBound(
        prompt_service=input_weight * max_input_tokens,
        memory_service=output_weight * (num_memory_tokens + num_granted_tokens),
        num_memory_tokens=num_memory_tokens,
        refill_service=output_weight * max(0.0, num_refilled - num_memory_tokens),
        stale_service=(2.0 * interval_s + round_trip_s) * sum(services_per_s),
        unheard_service=(away_s + absent_s) * (sum(services_per_s) - min(services_per_s, default=0.0)),
        decode_stale_service=output_weight
        * (interval_s + round_trip_s)
        * sum(each.max_decode_tokens_per_s for each in replicas),
        victims=victims,
    )

"""Swap or recompute: what happens to the KV blocks of a request that must give way.

Rules: values in, an explained decision out; no clock, no engine. The scheduler and the simulator call the same function.
"""

from dataclasses import dataclass
from enum import StrEnum

from replicas.config import PreemptionPolicy


class Action(StrEnum):
    """What is done with a victim's KV blocks."""

    SWAP = "swap"
    RECOMPUTE = "recompute"


@dataclass(frozen=True, slots=True)
class Victim:
    """A running request that gives way."""

    request_id: str
    num_computed_tokens: int
    """Tokens whose KV is in the engine's blocks once the steps in flight are done."""

    num_blocks: int
    """KV blocks that hold those tokens; the last may be partly filled."""


@dataclass(frozen=True, slots=True)
class PreemptionDecision:
    """What to do with one victim, and why."""

    request_id: str
    action: Action
    num_blocks: int
    """KV blocks that leave the engine's pool (and, for a swap, enter the host pool)."""

    reason: str


def decide(
    victim: Victim, policy: PreemptionPolicy, *, num_free_host_slots: int, unsafe: str | None = None
) -> PreemptionDecision:
    """Choose the action for one victim.

    Args:
        num_free_host_slots: Host slots (one KV block each) that can be taken now.
        unsafe: Why a swap is not allowed here at all (a sentence for logs), or None.
    """

    def recompute(reason: str) -> PreemptionDecision:
        return PreemptionDecision(victim.request_id, Action.RECOMPUTE, victim.num_blocks, reason)

    if unsafe is not None:
        return recompute(unsafe)
    if policy is PreemptionPolicy.RECOMPUTE:
        return recompute("the policy recomputes")
    if victim.num_computed_tokens == 0:
        return recompute("nothing computed yet")
    if victim.num_blocks > num_free_host_slots:
        return recompute("the host pool has no room")
    return PreemptionDecision(victim.request_id, Action.SWAP, victim.num_blocks, "the host pool has room")

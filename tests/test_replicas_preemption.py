"""Goal: the fate of a victim follows from policy, safety and room alone, and comes with its reason.

Method: sentences for every branch, and a property over all inputs.
"""

from hypothesis import given
from hypothesis import strategies as st

from replicas.config import PreemptionPolicy
from replicas.preemption import Action, PreemptionDecision, Victim, decide

VICTIM = Victim("r", num_computed_tokens=70, num_blocks=3)


def test_a_victim_that_fits_is_swapped() -> None:
    decision = decide(VICTIM, PreemptionPolicy.SWAP, num_free_host_slots=10)
    assert decision == PreemptionDecision("r", Action.SWAP, 3, "the host pool has room")


def test_a_victim_that_fits_exactly_is_swapped() -> None:
    assert decide(VICTIM, PreemptionPolicy.SWAP, num_free_host_slots=3).action is Action.SWAP


def test_a_victim_one_block_too_large_recomputes() -> None:
    decision = decide(VICTIM, PreemptionPolicy.SWAP, num_free_host_slots=2)
    assert decision == PreemptionDecision("r", Action.RECOMPUTE, 3, "the host pool has no room")


def test_the_recompute_policy_recomputes_whatever_room_there_is() -> None:
    decision = decide(VICTIM, PreemptionPolicy.RECOMPUTE, num_free_host_slots=1000)
    assert (decision.action, decision.reason) == (Action.RECOMPUTE, "the policy recomputes")


def test_a_victim_without_computed_tokens_has_nothing_to_swap() -> None:
    decision = decide(Victim("r", 0, 0), PreemptionPolicy.SWAP, num_free_host_slots=10)
    assert (decision.action, decision.reason) == (Action.RECOMPUTE, "nothing computed yet")


def test_an_unsafe_engine_never_swaps_and_its_reason_is_the_one_given() -> None:
    decision = decide(VICTIM, PreemptionPolicy.SWAP, num_free_host_slots=10, unsafe="speculative decoding")
    assert (decision.action, decision.reason) == (Action.RECOMPUTE, "speculative decoding")


@given(
    tokens=st.integers(0, 300),
    block_size=st.sampled_from([1, 16, 32]),
    policy=st.sampled_from(PreemptionPolicy),
    free=st.integers(0, 30),
    unsafe=st.none() | st.text(min_size=1),
)
def test_a_swap_is_decided_exactly_where_it_is_wanted_safe_and_possible(
    tokens: int, block_size: int, policy: PreemptionPolicy, free: int, unsafe: str | None
) -> None:
    victim = Victim("r", tokens, -(-tokens // block_size))
    decision = decide(victim, policy, num_free_host_slots=free, unsafe=unsafe)
    wanted = policy is PreemptionPolicy.SWAP and unsafe is None and 0 < victim.num_blocks <= free
    assert (decision.action is Action.SWAP) == wanted
    assert (decision.request_id, decision.num_blocks) == ("r", victim.num_blocks)
    assert decision.reason

"""Admission that reserves a request's whole output, as LightLLM's and S-LoRA's: nobody is ever preempted.

Rule: a request is admitted only if at no time to come those who run with it would need more tokens than the pool has, if
each of them got all the output that it may and nobody else came.

Source: S-LoRA `slora/server/router/req_queue.py` (`_can_add_new_req`).
"""

from collections.abc import Iterable


def peak_tokens(progress: Iterable[tuple[int, int]]) -> int:
    """Most tokens that requests will hold at once if nobody joins them.

    Args:
        progress: Of each request the tokens that it holds, and those that it may still get; all get one a step.
    """
    held = peak = 0
    # Just before the one with the least left ends, it and all with more left hold the most that they will together.
    for rank, (num_held, num_left) in enumerate(sorted(progress, key=lambda one: -one[1]), start=1):
        held += num_held
        peak = max(peak, held + rank * num_left)
    return peak

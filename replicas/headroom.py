"""How many KV blocks stay free when a request is admitted, so that those who run can grow: as many as preemptions are worth.

Rule: an integral controller. Every step adds the share of its time that preemptions cost, less the share that is worth
having: idle blocks cost throughput too. Where preemptions cost next to nothing (a fast link) it stays at zero and admits as
vLLM does; where they cost much it grows until they become rare.

Source: the cost of h idle blocks rises by step_s / pool per step, and the rate of preemptions falls by about exp(-h / h0),
so both are in balance where preemptions cost h0 / pool of the time: about `TARGET_SHARE`.
"""

TARGET_SHARE = 0.01
"""Share of the engine's time that preemptions may cost."""

GAIN_BLOCKS = 0.3
"""Blocks for a preemption that costs as much as a step."""

LARGEST_STEP_SHARE = 10.0
"""What counts of a preemption, in steps: one wrong price must not close the door."""


class Headroom:
    """KV blocks to keep free at admission."""

    def __init__(self) -> None:
        self._blocks = 0.0

    @property
    def num_blocks(self) -> int:
        """Blocks to keep free when somebody else is running."""
        return int(self._blocks)

    def step(self, preemptions_s: float, step_s: float, *, num_running: int) -> None:
        """Take a step of the engine into account.

        Args:
            preemptions_s: What its preemptions are predicted to cost in all, in seconds of engine time.
            step_s: How long it took.
            num_running: Running requests; none of them needs more than one block soon.
        """
        assert preemptions_s >= 0.0, f"preemptions cost {preemptions_s} s"
        assert step_s > 0.0, f"a step of {step_s} s"
        share = min(preemptions_s / step_s, LARGEST_STEP_SHARE)
        self._blocks = min(max(0.0, self._blocks + GAIN_BLOCKS * (share - TARGET_SHARE)), float(num_running))

    def quiet_steps(self, num_steps: int, *, num_running: int) -> None:
        """Take steps without preemptions into account, as many calls of `step` would."""
        for _ in range(num_steps):
            if not self._blocks:
                return
            self._blocks = min(max(0.0, self._blocks - GAIN_BLOCKS * TARGET_SHARE), float(num_running))

    def reset(self) -> None:
        """Admit as vLLM does."""
        self._blocks = 0.0

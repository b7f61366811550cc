"""What a simulated engine is like, and the step that it computes."""

from dataclasses import dataclass

from cluster.simulated_request import SimulatedRequest
from cluster.simulated_time import StepTimes


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedSettings:
    """vLLM's settings of the same names."""

    num_blocks: int
    """KV blocks, vLLM's null block included."""

    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_model_len: int = 131072
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    watermark: float = 0.0
    reserve_full_isl: bool = True
    """Whether a request is admitted only when there are blocks for all its tokens so far."""

    reserve_output: bool = False
    """Whether a request is admitted only when all who run then could get all their output (`simulated_reservation`)."""

    steps_between_admissions: int = 1
    """S-LoRA's router admits again when those who run have had so many tokens."""

    strides: bool = True
    """Off: every step by itself, to check strides."""

    def __post_init__(self) -> None:
        if self.num_blocks < 2:
            raise ValueError(f"num_blocks must be at least 2, for one of them is never used: it is {self.num_blocks}.")
        for name in (
            "block_size",
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_model_len",
            "steps_between_admissions",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of a simulated engine must be at least 1: it is {getattr(self, name)}.")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError("max_num_batched_tokens must not be below max_num_seqs, as in vLLM.")
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < self.max_model_len:
            raise ValueError("Without chunked prefill max_num_batched_tokens must not be below max_model_len.")
        if not 0 <= self.watermark < 1:
            raise ValueError(f"watermark must be at least 0 and below 1: it is {self.watermark}.")


@dataclass(slots=True, kw_only=True)
class Step:
    """The step under way, or the stride."""

    start_s: float
    num_decodes: int
    """Of the batch; they compute a token each."""
    num_context_tokens: int
    prefills: list[tuple[SimulatedRequest, int, int]]
    """All others that are scheduled, in the order of running: tokens computed before, and in this step."""
    wait_s: float = 0.0
    """For copies, ahead of the first forward pass."""
    num_steps: int = 1
    """Of the stride; 1 with prefills."""

    def end_s(self, times: StepTimes, num_steps: int) -> float:
        """When so many steps have ended."""
        start_s = self.start_s + self.wait_s
        if not self.prefills:
            return start_s + times.decode_run_s(self.num_decodes, self.num_context_tokens, num_steps)
        prefills = [(cached, num) for _, cached, num in self.prefills if num > 1]
        contexts = [cached + 1 for _, cached, num in self.prefills if num == 1]
        return start_s + times.step_s(
            self.num_decodes + len(contexts), self.num_context_tokens + sum(contexts), prefills
        )

    def ends_s(self, times: StepTimes, last_s: float) -> list[float]:
        """When each step of the stride has ended, the last of them at `last_s`."""
        start_s, num_decodes, contexts = self.start_s + self.wait_s, self.num_decodes, self.num_context_tokens
        run_s = times.decode_run_s
        return [*(start_s + run_s(num_decodes, contexts, number) for number in range(1, self.num_steps)), last_s]

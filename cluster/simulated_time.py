"""How long the steps of a simulated engine take."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from cost_service.snapshot import CostSnapshot


class StepTimes(Protocol):
    """Seconds of whole steps; `cost_service.engine_step` and `cost_service.profiled_step` have others than the one below."""

    def step_s(self, num_decodes: int, decode_tokens: float, prefills: Sequence[tuple[int, int]] = ()) -> float:
        """Seconds of one step.

        Args:
            num_decodes: Requests that compute one token.
            decode_tokens: KV tokens that they read together, their own included.
            prefills: Of each the tokens cached before it, and the new ones.
        """
        ...

    def decode_run_s(self, num_decodes: int, decode_tokens: float, num_steps: int) -> float:
        """Seconds of steps that only decode: the first reads `decode_tokens`, each next one a token more of each request."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearTimes:
    """Every step has a fixed part; all else is in proportion to what it computes and reads."""

    fixed_s: float
    decode_s: float = 0.0
    """Per decode."""

    context_s: float = 0.0
    """Per KV token that decodes read."""

    prefill_fixed_s: float = 0.0
    """What any prefill adds."""

    ridge_tokens: float = 0.0
    """Tokens of a step up to which more take no longer."""

    token_s: float = 0.0
    """Per token of a step with prefills beyond the ridge."""

    attention_s: float = 0.0
    """Per unit of (cached + new)^2 - cached^2 of a prefill."""

    @classmethod
    def from_snapshot(cls, costs: CostSnapshot, *, decode_step_s: float, context_s: float = 0.0) -> Self:
        """What a snapshot knows of prefills; of decodes it knows nothing.

        Args:
            decode_step_s: Seconds of a step of decodes without contexts.
            context_s: See the attribute.
        """
        return cls(
            fixed_s=decode_step_s, context_s=context_s, prefill_fixed_s=costs.recompute_fixed_s,
            ridge_tokens=costs.ridge_tokens, token_s=costs.token_s, attention_s=costs.attention_s,
        )  # fmt: skip

    def step_s(self, num_decodes: int, decode_tokens: float, prefills: Sequence[tuple[int, int]] = ()) -> float:
        """See `StepTimes`."""
        seconds = self.fixed_s + self.decode_s * num_decodes + self.context_s * decode_tokens
        if prefills:
            tokens = num_decodes + sum(new for _, new in prefills)
            attention = sum((cached + new) ** 2 - cached**2 for cached, new in prefills)
            seconds += self.prefill_fixed_s + self.token_s * max(0.0, tokens - self.ridge_tokens)
            seconds += self.attention_s * attention
        return seconds

    def decode_run_s(self, num_decodes: int, decode_tokens: float, num_steps: int) -> float:
        """See `StepTimes`."""
        contexts = num_steps * decode_tokens + num_decodes * (num_steps * (num_steps - 1) // 2)
        return num_steps * (self.fixed_s + self.decode_s * num_decodes) + self.context_s * contexts

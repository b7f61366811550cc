"""How the requests of a run went, whether an engine served them or a simulation.

Times are seconds after the start of the run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """What happened to one request."""

    request_id: str
    tenant: str
    arrival_s: float
    first_token_s: float | None
    finish_s: float | None
    prompt_tokens: int
    output_tokens: int
    """Asked for."""

    delivered_tokens: int
    """Delivered; fewer than asked for only when the run ended first."""

    swaps: int = 0
    recomputes: int = 0

    def __post_init__(self) -> None:
        assert (self.first_token_s is None) == (self.delivered_tokens == 0), f"{self} has tokens without a time"
        assert self.finish_s is None or self.delivered_tokens == self.output_tokens, f"{self} finished with tokens left"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What one run of one engine gave."""

    records: list[RequestRecord]
    run_end_s: float
    peak_kv_blocks: int
    computed_tokens: int
    """Tokens that went through the model, recomputed ones included."""

    scheduler: dict[str, float]
    """Steps, those of them under the guard, and microseconds per step in the scheduler: over all, and over the steps with
    the most requests running."""

    preemption_costs: dict[str, dict[str, float]]
    """By action how many were measured, and the seconds of engine time that they were predicted to cost and did."""

    tokens: dict[str, list[int]]
    """Output token ids by request."""

    @classmethod
    def of(cls, mapping: Mapping[str, Any]) -> Self:
        """Read what `asdict` has written."""
        return cls(**{**mapping, "records": [RequestRecord(**record) for record in mapping["records"]]})

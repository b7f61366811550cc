"""What a preemption costs on one kind of replica, as one frozen value that engines evaluate by themselves.

Rules:
- Seconds of engine time per unit of work, never code: JSON with a checksum on the wire and in storage, no pickle.
- A snapshot belongs to one (model, hardware, parallelism) and one KV block layout; another's is refused, not adapted.
- Linear costs come first; what measurements show beside them is a function of size (`cost_service.hats`), empty where
  nothing was learned.
- A damaged or foreign snapshot is a `ValueError`; whoever reads one goes on with what it had.

Source of the terms: a step's time is a fixed part plus what exceeds the ridge where matrix products become compute-bound;
causal attention over n new tokens behind r cached ones does (n + r)^2 - r^2 units of work.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

SCHEMA = 3

MAX_KNOTS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class CostSnapshot:
    """Linear costs of recomputing and of swapping KV blocks."""

    version: int
    """Rises with every refit; 0 is the analytic start."""

    model: str
    hardware: str
    parallelism: int
    """Tensor-parallel ranks."""

    block_size: int
    """Tokens per KV block."""

    recompute_fixed_s: float
    """Seconds that a prefill adds to a step of decodes whatever its size: another shape of batch, other kernels."""

    ridge_tokens: float
    """Tokens of one step up to which more tokens take no longer: the weights are read anyway."""

    token_s: float
    """Seconds per token of a step beyond the ridge."""

    attention_s: float
    """Seconds per unit of (n + r)^2 - r^2."""

    swap_fixed_s: float
    """Seconds that one direction of a swap takes from the engine, whatever its size."""

    out_block_s: float
    """Seconds per block that a copy to host memory takes from the engine; what runs beside it does not count."""

    in_block_s: float
    """The same for a copy back."""

    link_latency_s: float = 0.0
    """Seconds that a transfer takes beside the engine, whatever its size."""

    link_out_block_s: float = 0.0
    """Seconds per block that a transfer to host memory occupies the link beside the engine."""

    link_in_block_s: float = 0.0
    """The same of a transfer back."""

    link_shared_ratio: float = 0.0
    """How much longer a transfer takes while the other direction carries something too: 0 for no longer, 1 for twice."""

    recompute_knots_s: tuple[float, ...] = ()
    """Seconds that recomputing 1, 2, 4, ... tokens takes beyond all that, below 0 where it takes less."""

    out_knots_s: tuple[float, ...] = ()
    """The same of a copy of 1, 2, 4, ... blocks to host memory."""

    in_knots_s: tuple[float, ...] = ()
    """And of a copy back."""

    def __post_init__(self) -> None:
        for name, least in (("version", 0), ("parallelism", 1), ("block_size", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} of a cost snapshot must be a whole number of at least {least}.")
        for field in fields(self):
            if field.type == tuple[float, ...]:
                object.__setattr__(self, field.name, _knots(field.name, getattr(self, field.name)))
            if field.type is not float:
                continue
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"{field.name} of a cost snapshot must be a finite number and not negative.")
        for name in ("model", "hardware"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} of a cost snapshot must be a text.")

    def to_json(self) -> str:
        """Return the snapshot with schema and checksum."""
        content = asdict(self)
        return json.dumps({"schema": SCHEMA, "sha256": _checksum(content), "snapshot": content})

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read what `to_json` wrote.

        Raises:
            ValueError: Not such a text, another schema, a wrong checksum, or a value out of range.
        """
        try:
            record = json.loads(text)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("snapshot"), dict):
            raise ValueError("A cost snapshot must be the JSON object that the cost service writes: fetch it again.")
        if record.get("schema") != SCHEMA:
            raise ValueError(f"A cost snapshot must have schema {SCHEMA}: upgrade cost service and replicas together.")
        content: dict[str, Any] = record["snapshot"]
        if record.get("sha256") != _checksum(content):
            raise ValueError("The checksum of a cost snapshot is wrong: it is damaged, fetch it again.")
        try:
            return cls(**content)
        except TypeError:
            known = [field.name for field in fields(cls)]
            raise ValueError(f"A cost snapshot must have exactly the fields {known}.") from None

    def fits(self, *, model: str, hardware: str, parallelism: int, block_size: int) -> bool:
        """Whether the snapshot was made for such a replica."""
        mine = (self.model, self.hardware, self.parallelism, self.block_size)
        return mine == (model, hardware, parallelism, block_size)


def read_fitted(path: Path) -> CostSnapshot:
    """Read the one snapshot in a file that `python -m cost_service fit` wrote.

    Raises:
        ValueError: The file cannot be read, is none of that kind, or holds the costs of several models.
    """
    try:
        document = json.loads(path.read_text())
        (record,) = document["snapshots"].values()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): fit the costs again.") from None
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{path} must hold the costs of one model: write it with python -m cost_service fit."
        ) from None
    return CostSnapshot.from_json(json.dumps(record))


def _knots(name: str, values: object) -> tuple[float, ...]:
    if not isinstance(values, tuple | list) or len(values) > MAX_KNOTS:
        raise ValueError(f"{name} of a cost snapshot must be a list of at most {MAX_KNOTS} numbers.")
    if any(
        isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) for value in values
    ):
        raise ValueError(f"{name} of a cost snapshot must hold finite numbers.")
    return tuple(map(float, values))


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

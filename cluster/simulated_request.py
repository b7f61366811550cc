"""One request in a simulated cluster."""

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from cluster.records import RequestRecord
from cluster.simulated_blocks import Holding, PrefixPart
from cost_service.traces import TraceRequest


class Status(Enum):
    """Where a request is; vLLM's words."""

    WAITING = "waiting"
    LOADING = "loading"
    """It holds blocks that are being loaded (vLLM: WAITING_FOR_REMOTE_KVS)."""
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"
    ABORTED = "aborted"


class SimulatedRequest:
    """What was asked for, and how far it is. While it decodes, its numbers of tokens are kept by `DecodeBatch`."""

    __slots__ = (
        "arrival_s",
        "end",
        "finish_s",
        "first_token_s",
        "holding",
        "home",
        "max_tokens",
        "num_blocks",
        "num_computed",
        "num_full_blocks",
        "num_output",
        "num_preemptions",
        "output_tokens",
        "place",
        "prompt_tokens",
        "recomputes",
        "request_id",
        "stamp",
        "start",
        "status",
        "swaps",
        "tenant",
    )  # fmt: skip

    def __init__(
        self,
        request_id: str,
        *,
        tenant: str,
        arrival_s: float,
        prompt_tokens: int,
        output_tokens: int,
        prefix: Sequence[PrefixPart] = (),
        stamp: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
    ) -> None:
        """A request that has just arrived.

        Args:
            prefix: Of the prompt's full blocks, as far as others may share them (`prefix_parts`).
            stamp: What an ingress would have stamped into it (`replicas.request_stamp`): a predicted length.
            max_tokens: All that the engine knows of its length; None: `output_tokens`.
        """
        self.request_id, self.tenant, self.arrival_s = request_id, tenant, arrival_s
        self.prompt_tokens, self.output_tokens = prompt_tokens, output_tokens
        self.max_tokens = output_tokens if max_tokens is None else max_tokens
        self.stamp: Mapping[str, Any] = stamp or {}
        self.num_preemptions = self.swaps = self.recomputes = 0
        self.home: int | None = None
        """Number of its replica."""
        self._begin(prefix)

    def restart(self) -> None:
        """Its replica is gone, with all that it had computed: nothing has been delivered."""
        self._begin(self.holding.parts)

    def _begin(self, prefix: Sequence[PrefixPart]) -> None:
        self.status = Status.WAITING
        self.num_computed = self.num_output = 0
        self.holding = Holding(prefix)
        self.num_blocks = self.num_full_blocks = 0
        """KV blocks that it holds, and those of them whose tokens are cached once the step under way is done."""
        self.place = -1
        """Number of its admission: running requests stand in this order."""
        self.start = self.end = -1
        """Kept by `DecodeBatch`: tokens computed less steps of the batch; the step of the batch with its last token."""
        self.first_token_s: float | None = None
        self.finish_s: float | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt and output so far."""
        return self.prompt_tokens + self.num_output

    def record(self) -> RequestRecord:
        """What became of it."""
        return RequestRecord(
            request_id=self.request_id, tenant=self.tenant, arrival_s=self.arrival_s,
            first_token_s=self.first_token_s, finish_s=self.finish_s, prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens, delivered_tokens=self.num_output, swaps=self.swaps,
            recomputes=self.recomputes,
        )  # fmt: skip


def prefix_parts(one: TraceRequest, *, block_size: int) -> tuple[PrefixPart, ...]:
    """A prompt's full KV blocks as far as the trace has hashes: keys are equal where all tokens up to a block's end are.

    A hash is chained, so that the one which a block ends in, and the block's place, tell all the tokens before.
    """
    num_blocks = min(one.prompt_tokens, len(one.prefix_hashes) * one.hash_tokens) // block_size
    parts, first = [], 0
    for number, hash_ in enumerate(one.prefix_hashes, start=1):
        end = min(num_blocks, number * one.hash_tokens // block_size)
        if end > first:
            parts.append(PrefixPart(hash_ << 24 | first, end - first))
            first = end
    return tuple(parts)

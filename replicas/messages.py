"""Messages of the control channel between a replica's server and its engine: JSON, typed, size-bounded.

Rule: totals are cumulative since the engine started, so that a lost message costs nothing and a repeated one adds nothing.
"""

from typing import TypeVar

import msgspec

from cost_service.charges import Account
from cost_service.samples import Sample
from cost_service.service_messages import AccountReport, AutoscalingStats, ReplicaLoad, Share
from replicas.config import PreemptionPolicy
from replicas.fair_queue import Admission
from replicas.turnaround import Ended

T = TypeVar("T")

MAX_MESSAGE_BYTES = 16 << 20
"""Holds a report of 100,000 accounts."""


class SetPolicy(
    msgspec.Struct, frozen=True, kw_only=True, tag="set_policy", forbid_unknown_fields=True, omit_defaults=True
):
    """Server to engine: follow other policies from the next step on; None leaves one as it is."""

    preemption: PreemptionPolicy | None = None
    admission: Admission | None = None


class SetCosts(msgspec.Struct, frozen=True, kw_only=True, tag="set_costs", forbid_unknown_fields=True):
    """Server to engine: decide by these costs from the next step on."""

    snapshot: str
    """As `CostSnapshot.to_json` writes it."""


class CostSamples(msgspec.Struct, frozen=True, kw_only=True, tag="samples", forbid_unknown_fields=True):
    """Engine to server: what was measured since the last such message; a lost one is not sent again."""

    costs: str
    """The cost snapshot in force, as `CostSnapshot.to_json` writes it: whose samples these are, and what to begin with."""

    samples: list[Sample]


class SetShares(msgspec.Struct, frozen=True, kw_only=True, tag="set_shares", forbid_unknown_fields=True):
    """Server to engine: what the fairness scheduler says of tenants; those that are not named stay as they are."""

    shares: list[Share]
    answered: int
    """Sequence of the engine's last service report that the scheduler has taken; 0 for none."""

    wants_everything: bool = False
    """Whether the next service report shall name all accounts, and what the engine knows: the scheduler is new to it."""


class ServiceReport(msgspec.Struct, frozen=True, kw_only=True, tag="service", forbid_unknown_fields=True):
    """Engine to server: what tenants were served. It holds all that was not answered yet: a later one replaces it."""

    epoch: str
    """Names this life of the engine, as in `EngineTotals`."""

    sequence: int
    """Rises by one with every service report of the epoch, from 1."""

    accounts: list[tuple[Account, AccountReport]]
    ended: dict[str, Ended] = {}
    """Requests of these tenants that have ended since the epoch began."""

    known: dict[str, float] | None = None
    """In a report of all accounts: counters by tenant as the engine knows them, for a scheduler that has lost its own."""


class EngineTotals(msgspec.Struct, frozen=True, kw_only=True, tag="totals", forbid_unknown_fields=True):
    """Engine to server: gauges of this moment and counters since the engine started."""

    epoch: str
    """Names this life of the engine; counters of another epoch started from zero."""

    sequence: int
    """Rises by one with every message of the epoch."""

    preemption: str
    """Policy in force."""

    admission: str
    """Order of admission in force."""

    service_kind: str
    """What is equalised between tenants."""

    service: float
    """Service that all tenants were given, in that unit."""

    num_pool_tokens: int
    """Tokens that the KV blocks hold."""

    max_num_seqs: int
    max_model_len: int
    num_running: int
    num_waiting: int
    num_kv_blocks: int
    num_free_kv_blocks: int
    num_host_slots: int
    num_used_host_slots: int
    steps: int
    scheduled_tokens: int
    """Tokens computed, recomputed ones included."""

    output_tokens: int
    """Tokens delivered."""

    swaps: int
    recomputes: int
    guarded: bool
    """Whether the guard keeps the policy from deciding: preemptions are vLLM's own."""

    guarded_steps: int
    headroom_blocks: int
    """KV blocks kept free at admission."""

    num_retained_host_slots: int
    """Host slots of spare copies, which make room when slots are wanted; not among the used ones."""

    predicted_swap_s: float
    """Seconds of engine time that the measured swaps were predicted to cost; the same of recomputations below."""

    measured_swap_s: float
    predicted_recompute_s: float
    measured_recompute_s: float
    swapped_out_blocks: int
    swapped_in_blocks: int
    costs_version: int
    """Version of the cost snapshot in force."""

    block_size: int
    """Tokens of a KV block."""

    num_waiting_tokens: int
    """Of the prompts of those who wait."""

    queued_s: float
    """Predicted seconds until those who wait have been served, if nobody else came."""

    backlog: dict[str, int]
    """Tokens of the prompts by tenant, of those of whom most waits (`cost_service.service_messages.heaviest`)."""

    dropped_messages: int
    """Totals that found no room on the channel; the next ones carry their content."""

    def load(self, age_s: float) -> ReplicaLoad:
        """What routers are told of them, `age_s` after the engine said so."""
        return ReplicaLoad(
            epoch=self.epoch, sequence=self.sequence, age_s=age_s, num_running=self.num_running,
            num_waiting=self.num_waiting, num_blocks=self.num_kv_blocks, num_free_blocks=self.num_free_kv_blocks,
            block_size=self.block_size, num_waiting_tokens=self.num_waiting_tokens, backlog=self.backlog,
        )  # fmt: skip

    def autoscaling(self, age_s: float) -> AutoscalingStats:
        """What the autoscaler is told of them, `age_s` after the engine said so."""
        return AutoscalingStats(
            num_running=self.num_running, num_waiting=self.num_waiting, num_blocks=self.num_kv_blocks,
            num_free_blocks=self.num_free_kv_blocks, max_num_seqs=self.max_num_seqs, queued_s=self.queued_s,
            preemptions=self.swaps + self.recomputes, age_s=age_s,
        )  # fmt: skip


ToEngine = SetPolicy | SetCosts | SetShares
"""What the engine accepts."""

ToServer = EngineTotals | CostSamples | ServiceReport
"""What the engine sends."""

_encoder = msgspec.json.Encoder()
_to_engine = msgspec.json.Decoder(ToEngine)
_to_server = msgspec.json.Decoder(ToServer)


def encode(message: ToEngine | ToServer) -> bytes:
    """Return the message as JSON."""
    data = _encoder.encode(message)
    assert len(data) <= MAX_MESSAGE_BYTES, f"a {type(message).__name__} of {len(data)} bytes"
    return data


def decode_to_engine(data: bytes) -> ToEngine:
    """Parse what a server sent.

    Raises:
        ValueError: Not a message that an engine accepts (`msgspec.DecodeError` is one), or too large.
    """
    _check_size(data)
    return _decode(_to_engine, data)


def decode_to_server(data: bytes) -> ToServer:
    """Parse what an engine sent.

    Raises:
        ValueError: Nothing that an engine sends (`msgspec.DecodeError` is one), or too large.
    """
    _check_size(data)
    return _decode(_to_server, data)


def _decode(decoder: msgspec.json.Decoder[T], data: bytes) -> T:
    try:
        return decoder.decode(data)
    except RecursionError:  # what stands before the tag is skipped, however deep
        raise ValueError("A message is nested too deeply.") from None


def _check_size(data: bytes) -> None:
    if len(data) > MAX_MESSAGE_BYTES:
        raise ValueError(f"A message of {len(data)} bytes is too large; the limit is {MAX_MESSAGE_BYTES}.")

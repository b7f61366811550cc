"""A log of preemption decisions with all that went into them, and their replay.

Rules:
- A line is one JSON value: the costs in force, where they changed, or a choice. No prompt, no token, no key is in it.
- The file belongs to its owner alone (mode 0600) and is bounded: beyond `MAX_BYTES` choices are counted and not written.
- Policies are pure, so that the same candidates, pressure and costs must give the same decisions again, to the last bit.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from cost_service.snapshot import CostSnapshot
from replicas.config import PreemptionPolicy
from replicas.preemption import PreemptionDecision, policy_of
from replicas.preemption_cost import Candidate, Pressure

MAX_BYTES = 1 << 30


class Costs(msgspec.Struct, frozen=True, tag="costs", forbid_unknown_fields=True):
    """The cost snapshot of all choices that follow."""

    snapshot: CostSnapshot


class Choice(msgspec.Struct, frozen=True, kw_only=True, tag="choice", forbid_unknown_fields=True):
    """What a policy was asked, and what it answered."""

    policy: PreemptionPolicy
    """The one that decided: `recompute` while the guard was active."""

    candidates: list[Candidate]
    pressure: Pressure
    decisions: list[PreemptionDecision]


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    """What a replay found."""

    num_choices: int
    num_decisions: int
    differing_lines: list[int]
    """Numbers of the lines, from 1 on, whose decisions were not reproduced."""


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Costs | Choice)


class DecisionLog:
    """Writes one engine's choices to a new file in a folder."""

    def __init__(self, folder: Path, name: str) -> None:
        """Create the folder, if it is not there, and the file.

        Raises:
            ValueError: They cannot be created, or the file exists.
        """
        self.path = folder / f"decisions-{name}.jsonl"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = os.fdopen(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
        except OSError as error:
            raise ValueError(
                f"decision_log_folder must be a folder that can be written to: {error.strerror}."
            ) from None
        self._costs: CostSnapshot | None = None
        self._num_bytes = 0
        self.num_dropped = 0

    def write(
        self,
        policy: PreemptionPolicy,
        candidates: Sequence[Candidate],
        pressure: Pressure,
        costs: CostSnapshot,
        decisions: Sequence[PreemptionDecision],
    ) -> None:
        """Take note of a choice."""
        lines = [] if costs == self._costs else [_encoder.encode(Costs(costs))]
        choice = Choice(policy=policy, candidates=list(candidates), pressure=pressure, decisions=list(decisions))
        lines.append(_encoder.encode(choice))
        data = b"".join(line + b"\n" for line in lines)
        if self._num_bytes + len(data) > MAX_BYTES:
            self.num_dropped += 1
            return
        self._costs = costs
        self._num_bytes += len(data)
        self._file.write(data)
        self._file.flush()

    def close(self) -> None:
        """Close the file; nothing may be written after that."""
        self._file.close()


def replay(lines: Iterable[bytes]) -> Replay:
    """Let the policies decide again.

    Raises:
        ValueError: A line is not one of a decision log, or the first one is a choice.
    """
    costs: CostSnapshot | None = None
    num_choices, num_decisions, differing = 0, 0, []
    for number, line in enumerate(lines, start=1):
        try:
            entry = _decoder.decode(line)
        except msgspec.DecodeError as error:
            raise ValueError(f"Line {number} must be one of a decision log: {error}") from None
        if isinstance(entry, Costs):
            costs = entry.snapshot
            continue
        if costs is None:
            raise ValueError(f"Line {number} must come after costs: the beginning of the log is missing.")
        num_choices += 1
        num_decisions += len(entry.decisions)
        if policy_of(entry.policy).choose(entry.candidates, entry.pressure, costs) != entry.decisions:
            differing.append(number)
    return Replay(num_choices=num_choices, num_decisions=num_decisions, differing_lines=differing)

"""The shared cost service: learns the costs of every kind of replica from all of its replicas, and keeps the newest version.

Rules:
- A kind is (model, hardware, parallelism, tokens per block); what one kind measures never reaches another's snapshot.
- The last good version stays until a better one is there: a snapshot that cannot be made is said and left out.
- No Ray, no clock, no store: the actor around it (`cost_service.cost_actor`) says when to refit, and keeps its documents.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from cost_service.learner import CostLearner
from cost_service.samples import Sample
from cost_service.snapshot import CostSnapshot

logger = logging.getLogger(__name__)

ACTOR = "cost_service"
"""Name of the actor around this."""

KEY = "costs"
"""Collection of the store that holds the newest snapshot of each kind."""

REFIT_INTERVAL_S = 0.5
"""Seconds between two times that what was observed is learned."""

MAX_KINDS = 64

_samples = msgspec.json.Decoder(list[Sample])


class Kind(NamedTuple):
    """Replicas that share their costs."""

    model: str
    hardware: str
    parallelism: int
    block_size: int

    @classmethod
    def of(cls, costs: CostSnapshot) -> "Kind":
        """The kind that a snapshot is for."""
        return cls(costs.model, costs.hardware, costs.parallelism, costs.block_size)


class CostService:
    """Learners by kind. Its documents are those of `cost_service.keeper.Kept`."""

    collections = (KEY,)

    def __init__(self) -> None:
        """Begin with nothing."""
        self._learners: dict[Kind, CostLearner] = {}
        self._news: set[Kind] = set()
        self._saved: dict[Kind, int] = {}
        """Versions that are stored, or are not our own to store."""

        self.num_rejected = 0
        """Batches that were none."""

    def restore(self, documents: Mapping[str, Mapping[str, Any]]) -> None:
        """Take stored snapshots that are newer than what is known; a damaged one is said and left out."""
        for name, document in documents[KEY].items():
            try:
                snapshot = CostSnapshot.from_json(json.dumps(document))
            except ValueError as error:
                logger.warning("The stored costs of %s are left out: %s", name, error)
                continue
            kind = Kind.of(snapshot)
            known = self._learners.get(kind)
            if known is None or known.snapshot.version < snapshot.version:
                self._learners[kind] = CostLearner(snapshot)
                self._saved[kind] = snapshot.version

    def unsaved(self) -> Iterator[tuple[str, str, Any]]:
        """Snapshots that were learned since they were yielded last."""
        for kind, learner in self._learners.items():
            snapshot = learner.snapshot
            if self._saved.get(kind) != snapshot.version:
                self._saved[kind] = snapshot.version
                yield KEY, "/".join(map(str, kind)), json.loads(snapshot.to_json())

    def forget_saved(self) -> None:
        """Let all snapshots count as unsaved."""
        self._saved.clear()

    def observe(self, costs: str, samples: bytes) -> int:
        """Take note of what a replica has measured.

        Args:
            costs: The snapshot that it decides by; of a kind that is not known yet, what learning begins with.
            samples: A JSON list of `cost_service.samples`.

        Returns:
            Measurements that were taken; 0 for a batch that is none, which is counted.
        """
        try:
            snapshot, batch = CostSnapshot.from_json(costs), _samples.decode(samples)
        except (ValueError, RecursionError) as error:  # `msgspec.DecodeError` is a ValueError
            self.num_rejected += 1
            logger.warning("A batch of cost samples is left out: %s", error)
            return 0
        kind = Kind.of(snapshot)
        if not batch:
            return 0
        if kind not in self._learners:
            if len(self._learners) >= MAX_KINDS:
                self.num_rejected += 1
                logger.warning("Costs of %s are not learned: there are %d kinds of replicas already.", kind, MAX_KINDS)
                return 0
            self._learners[kind] = CostLearner(snapshot)
            self._saved[kind] = snapshot.version  # the replica's, until something is learned
        self._news.add(kind)
        return self._learners[kind].observe(batch)

    def refit(self) -> list[Kind]:
        """Learn from what arrived since the last call; return the kinds that have a new version."""
        changed = []
        news, self._news = self._news, set()
        for kind in sorted(news):
            learner = self._learners[kind]
            before = learner.snapshot.version
            if learner.refit().version > before:
                learner.check()
                changed.append(kind)
        return changed

    def snapshot(self, kind: Kind, since_version: int = -1) -> str | None:
        """Return the newest snapshot of a kind as JSON; None where there is none beyond that version."""
        learner = self._learners.get(kind)
        if learner is None or learner.snapshot.version <= since_version:
            return None
        return learner.snapshot.to_json()

    def predict(
        self, kind: Kind, *, num_tokens: int, num_cached_tokens: int = 0, num_blocks: int = 0
    ) -> dict[str, float]:
        """For people and tools: seconds of recomputing tokens behind cached ones, and of copying blocks out and in.

        Raises:
            ValueError: Nothing is known of such replicas.
        """
        learner = self._learners.get(kind)
        if learner is None:
            raise ValueError(f"Nothing is known of {kind}: known are {sorted(self._learners)}.")
        attention = float((num_tokens + num_cached_tokens) ** 2 - num_cached_tokens**2)
        return learner.predict(num_tokens=num_tokens, attention=attention, num_blocks=num_blocks)

    def status(self) -> Sequence[dict[str, Any]]:
        """Each kind with its version, samples and errors."""
        return [
            {
                **kind._asdict(),
                "version": learner.snapshot.version,
                "error_ratio": learner.error_ratios(),
                "rejected": learner.num_rejected,
                "changes": learner.num_changes,
            }
            for kind, learner in sorted(self._learners.items())
        ]

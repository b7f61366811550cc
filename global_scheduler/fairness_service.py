"""The fairness scheduler of the whole cluster: pools of replicas and tenants' weights.

Data flow: a replica's `FairnessReport` -> its pool -> a `FairnessAnswer`; ingresses tell weights; all of it is stored.

Rules:
- What is no report, or an impossible one, is refused, counted, and said once for each replica; nothing changes then.
- Pools are of one unit: replicas that count service otherwise are in a pool of their own.
- Replicas are asked for fewer reports where there would be more than `MAX_CALLS_PER_S`, or where answering them would take
  more than `MAX_BUSY` of the time.
- The last weight that was told of a tenant holds in every pool, also after a restart; tenants without one weigh 1.
- A stored document is its state as JSON text, for the order in it counts and a store may sort. A damaged one is said and
  left out: the pool then begins with what its replicas know. So it does where a replica reports before the store was read:
  what is read late is then older than what replicas know.
- No Ray, no clock, no store: the actor around it (`global_scheduler.fairness_actor`) says what time it is, and keeps its
  documents.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from cost_service.charges import ServiceKind, checked_weight
from cost_service.service_messages import FairnessReport
from global_scheduler.fairness_pool import FairnessPool, PoolFigures

logger = logging.getLogger(__name__)

POOLS, WEIGHTS, ALL = "fairness_pools", "fairness_weights", "all"
"""Collections of the store; the document of weights."""

INTERVAL_S = 0.1
MAX_CALLS_PER_S = 1000.0
"""Reports of all replicas together."""

MAX_BUSY = 0.5
COST_WEIGHT = 0.02
"""Of the last exchange in the mean of what they take."""

MAX_INTERVAL_S = 5.0
"""Well below what a replica may be silent for."""

MAX_POOLS = 64
MAX_REPORT_BYTES = 16 << 20
MAX_SAID = 1024
"""Replicas of which is remembered that a refusal was said."""

_reports = msgspec.msgpack.Decoder(FairnessReport)
_encoder = msgspec.msgpack.Encoder()


class PoolName(NamedTuple):
    """Which replicas are compared, and in what."""

    pool: str
    service: ServiceKind


class _StoredPool(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    schema: Literal[1]
    pool: str
    service: ServiceKind
    state: str
    """JSON of `FairnessPool.state`."""


class _StoredWeights(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    schema: Literal[1]
    weights: dict[str, Annotated[float, msgspec.Meta(gt=0)]]


class FairnessService:
    """All pools of a cluster. Its documents are those of `cost_service.keeper.Kept`."""

    collections = (WEIGHTS, POOLS)

    def __init__(self, *, life: str, now_s: float) -> None:
        """Begin with nothing.

        Args:
            life: A name that no other life of the scheduler has.
        """
        assert life, "a life without a name"
        self.life, self._now_s = life, now_s
        self._pools: dict[PoolName, FairnessPool] = {}
        self._weights: dict[str, float] = {}
        self._weights_changed = False
        self._is_told = False
        """Whether an ingress has told weights: it tells all that it knows."""

        self._saved: dict[PoolName, int] = {}
        self._said: dict[str, None] = {}
        self._cost_s = 0.0
        self.num_refused = 0
        """Reports that were none, or impossible, or of lives of engines that are over."""

    def restore(self, documents: Mapping[str, Mapping[str, Any]]) -> None:
        """Take stored weights and pools; those that somebody has told of since stay as they are."""
        self._restore_weights(documents[WEIGHTS].get(ALL))
        for name, document in documents[POOLS].items():
            try:
                if len(self._pools) >= MAX_POOLS:
                    raise ValueError(f"there are {MAX_POOLS} pools already")
                self._restore(document)
            except ValueError as error:
                logger.warning("The stored fairness of %s is left out: %s", name, error)

    @property
    def interval_s(self) -> float:
        """Seconds between two reports of a replica."""
        return interval_s(sum(pool.num_replicas for pool in self._pools.values()), cost_s=self._cost_s)

    def exchange(self, data: bytes, now_s: float) -> bytes:
        """Take a `FairnessReport` and return its `FairnessAnswer`.

        Raises:
            ValueError: It is none, or impossible; nothing has changed then.
        """
        told = None
        try:
            if len(data) > MAX_REPORT_BYTES:
                raise ValueError(f"A report of {len(data)} bytes is too large; the limit is {MAX_REPORT_BYTES}.")
            told = _decode(data)
            report = told.checked()
            pool = self._pool(PoolName(told.pool, told.service))
            answer = pool.exchange(told, report, life=self.life, now_s=now_s, interval_s=self.interval_s)
        except ValueError as error:  # `msgspec.DecodeError` and `OverError` are
            self._refuse(told.replica if told is not None else "", error)
            raise
        return _encoder.encode(answer)

    def took(self, seconds: float) -> None:
        """Take how much processor time an exchange took."""
        self._cost_s += COST_WEIGHT * (seconds - self._cost_s)

    def set_weights(self, weights: Mapping[str, float]) -> str:
        """Take tenants' weights; returns this life's name: another one has not heard them all.

        Raises:
            ValueError: A weight is out of range; none is taken then.
        """
        checked = {tenant: checked_weight(weight) for tenant, weight in weights.items()}
        self._is_told |= bool(checked)
        for tenant, weight in checked.items():
            if self._weights.get(tenant, 1.0) != weight:
                self._weights[tenant] = weight
                self._weights_changed = True
                for pool in self._pools.values():
                    pool.set_weight(tenant, weight)
        return self.life

    def tick(self, now_s: float) -> None:
        """Let go replicas that are silent, and state bounds anew; about once a second."""
        self._now_s = now_s
        for pool in self._pools.values():
            pool.tick(now_s)

    def unsaved(self) -> Iterator[tuple[str, str, Any]]:
        """Weights and pools that have changed since they were yielded last."""
        if self._weights_changed:
            self._weights_changed = False
            yield WEIGHTS, ALL, msgspec.to_builtins(_StoredWeights(schema=1, weights=dict(self._weights)))
        for name, pool in self._pools.items():
            version = pool.share.version
            if self._saved.get(name) != version:
                self._saved[name] = version
                state = msgspec.json.encode(pool.state()).decode()
                stored = _StoredPool(schema=1, pool=name.pool, service=name.service, state=state)
                yield POOLS, "/".join(name), msgspec.to_builtins(stored)

    def forget_saved(self) -> None:
        """Let all documents count as unsaved."""
        self._weights_changed = bool(self._weights)
        self._saved.clear()

    def figures(self) -> dict[str, PoolFigures]:
        """Figures by pool, for metrics."""
        return {"/".join(name): pool.figures() for name, pool in self._pools.items()}

    def status(self, max_tenants: int = 100) -> dict[str, Any]:
        """What people and tools want to know, as JSON values."""
        return {
            "life": self.life,
            "interval_s": self.interval_s,
            "refused": self.num_refused,
            "pools": {"/".join(name): pool.status(max_tenants) for name, pool in sorted(self._pools.items())},
        }

    def check(self) -> None:
        """Assert what always holds; O(n)."""
        assert len(self._pools) <= MAX_POOLS, f"{len(self._pools)} pools"
        for pool in self._pools.values():
            pool.check()

    def _pool(self, name: PoolName) -> FairnessPool:
        pool = self._pools.get(name)
        if pool is None:
            if len(self._pools) >= MAX_POOLS:
                self._drop_idle_pool()
            pool = self._pools[name] = self._new_pool(name)
        return pool

    def _new_pool(self, name: PoolName) -> FairnessPool:
        pool = FairnessPool(name.service)
        for tenant, weight in self._weights.items():
            pool.set_weight(tenant, weight)
        return pool

    def _drop_idle_pool(self) -> None:
        idle = [(pool.seen_s, name) for name, pool in self._pools.items() if pool.num_replicas == 0]
        if not idle:
            raise ValueError(f"There are {MAX_POOLS} pools with replicas already.")
        _, name = min(idle)
        logger.warning("Pool %s has had no replica for long and is forgotten.", "/".join(name))
        del self._pools[name]
        self._saved.pop(name, None)

    def _refuse(self, replica: str, error: ValueError) -> None:
        self.num_refused += 1
        if replica not in self._said and len(self._said) < MAX_SAID:
            self._said[replica] = None
            logger.warning("A report of replica %r is refused, and so may be later ones: %s", replica, error)

    def _restore(self, document: Any) -> None:
        stored = msgspec.convert(document, _StoredPool)
        name = PoolName(stored.pool, stored.service)
        if name in self._pools:
            raise ValueError("its replicas have reported already")
        pool = self._new_pool(name)
        pool.restore(msgspec.json.decode(stored.state), self._now_s)
        self._pools[name] = pool
        self._saved[name] = pool.share.version

    def _restore_weights(self, document: Any | None) -> None:
        if document is None or self._is_told:
            return
        try:
            stored = msgspec.convert(document, _StoredWeights)
            weights = {tenant: checked_weight(weight) for tenant, weight in stored.weights.items()}
        except ValueError as error:
            logger.warning("The stored weights are left out until ingresses tell them: %s", error)
            return
        self._weights = weights
        for pool in self._pools.values():
            for tenant, weight in weights.items():
                pool.set_weight(tenant, weight)


def interval_s(num_replicas: int, *, cost_s: float = 0.0) -> float:
    """Seconds between two reports of each of so many replicas, of which one costs the scheduler so much time."""
    return min(MAX_INTERVAL_S, max(INTERVAL_S, num_replicas * max(1.0 / MAX_CALLS_PER_S, cost_s / MAX_BUSY)))


def _decode(data: bytes) -> FairnessReport:
    try:
        return _reports.decode(data)
    except RecursionError:
        raise ValueError("A report is nested too deep.") from None

"""What the replicas of a simulated cluster are like, and the engines that run there."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cluster.bench_arm import OFFLOAD, STOCK
from cluster.simulated_engine import SimulatedEngine
from cluster.simulated_fairness import FairWaiting
from cluster.simulated_offload import SimulatedOffload
from cluster.simulated_preemption import SimulatedCosts, SimulatedPreemption
from cluster.simulated_queue import FirstCome, WaitingQueue
from cluster.simulated_request import SimulatedRequest
from cluster.simulated_step import SimulatedSettings
from cluster.simulated_swaps import SimulatedSwaps
from cluster.simulated_time import StepTimes
from cost_service.snapshot import CostSnapshot
from replicas.admission import RequestAdmission
from replicas.config import PreemptionPolicy, SwapConfig
from replicas.fair_queue import Admission
from replicas.guard import GuardSettings
from replicas.preemptor import Preemptor
from replicas.throttled_link import LinkSettings, ThrottledLink

FIRST_COME = Admission.FIRST_COME.value
LOCAL = "local"
"""Fair by the counters of each replica alone: no replica hears of the others."""
ADMISSIONS = (*(admission.value for admission in Admission), LOCAL)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaKind:
    """What all replicas have in common."""

    settings: SimulatedSettings
    times: StepTimes
    """What steps really take."""

    costs: CostSnapshot
    """What copies really take, and what preemptions are priced with."""

    block_bytes: int
    policy: str = STOCK
    """vLLM's own preemption without or with its own offloading, or a `PreemptionPolicy`."""

    admission: str = FIRST_COME
    weights: Mapping[str, float] = field(default_factory=dict)
    """Of tenants, for fair admission; 1 for others."""

    host_bytes: int = 0
    """Host memory of one replica."""

    link: LinkSettings | None = None
    """Of one host, beside the engines; None: engines copy by themselves, and wait."""

    replicas_per_host: int = 1
    offload_prompt_only: bool = False
    """Whether vLLM's offloading leaves out generated tokens, as by default; what is preempted gains nothing then."""

    guard: bool = True
    learn: bool = False
    """Whether costs are learned from what replicas measure, all together; else they stay as they are."""

    def __post_init__(self) -> None:
        known = (STOCK, OFFLOAD, *PreemptionPolicy)
        if self.policy not in known:
            raise ValueError(f"policy must be one of {', '.join(known)}: it is {self.policy!r}.")
        if self.admission not in ADMISSIONS:
            raise ValueError(f"admission must be one of {', '.join(ADMISSIONS)}: it is {self.admission!r}.")
        if self.policy == OFFLOAD and (self.admission != FIRST_COME or self.link is None):
            raise ValueError(
                f"{OFFLOAD} is vLLM's own: it needs a GPU's link to host memory, and admission {FIRST_COME}."
            )
        if self.replicas_per_host < 1 or self.host_bytes < 0:
            raise ValueError("replicas_per_host must be at least 1, and host_bytes not negative.")

    @property
    def is_fair(self) -> bool:
        """Whether tenants are told apart."""
        return self.admission != FIRST_COME


class Replica:
    """One place in the cluster, and the engine that runs there now."""

    def __init__(self, number: int, engine: SimulatedEngine) -> None:
        self.number, self.engine = number, engine
        self.epoch = 0
        self.up = True
        self.draining = False
        """Whether it gets no new requests, for it is scaled away; it is gone when it is not up either."""
        self.awaited_s = math.inf
        """Of the engine's next step, in the heap of events."""
        self.requests: dict[SimulatedRequest, None] = {}


class ReplicaBuilder:
    """Builds engines of one kind; those of a host share its link."""

    def __init__(self, kind: ReplicaKind) -> None:
        self.kind = kind
        self._costs = SimulatedCosts(kind.costs) if kind.learn else None
        self._links: dict[int, ThrottledLink] = {}

    def __call__(self, number: int) -> SimulatedEngine:
        """Return a fresh engine for a replica."""
        kind = self.kind
        waiting: WaitingQueue = FirstCome()
        if kind.is_fair:
            waiting = FairWaiting(RequestAdmission(), kind.costs, weights=kind.weights)
        if kind.policy == STOCK:
            preemption = None
            if kind.is_fair:  # our scheduler without a connector, which learns how long steps take
                preemption = SimulatedPreemption(Preemptor(PreemptionPolicy.RECOMPUTE, kind.costs), None)
            return SimulatedEngine(kind.settings, kind.times, waiting=waiting, preemption=preemption)
        link = None
        if kind.link is not None:
            link = self._links.setdefault(number // kind.replicas_per_host, ThrottledLink(kind.link))
        if kind.policy == OFFLOAD:
            assert link is not None, "vLLM's offloading without a link"
            return SimulatedEngine(kind.settings, kind.times, preemption=self._offload(link))
        policy = PreemptionPolicy(kind.policy)
        swaps = SimulatedSwaps(
            SwapConfig(preemption=policy, host_pool_bytes=kind.host_bytes), kind.costs, block_bytes=kind.block_bytes,
            num_pool_blocks=kind.settings.num_blocks, host_link=link,
        )  # fmt: skip
        preemptor = Preemptor(
            policy, kind.costs, meter=swaps.scheduling.meter, guard=GuardSettings() if kind.guard else None
        )
        return SimulatedEngine(
            kind.settings, kind.times, waiting=waiting, preemption=SimulatedPreemption(preemptor, swaps, self._costs)
        )

    def _offload(self, link: ThrottledLink) -> SimulatedOffload:
        kind = self.kind
        return SimulatedOffload(
            num_host_blocks=kind.host_bytes // kind.block_bytes, block_size=kind.settings.block_size,
            block_bytes=kind.block_bytes, link=link, caching=kind.settings.enable_prefix_caching,
            prompt_only=kind.offload_prompt_only,
        )  # fmt: skip


def ample(kind: ReplicaKind) -> ReplicaKind:
    """The same with vLLM's own preemption and more KV blocks than anybody needs."""
    settings = kind.settings
    most = settings.max_num_seqs * -(-settings.max_model_len // settings.block_size)
    return replace(kind, policy=STOCK, admission=FIRST_COME, settings=replace(settings, num_blocks=1 + most))

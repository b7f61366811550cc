"""What tenants are given in a simulated cluster and who waits, seen from outside: the stated bound, checked at every event.

Rules:
- It sees requests that arrive, run, give way and end, and their tokens; no counter of any policy. So it judges all policies
  alike.
- A tenant waits while any of its requests, preempted ones included, is anywhere and does not run.
- A prompt is service when its request first runs, without what a prefix cache held; each output token when it is delivered.
  What is computed again is nobody's. What a crashed replica gave was given: who is served anew is served twice.
- A step's service comes before its changes of who waits: who is admitted with its last waiting request is still compared.
- Shares count what was given while all tenants waited, from a time on.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from cluster.simulated_request import SimulatedRequest
from cluster.simulated_step import SimulatedSettings
from cluster.simulated_time import StepTimes
from cost_service.charges import Served, ServiceUnit
from cost_service.service_messages import ReplicaLimits
from global_scheduler.bound import FairnessBound, fairness_bound
from global_scheduler.fairness_checker import FairnessChecker

UNIT = ServiceUnit()


@dataclass(frozen=True, slots=True, kw_only=True)
class FairnessFigures:
    """What the watch has seen."""

    max_service_gap: float
    """Of the two tenants who strayed most: their normalised services ranged over no more while both waited."""

    bound: float
    """Of the same two."""

    gap_over_bound: float
    worst_stray: float
    """The largest lead's range as a share of what one tenant may be ahead; above 1 the bound is broken."""

    broken: bool
    shares: Mapping[str, float]
    """Of the service while all tenants waited; empty if they never did."""

    service_per_s: float
    """Weighted tokens that all tenants were given in a second."""

    output_tokens_per_s: float


class FairnessWatch:
    """One run, watched."""

    def __init__(
        self, bound: FairnessBound, *, weights: Mapping[str, float], groups: Mapping[str, str] | None = None,
        shares_from_s: float = 0.0,
    ) -> None:  # fmt: skip
        """Begin with nobody.

        Args:
            weights: Of all tenants that will come.
            groups: Whom a tenant is compared with, where the replicas that it may use hold it back; else with all.
            shares_from_s: When shares begin to count.
        """
        self.checker = FairnessChecker(bound)
        self._num_tenants, self._shares_from_s = len(weights), shares_from_s
        for tenant, weight in weights.items():
            self.checker.set_weight(tenant, weight)
        for tenant, group in (groups or {}).items():
            self.checker.set_group(tenant, group)
        self.given: dict[str, Served] = dict.fromkeys(weights, Served())
        """What every tenant was given."""
        self._shared: Counter[str] = Counter()
        self._num_waiting: Counter[str] = Counter()
        self._running: dict[int, dict[SimulatedRequest, None]] = {}
        self._counted: dict[SimulatedRequest, int] = {}
        """Output tokens of requests that have run and are not over."""

    def arrived(self, tenant: str) -> None:
        """A request has come."""
        self._wait(tenant, 1)

    def gone(self, request: SimulatedRequest) -> None:
        """A request is over without having run in its engine's last step."""
        self._wait(request.tenant, -1)

    def stepped(
        self, replica: int, running: Iterable[SimulatedRequest], over: Sequence[SimulatedRequest], now_s: float
    ) -> None:  # fmt: skip
        """A replica's step has ended and its next one has begun.

        Args:
            running: Those of the new step, settled.
            over: Those who are finished, or whose clients have left.
        """
        before, now = self._running.get(replica, {}), dict.fromkeys(running)
        counted, outputs = self._counted, dict[str, int]()
        for request in before:
            if (num := request.num_output - counted[request]) > 0:
                counted[request] += num
                outputs[request.tenant] = outputs.get(request.tenant, 0) + num
        given = {tenant: Served(num_output_tokens=num) for tenant, num in outputs.items()}
        changes: Counter[str] = Counter()
        for request in now.keys() - before.keys():
            changes[request.tenant] -= 1
            if request not in self._counted:
                self._counted[request] = 0
                num_new = request.prompt_tokens - request.num_computed
                _add(given, request.tenant, Served(num_new, request.num_computed))
        for request in before.keys() - now.keys():
            changes[request.tenant] += 1
        for request in over:
            changes[request.tenant] -= 1
            self._counted.pop(request, None)
        self._running[replica] = now
        all_wait = now_s >= self._shares_from_s and len(+self._num_waiting) == self._num_tenants
        for tenant in sorted(given):
            self._serve(tenant, given[tenant], all_wait=all_wait)
        for tenant in sorted(changes):
            self._wait(tenant, changes[tenant])

    def crashed(self, replica: int, lost: Collection[SimulatedRequest]) -> None:
        """A replica is gone; all of its requests wait again."""
        for request in self._running.pop(replica, {}):
            self._wait(request.tenant, 1)
        for request in lost:
            self._counted.pop(request, None)

    def figures(self, seconds: float) -> FairnessFigures:
        """What was seen until now, in so many seconds."""
        self.checker.gap()
        worst, total = self.checker.worst, self._shared.total()
        sums = Served()
        for served in self.given.values():
            sums = sums.plus(served)
        return FairnessFigures(
            max_service_gap=worst.gap, bound=worst.bound, gap_over_bound=worst.ratio, worst_stray=worst.stray,
            broken=self.checker.broken,
            shares={tenant: self._shared[tenant] / total for tenant in self.given} if total else {},
            service_per_s=UNIT.service(sums) / seconds, output_tokens_per_s=sums.num_output_tokens / seconds,
        )  # fmt: skip

    def check(self, num_here: Mapping[str, int]) -> None:
        """Assert that those who wait and run are those who are here, by tenant."""
        running = Counter(request.tenant for each in self._running.values() for request in each)
        for tenant, num in num_here.items():
            seen = self._num_waiting[tenant] + running[tenant]
            assert seen == num, f"{num} requests of {tenant!r}, {seen} of them seen"

    def _serve(self, tenant: str, served: Served, *, all_wait: bool) -> None:
        service = UNIT.service(served)
        self.given[tenant] = self.given.get(tenant, Served()).plus(served)
        self.checker.serve(tenant, service)
        if all_wait:
            self._shared[tenant] += service  # type: ignore[assignment]

    def _wait(self, tenant: str, by: int) -> None:
        self._num_waiting[tenant] = num = self._num_waiting[tenant] + by
        assert num >= 0, f"{num} requests of {tenant!r} wait"
        self.checker.set_waiting(tenant, num > 0)


def _add(sums: dict[str, Served], tenant: str, served: Served) -> None:
    sums[tenant] = sums.get(tenant, Served()).plus(served)


def bound_of(
    settings: SimulatedSettings, times: StepTimes, *, num_replicas: int, lengths: Collection[tuple[int, int]],
    interval_s: float, round_trip_s: float, away_s: float = 0.0, absent_s: float = 0.0, granted_service: float = 0.0,
) -> FairnessBound:  # fmt: skip
    """The stated bound of such replicas, with pool tokens as M.

    Args:
        num_replicas: Most of them at any time.
        lengths: Prompt and output tokens of the requests.
        interval_s: Between two reports of a replica.
        round_trip_s: From a report to its answer.
        away_s: For how long the scheduler is away.
        absent_s: Until a replica hears of who is absent there, beyond the interval.
        granted_service: What a tenant may be ahead by and still pass a request that does not fit.
    """
    shortest = min(prompt for prompt, _ in lengths)
    limits = ReplicaLimits(
        num_pool_tokens=(settings.num_blocks - 1) * settings.block_size, max_num_seqs=settings.max_num_seqs,
        max_tokens=max(output for _, output in lengths),
        max_service_per_s=_most_service_per_s(settings, times, shortest),
        max_decode_tokens_per_s=settings.max_num_seqs / times.step_s(settings.max_num_seqs, settings.max_num_seqs),
    )  # fmt: skip
    return fairness_bound(
        [limits] * num_replicas, max_input_tokens=max(prompt for prompt, _ in lengths), interval_s=interval_s,
        round_trip_s=round_trip_s, away_s=away_s, absent_s=absent_s,
        num_granted_tokens=granted_service / UNIT.output_weight,
    )  # fmt: skip


def _most_service_per_s(settings: SimulatedSettings, times: StepTimes, shortest_prompt: int) -> float:
    """Of the fastest steps: any numbers of decodes and of the shortest prompts, in powers of two, that fit memory."""
    num_fit = (settings.num_blocks - 1) // -(-(shortest_prompt + 1) // settings.block_size)
    num_seqs, num_tokens = min(settings.max_num_seqs, max(1, num_fit)), settings.max_num_batched_tokens
    most = 0.0
    for num_decodes in _powers(num_seqs):
        for num_prompts in _powers(min(num_seqs - num_decodes, (num_tokens - num_decodes) // shortest_prompt)):
            if num_decodes + num_prompts:
                seconds = times.step_s(num_decodes, num_decodes, [(0, shortest_prompt)] * num_prompts)
                service = 2.0 * num_decodes + (1.0 + 2.0 / shortest_prompt) * num_prompts * shortest_prompt
                most = max(most, service / seconds)
    return most


def _powers(most: int) -> list[int]:
    """0, the powers of two up to a number, and that number."""
    return sorted({0, most, *(1 << place for place in range(most.bit_length()) if 1 << place <= most)})

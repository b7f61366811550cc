"""`python -m cluster bench --serve URL`: policies and clusters against each other over HTTP, on what is running already.

Rules:
- The same requests for every arm, in interleaved repeats, as `bench` has them; in other words each time, so that no run
  finds its prompts in a prefix cache. An arm is a running cluster, or one that is told to follow another policy before.
- Service times alone come from the first cluster that is named: single requests, in the same benchmark.
- What a client cannot see is asked of the replicas where their Ray cluster can be joined, and is nothing where it cannot.
- The cluster follows its own policy again at the end.
"""

import argparse
import asyncio
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from cluster import keys, policy, status
from cluster.bench_command import command_line, machine_facts
from cluster.bench_figures import INTERVAL, Calibration, Figures, figures, ratios_to_stock
from cluster.bench_keys import IN_FORCE_S, made_tenants, read_keys
from cluster.bench_progress import Progress
from cluster.bench_runs import Say, calibrate, full_repeats, in_turns, runs_of
from cluster.config import load
from cluster.prompts import RequestSpec, with_other_tokens
from cluster.records import RequestRecord
from cluster.running import connected
from cluster.served_client import FAILED, REJECTED, Endpoint, ServedRun, drive, find_endpoint
from cluster.served_plan import ServedArm, ServedPlan, arms_of, plan_of
from cluster.stores import check_store, open_store
from cluster.tenant_registry import TenantRegistry
from cluster.workload import Workload

WARM_UP_REQUESTS = 32
IDLE_TIMEOUT_S, SETTLE_S = 30.0, 0.2
LATE_S = 0.1
"""Delay of the client itself that is worth a word."""


def run(
    options: argparse.Namespace, workload: Workload, say: Say, progress_of: Callable[[ServedPlan], Progress]
) -> dict[str, Any]:
    """Measure everything that is not done yet; return the report.

    Args:
        progress_of: Is asked once the plan is known.

    Raises:
        ValueError: An option is wrong, or a server does not take the requests.
        RuntimeError: A single request was not served, or a replica did not take a policy.
        OSError: A file or the store cannot be used.
    """
    arms = arms_of(options)
    seeds = [workload.seed + (repeat if options.vary_seed else 0) for repeat in range(options.repeats)]
    tenants = sorted({request.tenant for seed in set(seeds) for request in replace(workload, seed=seed).requests()})
    with ExitStack() as stack:
        if address := options.address or (
            "auto" if any(arm != ServedArm(url=arm.url) for arm in arms.values()) else None
        ):
            stack.enter_context(_joined(address))
        own_keys = stack.enter_context(_keys(options, tenants, workload.weights(), say))
        urls = dict.fromkeys(arm.url for arm in arms.values())
        endpoints = {url: asyncio.run(find_endpoint(url, own_keys)) for url in urls}
        plan = plan_of(options, arms, workload, seeds, endpoints)
        progress = progress_of(plan)
        asked = address is not None and len(endpoints) == 1  # replicas do not say behind which URL they are
        bench = _Bench(plan=plan, endpoints=endpoints, keys=own_keys, asked=asked)
        return bench.measure(say, progress)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bench:
    """A plan, and what it is carried out with."""

    plan: ServedPlan
    endpoints: Mapping[str, Endpoint]
    keys: Mapping[str, str]
    asked: bool
    """Whether the replicas can be asked how they are."""

    def measure(self, say: Say, progress: Progress) -> dict[str, Any]:
        plan, names = self.plan, tuple(self.plan.arms)
        machine, repeats = machine_facts(), len(plan.workloads)
        alone = progress.part("alone", lambda: self._alone(say))
        try:
            with self._own_policy_again():
                if full_repeats(names, repeats, progress) < repeats:
                    for name in names:
                        say(f"Warming up {name} ...")
                        self._run(plan.workloads[0][:WARM_UP_REQUESTS], name)
                in_turns(names, repeats, lambda repeat, arm: self._run(plan.workloads[repeat], arm), say, progress)
        except KeyboardInterrupt:
            if not full_repeats(names, repeats, progress):
                raise
        done = full_repeats(names, repeats, progress)
        runs = {arm: list(map(ServedRun.of, of)) for arm, of in runs_of(names, done, progress).items()}
        calibration = Calibration(**alone["calibration"])
        report = _report(plan, machine, calibration, alone["check"], runs)
        if late_s := max(
            (run.latest_send_s for of in runs.values() for run in of if run.latest_send_s > LATE_S), default=0
        ):
            say(f"The client itself was up to {late_s:.2f} s late with a request: lower --rate, or run it elsewhere.")
        return report | ({} if done == repeats else {"partial": True, "partial_repeats": done})

    def _alone(self, say: Say) -> dict[str, Any]:
        first = next(iter(self.plan.arms))
        say(f"Calibrating with single requests to {first} ...")

        def alone(request: RequestSpec) -> RequestRecord:
            (record,) = self._drive([request], self.plan.arms[first].url).records
            if record.finish_s is None:
                raise RuntimeError("A request that was alone was not served: see the server's log.")
            return record

        calibration, check = calibrate(self.plan.workloads[0], alone)
        say(f"  median error on {check['requests']} other requests: {100 * check['median_error']:.1f} %")
        return {"calibration": asdict(calibration), "check": check}

    def _run(self, requests: Sequence[RequestSpec], name: str) -> dict[str, Any]:
        arm = self.plan.arms[name]
        self._wait_until_idle()
        if arm.preemption or arm.admission:
            _follow(arm.preemption, arm.admission)
        before = self._totals()
        result = self._drive(requests, arm.url)
        self._wait_until_idle()
        return asdict(replace(result, preempted=counted(before, self._totals())))

    def _drive(self, requests: Sequence[RequestSpec], url: str) -> ServedRun:
        others = with_other_tokens(requests, self.plan.vocab, random.SystemRandom())
        return asyncio.run(drive(self.endpoints[url], self.keys, others, limit_s=self.plan.limit_s))

    def _wait_until_idle(self) -> None:
        """Let replicas end what their clients have left: until they say so, or for a moment."""
        deadline_s = time.monotonic() + IDLE_TIMEOUT_S
        time.sleep(SETTLE_S)
        while any(one["num_running"] + one["num_waiting"] for one in self._totals()) and time.monotonic() < deadline_s:
            time.sleep(SETTLE_S)

    def _totals(self) -> list[dict[str, Any]]:
        """What the replicas' engines last reported; empty where none can be asked."""
        if not self.asked:
            return []
        try:
            return [one["totals"] for one in status.fetch().values() if one["totals"]]
        except LookupError:
            return []

    @contextmanager
    def _own_policy_again(self) -> Iterator[None]:
        before = next(iter(self._totals()), {})
        try:
            yield
        finally:
            if any(arm.preemption for arm in self.plan.arms.values()) and before.get("preemption"):
                _follow(before["preemption"], None)
            if any(arm.admission for arm in self.plan.arms.values()) and before.get("admission"):
                _follow(None, before["admission"])


def _report(
    plan: ServedPlan,
    machine: dict[str, Any],
    calibration: Calibration,
    check: dict[str, float],
    runs: Mapping[str, Sequence[ServedRun]],
) -> dict[str, Any]:
    weights = plan.workload.weights()
    by_arm = {
        name: [figures(run.records, calibration, run_end_s=run.run_end_s, weights=weights) for run in of]
        for name, of in runs.items()
    }
    return {
        "benchmark": "served",
        "machine": machine | {"load_average_at_end": os.getloadavg()[0]},
        "settings": plan.as_report(),
        "calibration": asdict(calibration) | {"check": check},
        "interval": INTERVAL,
        "command": command_line(),
        "arms": {
            name: {"repeats": [_repeat(one, run) for one, run in zip(by_arm[name], of, strict=True)]}
            for name, of in runs.items()
        },
        "ratio_to_stock": ratios_to_stock(by_arm, plan.stock_arm),
    }  # fmt: skip


def _repeat(one: Figures, run: ServedRun) -> dict[str, Any]:
    """A repeat as it stands in the result: what a client cannot know is none, what only it knows is beside."""
    told: dict[str, Any] = asdict(one)
    unknown = dict.fromkeys(("preemptions", "swaps", "recomputes"))
    for tenant, of in told["tenants"].items():
        of |= unknown | {name: run.outcomes[tenant][name] for name in (REJECTED, FAILED)}
    counted = run.preempted and {"preemptions": sum(run.preempted.values()), **run.preempted}
    num_tokens = sum(record.delivered_tokens for record in run.records)
    return told | (counted or unknown) | {
        name: sum(of[name] for of in run.outcomes.values()) for name in (REJECTED, FAILED)
    } | {
        "run_end_s": run.run_end_s, "latest_send_s": run.latest_send_s, "client_cpu_s": run.client_cpu_s,
        "client_cpu_us_per_token": 1e6 * run.client_cpu_s / num_tokens if num_tokens else None,
        "records": [asdict(record) for record in run.records],
    }  # fmt: skip


def counted(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> dict[str, int] | None:
    """Swaps and recomputations between two looks; None where nobody was asked, or an engine has started anew."""
    if not before or {one["epoch"] for one in before} != {one["epoch"] for one in after}:
        return None
    return {
        name: sum(one[name] for one in after) - sum(one[name] for one in before) for name in ("swaps", "recomputes")
    }


def _follow(preemption: str | None, admission: str | None) -> None:
    try:
        answers = policy.switch(preemption, admission)
    except LookupError as error:
        raise RuntimeError(f"The policy cannot be switched: {error}") from None
    if not all(answer["taken"] for answer in answers):
        raise RuntimeError("A replica did not take the policy: its engine does not answer.")


@contextmanager
def _joined(address: str) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(connected(address))
        except LookupError as error:
            raise ValueError(f"--serve: {error}") from None
        yield


@contextmanager
def _keys(
    options: argparse.Namespace, tenants: Sequence[str], weights: Mapping[str, float], say: Say
) -> Iterator[dict[str, str]]:
    if not options.make_tenants:
        yield dict.fromkeys(tenants, options.key) if options.key else read_keys(options.keys, tenants)
        return
    state = load(options.config).args.state
    check_store(state)
    registry = TenantRegistry(open_store(state), keys.load(state.path).to_mapping())
    with made_tenants(registry, tenants, weights) as made:
        say(f"Made {len(made)} tenants, and waiting {IN_FORCE_S:g} s until they are known ...")
        time.sleep(IN_FORCE_S)
        yield made

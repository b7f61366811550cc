"""`python -m cluster validate --arena DIR`: fair admission in the simulator against runs of the VTC artifact.

Method: the artifact ran S-LoRA (Llama-2-7B, A10G) once per policy over one trace of 27 tenants, and recorded when each
request had its first token and its end. What steps take is found from the first-come run alone; the other policies are
judged: mean latencies, and which policy is ahead of which.

Rules:
- The engine is S-LoRA's: tokens are reserved (`simulated_reservation`), nobody is preempted, there is no prefix cache,
  prefills are whole, and its router admits again after ten tokens.
- `VTC` is the product's own order and counters, without response ratios within a tenant: all services are predicted alike.
  `LCF` is the same without lifts.
- Pool and batch are the artifact's own options; nothing of them is fitted.

Source: github.com/Ying1123/VTC-artifact (`slora/server/router/`, `fair_bench/launch_server.py`).
"""

import csv
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from cluster.records import RequestRecord
from cluster.routing import RoundRobin
from cluster.simulated_engine import SimulatedEngine
from cluster.simulated_fairness import FairWaiting
from cluster.simulated_queue import FirstCome, WaitingQueue
from cluster.simulated_step import SimulatedSettings
from cluster.simulated_time import LinearTimes
from cluster.simulation import Simulation
from cost_service.charges import Account
from cost_service.snapshot import CostSnapshot
from cost_service.traces import TraceRequest
from replicas.admission import AdmissionSettings, RequestAdmission
from replicas.fair_queue import FairQueue
from replicas.tenant_service import TenantService

FILE = "real_trace_measured_by_policy.csv"
FIRST_COME, LEAST_SERVED, FAIR = "FCFS", "LCF", "VTC"
POLICIES = (FIRST_COME, LEAST_SERVED, FAIR)
ASKED = 0.15
POOL_TOKENS = 10_000
MAX_TOKENS = 3072
"""Of a request, and of the prompts that are computed at once."""

SETTINGS = SimulatedSettings(
    num_blocks=POOL_TOKENS, block_size=1, max_num_seqs=1000, max_num_batched_tokens=MAX_TOKENS,
    max_model_len=MAX_TOKENS, enable_prefix_caching=False, enable_chunked_prefill=False, reserve_output=True,
    steps_between_admissions=10,
)  # fmt: skip
"""Its pool must never be full to the last token: that one is vLLM's null block."""

ALIKE = CostSnapshot(
    version=1, model="", hardware="", parallelism=1, block_size=1, recompute_fixed_s=1.0, ridge_tokens=0.0, token_s=0.0,
    attention_s=0.0, swap_fixed_s=0.0, out_block_s=0.0, in_block_s=0.0,
)  # fmt: skip
"""Predicts the same service time for all, so that who comes first in a tenant goes first."""

SAME_STEP_S = 5e-3
"""First tokens at most so far apart are of one prefill: a step takes longer."""


class WithoutLift(TenantService):
    """Service as the artifact's LCF counts it: who comes back keeps all that it has not used."""

    def arrives(self, account: Account, request_id: str = "") -> None:
        """See `TenantService`; nobody is ever said to have come back."""
        self._taken.add(request_id)
        super().arrives(account, request_id)


def of_arena(folder: Path) -> dict[str, Any]:
    """Simulate the recorded policies, and compare mean latencies and their order.

    Raises:
        ValueError: The folder holds no such record.
    """
    records = read_arena(folder)
    times = calibrated(records[FIRST_COME])
    runs: dict[str, dict[str, Any]] = {}
    for policy in POLICIES:
        ours, theirs = latencies(simulated(policy, records[FIRST_COME], times)), latencies(records[policy])
        runs[policy] = {
            name: {
                "simulated": ours[name], "measured": theirs[name], "asked": ASKED,
                "error": ours[name] / theirs[name] - 1.0,
                "reached": abs(ours[name] - theirs[name]) <= ASKED * theirs[name],
            }
            for name in ours
        }  # fmt: skip
    return {
        "benchmark": "validation",
        "what": f"seconds of a request; steps found from {FIRST_COME} alone",
        "steps": {name: float(getattr(times, name)) for name in STEP_TERMS},
        "runs": runs,
        "order": order(runs, "latency_s_mean"),
    }


def order(runs: dict[str, dict[str, Any]], figure: str) -> dict[str, Any]:
    """Who is ahead of whom in a figure, as simulated and as measured, by how much, and whether that is the same."""
    pairs = []
    for one, other in combinations(runs, 2):
        ours, theirs = (
            runs[one][figure][whose] / runs[other][figure][whose] - 1.0 for whose in ("simulated", "measured")
        )
        pairs.append(
            {"pair": f"{one} / {other}", "simulated": ours, "measured": theirs, "same": (ours < 0) == (theirs < 0)}
        )
    return {"figure": figure, "pairs": pairs, "same": all(pair["same"] for pair in pairs)}


def read_arena(folder: Path) -> dict[str, list[RequestRecord]]:
    """Read the recorded runs of the policies that are judged.

    Raises:
        ValueError: A column or policy is missing, or a value is none.
        OSError: The file cannot be read.
    """
    runs: dict[str, list[RequestRecord]] = defaultdict(list)
    path = folder / FILE
    with path.open(newline="") as file:
        try:
            for row in csv.DictReader(file):
                if row["policy"] not in POLICIES:
                    continue
                arrival_s, num_output = float(row["req_time_s"]), int(row["output_len"])
                runs[row["policy"]].append(
                    RequestRecord(
                        request_id=str(len(runs[row["policy"]])), tenant=row["client"], arrival_s=arrival_s,
                        first_token_s=arrival_s + float(row["first_token_latency_s"]),
                        finish_s=arrival_s + float(row["request_latency_s"]), prompt_tokens=int(row["prompt_len"]),
                        output_tokens=num_output, delivered_tokens=num_output,
                    )
                )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no record of the VTC artifact ({error!r}).") from None
    if missing := [policy for policy in POLICIES if not runs[policy]]:
        raise ValueError(f"{path} has no requests of {', '.join(missing)}: name the artifact's folder.")
    return runs


STEP_TERMS = ("fixed_s", "decode_s", "context_s", "prefill_fixed_s", "token_s")


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A run as columns, of the requests in the order of their first tokens."""

    first_s: np.ndarray[Any, Any]
    finish_s: np.ndarray[Any, Any]
    prompts: np.ndarray[Any, Any]
    outputs: np.ndarray[Any, Any]

    @classmethod
    def of(cls, records: Sequence[RequestRecord]) -> "_Recorded":
        rows = sorted((one.first_token_s, one.finish_s, one.prompt_tokens, one.output_tokens) for one in records)
        return cls(*np.array(rows, dtype=float).T)

    def others(self, number: int) -> tuple[float, float]:
        """Requests that decoded beside one, and KV tokens that they read, as means over its time."""
        first_s, finish_s = self.first_s[number], self.finish_s[number]
        begin_s = np.clip(self.first_s, first_s, finish_s)
        end_s = np.clip(self.finish_s, begin_s, finish_s)
        lasts_s = np.maximum(self.finish_s - self.first_s, 1e-9)
        middle = ((begin_s + end_s) / 2 - self.first_s) / lasts_s
        weights = (end_s - begin_s) / (finish_s - first_s)
        return float(weights.sum()), float((weights * (self.prompts + self.outputs * middle)).sum())


def calibrated(records: Sequence[RequestRecord]) -> LinearTimes:
    """What steps took in a recorded run: every request's time after its first token is a sum over its steps.

    Method: least squares without negative terms. A request of n tokens decodes n - 1 times, beside those who ran meanwhile,
    and waits for the prefills that began meanwhile.
    """
    from scipy.optimize import nnls

    run = _Recorded.of(records)
    starts = np.flatnonzero(np.diff(run.first_s, prepend=-np.inf) > SAME_STEP_S)
    prefill_s, tokens = run.first_s[starts], np.add.reduceat(run.prompts, starts)
    rows, seconds = [], []
    for number in np.flatnonzero((run.outputs > 1) & (run.finish_s > run.first_s)):
        num_steps = run.outputs[number] - 1
        batch, context = run.others(int(number))
        meanwhile = (prefill_s > run.first_s[number] + SAME_STEP_S) & (prefill_s <= run.finish_s[number])
        rows.append([num_steps, num_steps * batch, num_steps * context, meanwhile.sum(), tokens[meanwhile].sum()])
        seconds.append(run.finish_s[number] - run.first_s[number])
    terms, _ = nnls(np.array(rows), np.array(seconds))
    return LinearTimes(**dict(zip(STEP_TERMS, map(float, terms), strict=True)))


def simulated(policy: str, records: Sequence[RequestRecord], times: LinearTimes) -> list[RequestRecord]:
    """What a policy of the simulated S-LoRA makes of the recorded requests."""
    done: list[RequestRecord] = []
    requests = [
        TraceRequest(
            arrival_s=one.arrival_s, tenant=one.tenant, prompt_tokens=one.prompt_tokens, output_tokens=one.output_tokens
        )
        for one in sorted(records, key=lambda one: one.arrival_s)
    ]  # fmt: skip
    Simulation(
        lambda _: SimulatedEngine(SETTINGS, times, waiting=_queue(policy)), num_replicas=1, router=RoundRobin(),
        done=done.append,
    ).run(requests)  # fmt: skip
    return done


def _queue(policy: str) -> WaitingQueue:
    if policy == FIRST_COME:
        return FirstCome()
    core = RequestAdmission(settings=AdmissionSettings(bypass_tokens=0, bypass_service=0.0))
    if policy == LEAST_SERVED:
        core.service = WithoutLift(core.settings.unit)
        core.waiting, core.skipped = FairQueue(core.service), FairQueue(core.service)
    return FairWaiting(core, ALIKE)


def latencies(records: Sequence[RequestRecord]) -> dict[str, float]:
    """Mean seconds from arrival to the end, and to the first token."""
    return {
        "latency_s_mean": statistics.fmean((one.finish_s or 0.0) - one.arrival_s for one in records),
        "first_token_s_mean": statistics.fmean((one.first_token_s or 0.0) - one.arrival_s for one in records),
    }

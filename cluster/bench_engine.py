"""The process of one arm of a benchmark: a vLLM engine that is driven through requests (`python -m cluster.bench_engine`).

Rules:
- Protocol: JSON lines on stdin and stdout, one answer per line read. First the settings, answered by `{"ready": ...}`,
  then runs. stdout carries nothing else (what libraries print goes to stderr), and the end of stdin ends the process.
- Open loop in real time: a request is added when its arrival has come, whatever the engine is busy with. Greedy. The prefix
  cache is empty at the start of every run; costs and output lengths are believed to be what the runs before have taught.
- A request ends when it has the tokens that it was to have: the driver aborts it then. The engine does not know that number,
  unless lengths are known; what a scheduler of ours is told is predicted as an ingress does.

Source: vLLM 0.29 `v1/engine/llm_engine.py`, `v1/engine/core.py` (`step` calls the scheduler's `schedule` and
`update_from_output` once each), `v1/core/sched/scheduler.py` (`_preempt_request`).
"""

import gc
import json
import os
import statistics
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from cluster.bench_arm import EngineSettings
from cluster.prompts import RequestSpec
from cluster.records import RequestRecord, RunResult
from cost_service.learner import CostLearner
from cost_service.output_length import OutputLength
from replicas.request_stamp import make_stamp


class Engine:
    """The process's side: one engine, and watches around its scheduler's methods."""

    def __init__(self, settings: EngineSettings) -> None:
        from vllm import LLM

        self.settings = settings
        self.llm = LLM(**settings.engine_arguments())
        self.engine = self.llm.llm_engine
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self._costs_before: dict[tuple[str, str], float] = {}
        self._learner: CostLearner | None = None
        self._lengths = OutputLength()
        self._clear()
        self._watch()

    def _clear(self) -> None:
        self._step_ns: list[int] = []
        self._running: list[int] = []
        self._peak_blocks = self._computed_tokens = 0
        self._guarded_before = self._guarded_steps()
        self._preempted: dict[str, Counter[str]] = defaultdict(Counter)

    def _watch(self) -> None:
        """Wrap the methods on the instance: `step` finds them there, whatever their class."""
        scheduler = self.scheduler
        schedule, update, preempt = scheduler.schedule, scheduler.update_from_output, scheduler._preempt_request
        pool = scheduler.kv_cache_manager.block_pool

        def watched_schedule(*args: Any, **kwargs: Any) -> Any:
            start_ns = time.perf_counter_ns()
            output = schedule(*args, **kwargs)
            self._step_ns.append(time.perf_counter_ns() - start_ns)
            self._running.append(len(scheduler.running))
            # Block 0 is vLLM's null block.
            self._peak_blocks = max(self._peak_blocks, pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())
            self._computed_tokens += output.total_num_scheduled_tokens
            return output

        def watched_update(*args: Any, **kwargs: Any) -> Any:
            start_ns = time.perf_counter_ns()
            outputs = update(*args, **kwargs)
            self._step_ns[-1] += time.perf_counter_ns() - start_ns
            return outputs

        def watched_preempt(request: Any, *args: Any, **kwargs: Any) -> None:
            swaps = self._swaps()
            preempt(request, *args, **kwargs)
            self._preempted[request.request_id]["swaps" if self._swaps() > swaps else "recomputes"] += 1

        scheduler.schedule, scheduler.update_from_output = watched_schedule, watched_update
        scheduler._preempt_request = watched_preempt

    def _guarded_steps(self) -> int:
        preemptor = getattr(self.scheduler, "preemptor", None)
        return int(preemptor.num_guarded_steps) if preemptor else 0

    def _learn(self) -> None:
        """What the runs before have taught of the costs, as the cost service would have told the engine."""
        preemptor = getattr(self.scheduler, "preemptor", None)
        if preemptor is not None and (samples := preemptor.meter.take_samples()):
            self._learner = self._learner or CostLearner(preemptor.costs)
            self._learner.observe(samples)
            preemptor.costs = self._learner.refit()

    def _preemption_costs(self) -> dict[str, dict[str, float]]:
        """Sums since the run began; empty for an arm that measures nothing."""
        preemptor = getattr(self.scheduler, "preemptor", None)
        if preemptor is None:
            return {}
        sums = {
            "measured": preemptor.num_measured,
            "predicted_s": preemptor.predicted_s,
            "measured_s": preemptor.measured_s,
        }
        now = {(action.value, name): float(of[action]) for name, of in sums.items() for action in of}
        before, self._costs_before = self._costs_before, now
        return {
            action.value: {name: now[action.value, name] - before.get((action.value, name), 0.0) for name in sums}
            for action in preemptor.num_measured
        }

    def _swaps(self) -> int:
        preemptor = getattr(self.scheduler, "preemptor", None)  # ours only; vLLM's own only ever recomputes
        return int(preemptor.num_preemptions["swap"]) if preemptor else 0

    def run(self, requests: Sequence[RequestSpec], *, limit_s: float) -> RunResult:
        """Drive the engine through the requests in real time."""
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("The prefix cache could not be reset: an earlier run left blocks behind.")
        if self.settings.learn:
            self._learn()
        self._clear()
        gc.collect()  # not in the middle of the run for what came before it
        pending = deque(sorted(requests, key=lambda request: request.arrival_s))
        by_id = {request.request_id: request for request in requests}
        inner_ids: dict[str, str] = {}
        times_s: dict[str, list[float]] = {request.request_id: [] for request in requests}
        tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
        start_s = time.perf_counter()
        now_s = 0.0
        while (pending or self.engine.has_unfinished_requests()) and now_s < limit_s:
            while pending and pending[0].arrival_s <= now_s:
                request = pending.popleft()
                inner_ids[request.request_id] = self._add(request)
            if self.engine.has_unfinished_requests():
                outputs = self.engine.step()
            else:
                outputs = []
                time.sleep(max(0.0, min(pending[0].arrival_s, limit_s) - now_s))
            now_s = time.perf_counter() - start_s
            for output in outputs:
                tokens[output.request_id] += output.outputs[0].token_ids
                times_s[output.request_id].append(now_s)
            self._end([by_id[output.request_id] for output in outputs], tokens)
        self.engine.abort_request(list(inner_ids))  # what is unfinished at the limit
        self._drain()
        return RunResult(
            records=[
                self._record(request, inner_ids.get(request.request_id), times_s[request.request_id], tokens)
                for request in requests
            ],
            run_end_s=now_s,
            peak_kv_blocks=self._peak_blocks,
            computed_tokens=self._computed_tokens,
            scheduler=self._scheduler_time(),
            preemption_costs=self._preemption_costs(),
            tokens=tokens,
        )

    def _drain(self) -> None:
        """Take the steps that an asynchronous scheduler has under way, so that a run begins with an idle engine."""
        core = self.engine.engine_core.engine_core
        while core.batch_queue:
            self.engine.step()

    def _add(self, request: RequestSpec) -> str:
        from vllm import SamplingParams, TokensPrompt

        num_prompt, most = len(request.prompt_token_ids), request.output_tokens
        if not self.settings.known_lengths:
            most = self.settings.max_model_len - num_prompt
        params = SamplingParams(
            temperature=0.0, max_tokens=most, ignore_eos=True, detokenize=False, extra_args=self._stamp(request, most)
        )  # fmt: skip
        params.output_kind = type(params.output_kind).DELTA  # vLLM exports no name for this type
        prompt = TokensPrompt(prompt_token_ids=list(request.prompt_token_ids))
        return str(self.engine.add_request(request.request_id, prompt, params))

    def _stamp(self, request: RequestSpec, most: int) -> dict[str, Any] | None:
        """What an ingress would have told a scheduler of ours; vLLM's own takes no stamps."""
        if not hasattr(self.scheduler, "preemptor"):
            return None
        _, median, upper = self._lengths.predict(request.tenant, len(request.prompt_token_ids), most)
        return make_stamp(
            tenant=request.tenant, weight=self.settings.weights.get(request.tenant, 1.0),
            median_tokens=round(median), upper_tokens=round(upper),
        )  # fmt: skip

    def _end(self, requests: Sequence[RequestSpec], tokens: Mapping[str, Sequence[int]]) -> None:
        """Let requests go that have all their tokens, and learn how many those were."""
        done = [request for request in requests if len(tokens[request.request_id]) >= request.output_tokens]
        for request in done:
            self._lengths.observe(request.tenant, len(request.prompt_token_ids), request.output_tokens)
        if done and not self.settings.known_lengths:
            self.engine.abort_request([request.request_id for request in done])

    def _record(
        self, request: RequestSpec, inner_id: str | None, times_s: Sequence[float], tokens: Mapping[str, Sequence[int]]
    ) -> RequestRecord:
        num_delivered = len(tokens[request.request_id])
        return RequestRecord(
            request_id=request.request_id,
            tenant=request.tenant,
            arrival_s=request.arrival_s,
            first_token_s=times_s[0] if times_s else None,
            finish_s=times_s[-1] if num_delivered == request.output_tokens else None,
            prompt_tokens=len(request.prompt_token_ids),
            output_tokens=request.output_tokens,
            delivered_tokens=num_delivered,
            **(self._preempted[inner_id] if inner_id else {}),
        )

    def _scheduler_time(self) -> dict[str, float]:
        step_us = [ns / 1000 for ns in self._step_ns]
        most = max(self._running)
        full = [us for us, running in zip(step_us, self._running, strict=True) if running == most]
        return {
            "steps": len(step_us),
            "us_mean": statistics.fmean(step_us),
            "us_median": statistics.median(step_us),
            "most_running": most,
            "steps_with_most_running": len(full),
            "guarded_steps": self._guarded_steps() - self._guarded_before,
            "us_median_with_most_running": statistics.median(full),
        }

    def close(self) -> None:
        """Shut the engine down; the process ends right after."""
        self.engine.engine_core.shutdown()


def main() -> int:
    """Answer lines until stdin ends."""
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0":
        print("Start this process through cluster.bench_arm.Arm, which sets its environment.", file=sys.stderr)
        return 2
    protocol = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(line: dict[str, Any]) -> None:
        protocol.write(json.dumps(line) + "\n")
        protocol.flush()

    settings = EngineSettings(**json.loads(sys.stdin.readline()))
    engine = Engine(settings)
    import torch
    import vllm

    answer({"ready": {"vllm": vllm.__version__, "torch": torch.__version__}})
    for text in sys.stdin:
        line = json.loads(text)
        requests = [RequestSpec(**request) for request in line["run"]]
        answer(asdict(engine.run(requests, limit_s=line["limit_s"])))
    engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())

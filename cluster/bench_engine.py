"""One arm of a benchmark: a process with one vLLM engine (`python -m cluster.bench_engine`), and its handle.

Rules:
- Protocol: JSON lines on stdin and stdout, one answer per line read. First the settings, answered by `{"ready": ...}`,
  then runs. stdout carries nothing else (what libraries print goes to stderr), and the end of stdin ends the process.
- Open loop in real time: a request is added when its arrival has come, whatever the engine is busy with. Greedy, with a
  fixed number of output tokens. The prefix cache is empty at the start of every run.
- Only the process imports vLLM; loading this module stays cheap for the command that holds the handles.

Source: vLLM 0.29 `v1/engine/llm_engine.py`, `v1/engine/core.py` (`step` calls the scheduler's `schedule` and
`update_from_output` once each), `v1/core/sched/scheduler.py` (`_preempt_request`).
"""

import gc
import json
import os
import select
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from cluster.config import SCHEDULERS
from cluster.workload import RequestRecord, RequestSpec, RunResult

STOCK = "stock"
OFFLOAD = "offload"
"""vLLM's own connector that offloads KV blocks to host memory, around its own scheduler."""

START_TIMEOUT_S, END_TIMEOUT_S = 600.0, 10.0
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # engine, scheduler and worker in the one process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else all arms bind the same cores
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}
BATCHED_TOKENS = 4096
"""Tokens of one step at least, as in the product: prefills stay in one piece on CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What one arm runs."""

    model: str
    """Folder in Hugging Face layout."""

    policy: str
    """`stock` (vLLM's own scheduler, no connector), `offload` (its own connector), or a preemption policy of ours."""

    num_kv_blocks: int | None
    """None: what vLLM finds room for."""

    host_pool_bytes: int
    max_num_seqs: int
    max_model_len: int
    block_size: int
    dtype: str
    load_format: str
    threads: int
    accelerator: str
    """`cpu` or `gpu`, as in the product's settings."""
    swap: dict[str, Any] = field(default_factory=dict)
    """Further settings of the connector (`replicas.config.SwapConfig`)."""

    def engine_arguments(self) -> dict[str, Any]:
        """vLLM's arguments: those of the product's replicas (`cluster.app.make_engine_kwargs`), sized for the run."""
        arguments: dict[str, Any] = {
            "model": self.model,
            "skip_tokenizer_init": True,
            "load_format": self.load_format,
            "dtype": self.dtype,
            "enforce_eager": self.accelerator == "cpu",
            "max_num_batched_tokens": max(self.max_model_len, BATCHED_TOKENS),
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.max_num_seqs,
            "block_size": self.block_size,
            "seed": 0,
            "disable_log_stats": True,
        }
        if self.accelerator == "cpu":
            arguments["enable_chunked_prefill"] = False
        if self.num_kv_blocks is not None:
            arguments["num_gpu_blocks_override"] = self.num_kv_blocks
            if self.accelerator == "cpu":
                # Overridden by the number of blocks; without it every arm would look for most of the host's free memory.
                arguments["kv_cache_memory_bytes"] = 1 << 28
        if self.policy == OFFLOAD:
            arguments["kv_offloading_size"] = self.host_pool_bytes / (1 << 30)
        elif self.policy != STOCK:
            arguments["scheduler_cls"] = SCHEDULERS[self.accelerator]
            arguments["kv_transfer_config"] = {
                "kv_connector": "SwapConnector",
                "kv_connector_module_path": "replicas.vllm_swap",
                "kv_role": "kv_both",
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {
                    "preemption": self.policy,
                    "host_pool_bytes": self.host_pool_bytes,
                    **self.swap,
                },
            }
        return arguments


class Arm:
    """Handle of one arm's process. Whoever makes one closes it: `with Arm(...) as arm`."""

    def __init__(self, settings: EngineSettings, log: Path) -> None:
        """Start the process and wait until its engine is ready.

        Args:
            log: File for what the process prints.

        Raises:
            RuntimeError: The engine did not start; with the end of its log.
        """
        self.settings, self._log, self._unread = settings, log, b""
        environment = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": str(settings.threads)}
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cluster.bench_engine"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                bufsize=0,  # nothing is left to flush when the pipe is closed
                cwd=Path(__file__).parents[1],
                env=environment,
                start_new_session=True,  # Ctrl-C reaches the command alone, which ends its arms in order
            )
        assert self._process.stdin is not None, "no pipe to the process"
        assert self._process.stdout is not None, "no pipe from the process"
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        try:
            self.versions: dict[str, str] = self._ask(asdict(settings), timeout_s=START_TIMEOUT_S)["ready"]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def run(self, requests: Sequence[RequestSpec], *, limit_s: float) -> RunResult:
        """Drive the engine through the requests, and give up after `limit_s` seconds what is unfinished then.

        Raises:
            RuntimeError: The process ended, or did not answer; with the end of its log.
        """
        line = {"run": [asdict(request) for request in requests], "limit_s": limit_s}
        answer = self._ask(line, timeout_s=limit_s + 60)
        answer["records"] = [RequestRecord(**record) for record in answer["records"]]
        return RunResult(**answer)

    def close(self) -> None:
        """End the process: by the end of its input, else by signals. Does nothing the second time."""
        self._stdin.close()
        for end in (self._process.terminate, self._process.kill):
            try:
                self._process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                end()
        self._process.wait()
        self._stdout.close()

    def _ask(self, line: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
        unsent = memoryview(json.dumps(line).encode() + b"\n")
        try:
            while unsent:
                unsent = unsent[os.write(self._stdin.fileno(), unsent) :]
        except BrokenPipeError:
            raise RuntimeError(self._failure("ended")) from None
        poll = select.poll()
        poll.register(self._stdout, select.POLLIN)
        end_s = time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            if not poll.poll(max(0.0, end_s - time.monotonic()) * 1000):
                raise RuntimeError(self._failure(f"did not answer within {timeout_s:.0f} s"))
            data = os.read(self._stdout.fileno(), 1 << 20)
            if not data:
                raise RuntimeError(self._failure("ended"))
            self._unread += data
        text, _, self._unread = self._unread.partition(b"\n")
        answer: dict[str, Any] = json.loads(text)
        return answer

    def _failure(self, what: str) -> str:
        tail = self._log.read_text(errors="replace")[-2000:]
        return f"The engine of policy {self.settings.policy} {what}; the end of its log:\n{tail}"


class Engine:
    """The process's side: one engine, and watches around its scheduler's methods."""

    def __init__(self, settings: EngineSettings) -> None:
        from vllm import LLM

        self.llm = LLM(**settings.engine_arguments())
        self.engine = self.llm.llm_engine
        self.scheduler = self.engine.engine_core.engine_core.scheduler
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

    def _swaps(self) -> int:
        preemptor = getattr(self.scheduler, "preemptor", None)  # ours only; vLLM's own only ever recomputes
        return int(preemptor.num_preemptions["swap"]) if preemptor else 0

    def run(self, requests: Sequence[RequestSpec], *, limit_s: float) -> RunResult:
        """Drive the engine through the requests in real time."""
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("The prefix cache could not be reset: an earlier run left blocks behind.")
        self._clear()
        gc.collect()  # not in the middle of the run for what came before it
        pending = deque(sorted(requests, key=lambda request: request.arrival_s))
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
        self.engine.abort_request(list(inner_ids))  # what is unfinished at the limit
        return RunResult(
            records=[
                self._record(request, inner_ids.get(request.request_id), times_s[request.request_id], tokens)
                for request in requests
            ],
            run_end_s=now_s,
            peak_kv_blocks=self._peak_blocks,
            computed_tokens=self._computed_tokens,
            scheduler=self._scheduler_time(),
            tokens=tokens,
        )

    def _add(self, request: RequestSpec) -> str:
        from vllm import SamplingParams, TokensPrompt

        params = SamplingParams(
            temperature=0.0,
            min_tokens=request.output_tokens,
            max_tokens=request.output_tokens,
            ignore_eos=True,
            detokenize=False,
        )
        params.output_kind = type(params.output_kind).DELTA  # vLLM exports no name for this type
        prompt = TokensPrompt(prompt_token_ids=list(request.prompt_token_ids))
        return str(self.engine.add_request(request.request_id, prompt, params))

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
        print("Start this process through cluster.bench_engine.Arm, which sets its environment.", file=sys.stderr)
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

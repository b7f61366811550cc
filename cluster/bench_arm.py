"""One arm of a benchmark: what its engine is, and the handle of the process that runs it (`cluster.bench_engine`).

Rule: only that process imports vLLM; loading this module stays cheap for the command that holds the handles.
"""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from cluster.config import GPU_ENVIRONMENT, SCHEDULERS
from cluster.prompts import RequestSpec
from cluster.records import RunResult
from replicas.fair_queue import Admission

STOCK = "stock"
OFFLOAD = "offload"
"""vLLM's own connector that offloads KV blocks to host memory, around its own scheduler."""

FIRST_COME = Admission.FIRST_COME.value
ADMISSIONS = tuple(admission.value for admission in Admission)

START_TIMEOUT_S, END_TIMEOUT_S = 600.0, 10.0
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # engine, scheduler and worker in the one process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else all arms bind the same cores
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}
GPU_MEMORY = 0.9
"""Part of a GPU's memory that all engines of a benchmark take together."""

OWNED_ARGUMENTS = frozenset(
    {"model", "scheduler_cls", "kv_transfer_config", "num_gpu_blocks_override", "max_model_len", "max_num_seqs"}
)
"""vLLM's arguments that a benchmark sets itself."""

BATCHED_TOKENS = 4096
"""Tokens of one step at least, as in the product: prefills stay in one piece on CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What one arm runs."""

    model: str
    """Folder in Hugging Face layout."""

    policy: str
    """`stock` (vLLM's own scheduler, no connector), `offload` (its own connector), or a preemption policy of ours."""

    admission: str = FIRST_COME
    """Who of those who wait is admitted next (`replicas.fair_queue.Admission`); vLLM's own scheduler knows `first-come`."""

    weights: dict[str, float] = field(default_factory=dict)
    """Of tenants; 1 for others."""

    known_lengths: bool = False
    """Whether the engine is told each request's length, as its limit; else it is predicted from those that have ended."""

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

    memory_share: float = 1.0
    """Of what engines may take of a GPU's memory; arms share one GPU."""

    engine_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's engine, as in the product's settings."""

    learn: bool = True
    """Whether a run prices preemptions by what the runs before have taught."""

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
        else:
            arguments["gpu_memory_utilization"] = GPU_MEMORY * self.memory_share
        if self.num_kv_blocks is not None:
            arguments["num_gpu_blocks_override"] = self.num_kv_blocks
            if self.accelerator == "cpu":
                # Overridden by the number of blocks; without it every arm would look for most of the host's free memory.
                arguments["kv_cache_memory_bytes"] = 1 << 28
        if self.policy == OFFLOAD:
            arguments["kv_offloading_size"] = self.host_pool_bytes / (1 << 30)
        elif self.policy != STOCK or self.admission != FIRST_COME:
            arguments["scheduler_cls"] = SCHEDULERS[self.accelerator]
        if self.policy not in (STOCK, OFFLOAD):
            arguments["kv_transfer_config"] = {
                "kv_connector": "SwapConnector",
                "kv_connector_module_path": "replicas.vllm_swap",
                "kv_role": "kv_both",
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {
                    "preemption": self.policy,
                    "admission": self.admission,
                    "host_pool_bytes": self.host_pool_bytes,
                    **self.swap,
                },
            }
        return arguments | self.engine_kwargs


def read_engine_kwargs(text: str | None) -> dict[str, Any]:
    """Further arguments of vLLM's engine.

    Raises:
        ValueError: It is no JSON object, or sets what the benchmark sets.
    """
    try:
        arguments = json.loads(text or "{}")
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise ValueError("--engine-kwargs must be a JSON object of vLLM's engine arguments: correct it.")
    if owned := sorted(OWNED_ARGUMENTS & set(arguments)):
        raise ValueError(f"--engine-kwargs must not set {owned[0]}, which the benchmark sets: leave it out.")
    return arguments


def arm_names(policies: Sequence[str], admissions: Sequence[str]) -> tuple[str, ...]:
    """Names of all arms: the policy's, after the admission's where there are several."""
    if len(admissions) == 1:
        return tuple(policies)
    return tuple(f"{admission}/{policy}" for admission in admissions for policy in policies)


class Arm:
    """Handle of one arm's process. Whoever makes one closes it: `with Arm(...) as arm`."""

    def __init__(self, settings: EngineSettings, log: Path, environment: Mapping[str, str] | None = None) -> None:
        """Start the process and wait until its engine is ready.

        Args:
            log: File for what the process prints.
            environment: What else its environment holds.

        Raises:
            RuntimeError: The engine did not start; with the end of its log.
        """
        self.settings, self._log, self._unread = settings, log, b""
        ours = ENVIRONMENT | {"OMP_NUM_THREADS": str(settings.threads)} | dict(environment or {})
        if settings.accelerator == "gpu" and settings.policy not in (STOCK, OFFLOAD):
            ours |= GPU_ENVIRONMENT
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "cluster.bench_engine"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                bufsize=0,  # nothing is left to flush when the pipe is closed
                cwd=Path(__file__).parents[1],
                env=os.environ | ours,
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
        return RunResult.of(self._ask(line, timeout_s=limit_s + 60))

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

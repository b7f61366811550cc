"""Tiny real engines for tests: one after another, in this process, on CPU, in float32.

Goal: a test says what differs (policy, pool sizes, engine arguments) and gets the tokens and the books back.
Method: `engine` builds one vLLM engine and takes it down completely, so that the next one can start. vLLM is imported
inside the functions: collecting the tests stays fast.
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BLOCK_SIZE = 32  # the smallest that attention on CPU takes
AMPLE_BLOCKS = 700
"""KV blocks with which no workload in these tests ever preempts."""

AMPLE_HOST_BYTES = 1 << 28


@dataclass(frozen=True, kw_only=True)
class Job:
    """One request, in plain values."""

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    seed: int | None = None
    prompt_logprobs: int | None = None

    def sampling_params(self, **changes: Any) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=self.temperature,
            seed=self.seed,
            max_tokens=self.max_tokens,
            prompt_logprobs=self.prompt_logprobs,
            ignore_eos=True,
            detokenize=False,
            **changes,
        )


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one engine made of a list of jobs."""

    tokens: list[tuple[int, ...]]
    """Output token ids, in the order of the jobs."""

    swaps: int
    recomputes: int
    swapped_out_blocks: int
    swapped_in_blocks: int
    scheduled_tokens: int


def mixed_jobs(num: int, *, seed: int = 1, shared_prefix: int = 0, output: tuple[int, int] = (40, 140)) -> list[Job]:
    """Random prompts; every other job is greedy, the rest sample with a seed of their own.

    Args:
        shared_prefix: Tokens that every third prompt starts with (something for the prefix cache to find).
        output: Least and most tokens to generate.
    """
    rng = random.Random(seed)
    prefix = tuple(rng.randrange(3, 512) for _ in range(shared_prefix))
    jobs = []
    for index in range(num):
        own = tuple(rng.randrange(3, 512) for _ in range(rng.randrange(20, 120)))
        sampled = index % 2 == 0
        jobs.append(
            Job(
                prompt=prefix + own if index % 3 == 0 else own,
                max_tokens=rng.randint(*output),
                temperature=0.8 if sampled else 0.0,
                seed=index if sampled else None,
            )
        )
    return jobs


def write_weights(model: Path) -> None:
    """Give the tiny model random weights with which its next token hangs on all KV, unless it has them.

    vLLM's dummy weights are no use here: they are so small that attention hardly reaches the logits, and an engine that
    loads nothing but garbage delivers the same tokens.
    """
    path = model / "model.safetensors"
    if path.exists():
        return
    import torch
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())
    width, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv_width = width // config["num_attention_heads"] * config["num_key_value_heads"]
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> Any:
        return torch.randn((rows, columns), generator=generator) * gain / columns**0.5

    weights = {
        "model.embed_tokens.weight": matrix(vocabulary, width, gain=width**0.5),
        "model.norm.weight": torch.ones(width),
        "lm_head.weight": matrix(vocabulary, width, gain=2.0),
    }
    for layer in range(config["num_hidden_layers"]):
        weights |= {
            f"model.layers.{layer}.{name}": tensor
            for name, tensor in {
                "input_layernorm.weight": torch.ones(width),
                "post_attention_layernorm.weight": torch.ones(width),
                "self_attn.q_proj.weight": matrix(width, width, gain=3.0),  # attends to few tokens, not to all alike
                "self_attn.k_proj.weight": matrix(kv_width, width),
                "self_attn.v_proj.weight": matrix(kv_width, width, gain=2.0),
                "self_attn.o_proj.weight": matrix(width, width, gain=2.0),
                "mlp.gate_proj.weight": matrix(inner, width),
                "mlp.up_proj.weight": matrix(inner, width),
                "mlp.down_proj.weight": matrix(width, inner),
            }.items()
        }
    save_file(weights, path)


@contextmanager
def engine(
    model: Path,
    policy: str,
    *,
    num_blocks: int = AMPLE_BLOCKS,
    host_bytes: int = AMPLE_HOST_BYTES,
    swap: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Iterator[Any]:
    """One `vllm.LLM` of a random model whose weights are the same every time (`write_weights`).

    Args:
        policy: "stock" for vLLM's own scheduler without a connector, else a policy of ours.
        num_blocks: KV blocks of the engine.
        host_bytes: Size of the host pool.
        swap: Further settings of the connector.
        changes: Other engine arguments.
    """
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

    write_weights(model)
    arguments: dict[str, Any] = {
        "model": str(model),
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "block_size": BLOCK_SIZE,
        "num_gpu_blocks_override": num_blocks,
        "max_num_seqs": 32,
        "seed": 0,
        "kv_cache_memory_bytes": 1 << 28,
        "disable_log_stats": True,
    }
    if policy != "stock":
        arguments["scheduler_cls"] = "replicas.vllm_scheduler.AdaptiveScheduler"
        arguments["kv_transfer_config"] = {
            "kv_connector": "SwapConnector",
            "kv_role": "kv_both",
            "kv_connector_module_path": "replicas.vllm_swap",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"preemption": policy, "host_pool_bytes": host_bytes, **(swap or {})},
        }
    llm = None
    try:
        llm = LLM(**arguments | changes)
        yield llm
    finally:
        if llm is not None:
            channel = getattr(scheduler_of(llm), "_channel", None)
            llm.llm_engine.engine_core.engine_core.shutdown()
            if channel is not None:
                channel.close()  # in a server the process ends here
        cleanup_dist_env_and_memory()
        ensure_kv_transfer_shutdown()


def scheduler_of(llm: Any) -> Any:
    """The scheduler of an engine that runs in this process."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def generate(llm: Any, jobs: Sequence[Job]) -> list[tuple[int, ...]]:
    """Run all jobs at once and return their output tokens."""
    from vllm import TokensPrompt

    outputs = llm.generate(
        [TokensPrompt(prompt_token_ids=list(job.prompt)) for job in jobs],
        [job.sampling_params() for job in jobs],
        use_tqdm=False,
    )
    return [tuple(output.outputs[0].token_ids) for output in outputs]


def run_engine(model: Path, policy: str, jobs: Sequence[Job], **changes: Any) -> Run:
    """Run all jobs on one engine; assert that nothing is left behind in either pool."""
    with engine(model, policy, **changes) as llm:
        tokens = generate(llm, jobs)
        assert_nothing_left(llm)
        if policy != "stock":
            assert scheduler_of(llm).num_output_tokens == sum(map(len, tokens))
        return Run(tokens=tokens, **counters_of(llm))


def counters_of(llm: Any) -> dict[str, int]:
    """Preemptions, block copies and computed tokens so far; all zero for vLLM's own scheduler, which does not count."""
    scheduler = scheduler_of(llm)
    preemptions = scheduler.preemptor.num_preemptions if hasattr(scheduler, "preemptor") else {}
    return {
        "swaps": preemptions.get("swap", 0),
        "recomputes": preemptions.get("recompute", 0),
        "swapped_out_blocks": getattr(scheduler, "num_swapped_out_blocks", 0),
        "swapped_in_blocks": getattr(scheduler, "num_swapped_in_blocks", 0),
        "scheduled_tokens": getattr(scheduler, "num_scheduled_tokens", 0),
    }


def assert_nothing_left(llm: Any) -> None:
    """No request, no KV block and no host slot is held by an engine that has nothing to do."""
    scheduler = scheduler_of(llm)
    assert not scheduler.requests
    assert not scheduler.running
    assert not scheduler.waiting
    block_pool = scheduler.kv_cache_manager.block_pool
    assert block_pool.get_num_free_blocks() == block_pool.num_gpu_blocks - 1  # block 0 is vLLM's null block
    if getattr(scheduler, "_swap", None) is not None:
        pool = scheduler._swap.planning.pool
        pool.check()
        assert pool.num_used_slots == 0


class Stepper:
    """Drives an engine step by step, to act between two steps as clients and operators do."""

    def __init__(self, llm: Any, jobs: Sequence[Job]) -> None:
        from vllm import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        self.llm = llm
        self.scheduler = scheduler_of(llm)
        self.jobs = jobs
        self.steps = 0
        self.tokens: dict[int, tuple[int, ...]] = {}
        """Output tokens of the jobs that have finished, by index."""
        self.prompt_logprobs: dict[int, list[float]] = {}
        """Log-probabilities of the prompt tokens of those among them that wanted any."""
        self.ids = [  # the scheduler's names: vLLM adds something random to ours
            llm.llm_engine.add_request(
                str(index),
                TokensPrompt(prompt_token_ids=list(job.prompt)),
                job.sampling_params(output_kind=RequestOutputKind.FINAL_ONLY),
            )
            for index, job in enumerate(jobs)
        ]

    @property
    def busy(self) -> bool:
        return bool(self.llm.llm_engine.has_unfinished_requests())

    @property
    def swapped_out(self) -> list[int]:
        """Indices of the jobs whose KV is in host memory now."""
        pool = self.scheduler._swap.planning.pool
        return [index for index, name in enumerate(self.ids) if pool.get(name) is not None]

    @property
    def running(self) -> list[int]:
        """Indices of the running jobs, in the scheduler's order."""
        return [self.ids.index(request.request_id) for request in self.scheduler.running]

    def step(self) -> None:
        """One step of the engine."""
        self.steps += 1
        for output in self.llm.llm_engine.step():
            if output.finished:
                index = int(output.request_id)
                self.tokens[index] = tuple(output.outputs[0].token_ids)
                if output.prompt_logprobs is not None:
                    self.prompt_logprobs[index] = [
                        by_token[token].logprob
                        for token, by_token in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
                        if by_token is not None  # nothing comes before the first token
                    ]

    def finish(self) -> None:
        """Step until nothing is left to do."""
        while self.busy:
            self.step()

    def abort(self, indices: Sequence[int]) -> None:
        """Abort jobs, as a server does for clients that went away."""
        self.llm.llm_engine.abort_request([str(index) for index in indices])


JOBS = mixed_jobs(210, shared_prefix=64)
GREEDY = [job for job in JOBS if job.temperature == 0]

PRESSURE = {"num_blocks": 24, "max_num_batched_tokens": 512, "enable_chunked_prefill": False}
"""Memory for about a fifth of what would run at once. Prefills stay in one piece: where vLLM on CPU must split that of a
request with a seed, its random generator has no offset to go back to, and the engine ends (with its own scheduler too)."""

CHUNKED = {"num_blocks": 24, "max_num_batched_tokens": 64}
"""The same memory, and prefills in pieces of at most 64 tokens; for greedy jobs."""

Base = dict[Job, tuple[int, ...]]
"""Output tokens of every job in ample memory."""


def base_run(model: Path) -> Base:
    """Run all jobs on vLLM's own scheduler with memory for everything."""
    run = run_engine(model, "stock", JOBS, **PRESSURE | {"num_blocks": AMPLE_BLOCKS})
    assert [len(tokens) for tokens in run.tokens] == [job.max_tokens for job in JOBS]
    assert len(set(run.tokens)) == len(JOBS)  # outputs that could be mistaken for one another would show nothing
    return dict(zip(JOBS, run.tokens, strict=True))


def differing(jobs: list[Job], tokens: list[tuple[int, ...]], base: Base) -> list[int]:
    """Indices of the jobs whose tokens are not the base's."""
    return [index for index, (job, ids) in enumerate(zip(jobs, tokens, strict=True)) if ids != base[job]]

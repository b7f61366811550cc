"""vLLM's schedulers with ours on top, driven without a model: a runner that stamps tokens with their positions.

Goal: asynchronous scheduling, which vLLM does not do on CPU, is tested on CPU: steps are scheduled ahead of the results
of the steps before, as on a GPU. The runner keeps "KV" in plain arrays: every position holds a stamp of its token and place,
and every step reads back all that its requests have computed, so that a wrong, lost or stale block is seen at once.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from replicas.transfer import Carried
from tests.engine_runs import BLOCK_SIZE, Job


def build_scheduler(
    model: Path,
    *,
    num_blocks: int,
    asynchronous: bool,
    settings: Mapping[str, Any],
    stock: bool = False,
    **changes: Any,
) -> Any:
    """Our scheduler with a connector of those settings, and KV blocks that exist in its books only.

    Args:
        stock: Whether it is vLLM's own, without a connector.
    """
    import torch
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheTensor
    from vllm.v1.structured_output import StructuredOutputManager

    from replicas.vllm_internals import AsyncScheduler, Scheduler
    from replicas.vllm_scheduler import AdaptiveAsyncScheduler, AdaptiveScheduler

    arguments: dict[str, Any] = {
        "model": str(model), "skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 512,
        "block_size": BLOCK_SIZE, "max_num_seqs": 32, "enable_prefix_caching": False, "disable_log_stats": True,
        "kv_transfer_config": {
            "kv_connector": "SwapConnector",
            "kv_role": "kv_both",
            "kv_connector_module_path": "replicas.vllm_swap",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"host_pool_bytes": 1 << 28, **settings},
        },
    }  # fmt: skip
    if stock:
        del arguments["kv_transfer_config"]
    config = EngineArgs(**arguments | changes).create_engine_config()
    config.scheduler_config.async_scheduling = asynchronous
    config.cache_config.num_gpu_blocks = num_blocks
    spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=2, head_size=32, dtype=torch.float32)
    kv_cache = KVCacheConfig(
        num_blocks=num_blocks,
        kv_cache_tensors=[
            KVCacheTensor(
                size=num_blocks * spec.page_size_bytes,
                layers=["layer"],
                layer_stride=num_blocks * spec.page_size_bytes,
                block_stride=spec.page_size_bytes,
            )
        ],
        kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
    )
    cls: Any = AdaptiveAsyncScheduler if asynchronous else AdaptiveScheduler
    if stock:
        cls = AsyncScheduler if asynchronous else Scheduler
    return cls(config, kv_cache, StructuredOutputManager(config), block_size=BLOCK_SIZE)


class ArrayCopier:
    """Copies rows of stamps between two arrays, as `BlockCopier` does bytes."""

    def __init__(self, blocks: np.ndarray[Any, Any], num_slots: int) -> None:
        self._blocks = blocks
        self._slots = np.full((num_slots, blocks.shape[1]), -1, dtype=blocks.dtype)

    def measure(self) -> None:
        """Nothing to measure."""

    def begin_step(self, written_blocks: Sequence[int] | None) -> None:
        """Nothing to order."""

    def copy_out(self, blocks: Sequence[int], slots: Sequence[int]) -> None:
        self._slots[list(slots)] = self._blocks[list(blocks)]

    def copy_in(self, slots: Sequence[int], blocks: Sequence[int], *, synchronous: bool) -> Callable[[], bool]:
        self._blocks[list(blocks)] = self._slots[list(slots)]
        return lambda: True

    def take_transfers(self) -> list[Carried]:
        """Nothing runs beside the engine."""
        return []

    def zero(self, slots: Sequence[int]) -> None:
        self._slots[list(slots)] = 0


def next_token(tokens: Sequence[int]) -> int:
    """What the made-up model says after these tokens; it hangs on all of them."""
    return 3 + (hash(tuple(tokens)) & 0x1FF) % 500


def expected_tokens(job: Job) -> tuple[int, ...]:
    """What a job delivers when nothing goes wrong."""
    tokens = list(job.prompt)
    for _ in range(job.max_tokens):
        tokens.append(next_token(tokens))
    return tuple(tokens[len(job.prompt) :])


class StampingRunner:
    """Executes steps in their order on arrays of stamps."""

    def __init__(self, scheduler: Any) -> None:
        from replicas.vllm_swap_worker import SwapWorker

        self._memory = np.full((scheduler.kv_cache_config.num_blocks, BLOCK_SIZE), -1, dtype=np.int64)
        self.copier: Any = ArrayCopier(self._memory, scheduler._swap.num_slots)
        self.worker = SwapWorker(self.copier, verify_checksums=False)
        self._tokens: dict[str, list[int]] = {}
        self._blocks: dict[str, list[int]] = {}

    def execute(self, step: Any) -> Any:
        """Run one step; return vLLM's `ModelRunnerOutput`."""
        from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

        metadata = step.kv_connector_metadata
        self.worker.copy_out(metadata.plan, metadata.written_blocks)
        computed = self._update_requests(step)
        self.worker.copy_in(metadata.plan, metadata.loads)
        sampled = [
            self._run(name, computed[name], num_tokens) for name, num_tokens in step.num_scheduled_tokens.items()
        ]
        names = list(step.num_scheduled_tokens)
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: index for index, name in enumerate(names)},
            sampled_token_ids=sampled,
            kv_connector_output=KVConnectorOutput(
                finished_recving=self.worker.take_finished(np.inf) or None,
                invalid_block_ids=self.worker.take_failed_blocks(),
                kv_connector_worker_meta=self.worker.take_report() or None,
            ),
        )

    def _update_requests(self, step: Any) -> dict[str, int]:
        """Follow the books that the scheduler sends; return how many tokens each request has computed."""
        computed = {}
        for new in step.scheduled_new_reqs:
            self._tokens[new.req_id] = list(new.prompt_token_ids)
            (blocks,) = new.block_ids
            self._blocks[new.req_id] = list(blocks)
            computed[new.req_id] = new.num_computed_tokens
        cached = step.scheduled_cached_reqs
        for name, new_blocks, num in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True):
            if name in cached.all_token_ids and name in cached.resumed_req_ids:
                self._tokens[name] = list(cached.all_token_ids[name])
            (blocks,) = new_blocks if new_blocks is not None else ([],)
            self._blocks[name] = list(blocks) if name in cached.resumed_req_ids else self._blocks[name] + list(blocks)
            computed[name] = num
        return computed

    def _run(self, name: str, computed: int, num_tokens: int) -> list[int]:
        tokens, blocks = self._tokens[name], self._blocks[name]
        end = computed + num_tokens
        assert end <= len(tokens), f"{name} computes token {end} of {len(tokens)} that there are"
        for place in range(computed, end):
            self._memory[blocks[place // BLOCK_SIZE], place % BLOCK_SIZE] = stamp(tokens, place)
        seen = self._memory[blocks[: -(-end // BLOCK_SIZE)]].reshape(-1)[:end]
        if end < len(tokens):
            return []
        right = all(seen[place] == stamp(tokens, place) for place in range(end))
        # As a model would: other KV, another token. (A load that failed is said to the scheduler, which drops the token.)
        tokens_seen = tokens if right else [*tokens, *map(int, seen)]
        tokens.append(next_token(tokens_seen))
        return [tokens[-1]]


def stamp(tokens: Sequence[int], place: int) -> int:
    """What the memory holds for a token: its id, and where it stands."""
    return place * 1_000 + tokens[place]


def run_jobs(scheduler: Any, jobs: Sequence[Job], *, depth: int, runner: StampingRunner | None = None) -> list[Any]:
    """Drive a scheduler through all jobs, `depth` steps ahead of their results; return the finished requests.

    Source: vLLM 0.29 `v1/engine/core.py` (`step_with_batch_queue`).
    """
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256)
    hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
    requests = [
        Request(str(index), list(job.prompt), job.sampling_params(), None, block_hasher=hasher)
        for index, job in enumerate(jobs)
    ]
    for request in requests:
        scheduler.add_request(request)
    runner = runner or StampingRunner(scheduler)
    under_way: deque[tuple[Any, Any]] = deque()
    idle = 0
    while scheduler.has_requests() or under_way:
        if scheduler.has_requests():
            step = scheduler.schedule()
            under_way.append((step, runner.execute(step)))
            idle = 0 if step.total_num_scheduled_tokens else idle + 1
            assert idle < 1000, "nothing moves any more"
        if len(under_way) >= depth or idle or not scheduler.has_requests():
            scheduler.update_from_output(*under_way.popleft())
    return requests

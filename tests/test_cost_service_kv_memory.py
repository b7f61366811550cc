"""Goal: bytes and blocks of a KV cache are those that vLLM allocates, holds and frees.

Method: vLLM's own model classes, built without memory, say what they allocate (`tests/vllm_kv_layouts.py`), its cache
manager what it holds and frees, and a real engine what it has in memory.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cost_service.kv_memory import KvLayout, kv_layout, kv_token_bytes
from cost_service.model_shape import Attention, ModelShape
from tests.conftest import TINY_LLAMA
from tests.engine_runs import engine, scheduler_of
from tests.model_configs import CONFIGS
from tests.vllm_kv_layouts import CASES, Allocation, Case, allocations

SHAPES = {name: ModelShape.from_config(config) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def vllm_allocations() -> dict[str, Allocation]:
    return allocations()


@pytest.mark.engine
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_block_has_the_bytes_and_groups_that_vllm_allocates_for_it(
    case: Case, vllm_allocations: dict[str, Allocation]
) -> None:
    theirs = vllm_allocations[str(case)]
    ours = kv_layout(
        SHAPES[case.name], block_size=theirs.block_size, parallelism=case.parallelism, hybrid=case.hybrid,
        element_bytes=case.element_bytes, kernel_block_size=theirs.kernel_block_size,
    )  # fmt: skip
    assert ours.block_bytes == theirs.block_bytes
    assert sorted([one.num_layers, one.window or 0, ours.block_size] for one in ours.groups) == theirs.groups
    tokens = kv_token_bytes(SHAPES[case.name], parallelism=case.parallelism, element_bytes=case.element_bytes)
    assert ours.token_bytes == tokens


def test_published_models_take_the_published_bytes_per_token() -> None:
    assert kv_token_bytes(SHAPES["llama-3.1-8b"]) == 128 << 10
    assert kv_token_bytes(SHAPES["llama-2-7b"]) == 512 << 10
    assert kv_token_bytes(SHAPES["deepseek-v3"]) == 61 * 576 * 2  # 70,272 bytes: DeepSeek-V3's report
    assert kv_token_bytes(SHAPES["llama-3.1-70b"], parallelism=8) == 80 * 2 * 128 * 2


def vllm_manager(layout: KvLayout) -> Any:
    """vLLM's cache manager over 2,000 blocks of such groups."""
    import torch
    from vllm.utils.hashing import sha256
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec

    kv_cache_utils.init_none_hash(sha256)
    sizes: dict[str, Any] = {"block_size": layout.block_size, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    groups = [
        KVCacheGroupSpec(
            [f"layer.{index}"],
            SlidingWindowSpec(sliding_window=group.window, **sizes) if group.window else FullAttentionSpec(**sizes),
        )
        for index, group in enumerate(layout.groups)
    ]
    config = KVCacheConfig(num_blocks=2000, kv_cache_tensors=[], kv_cache_groups=groups)
    return KVCacheManager(
        config, max_model_len=20_000, scheduler_block_size=layout.block_size, hash_block_size=layout.block_size
    )


@dataclass
class Held:
    """A request in vLLM's cache manager."""

    manager: Any
    request: Any

    @classmethod
    def of(cls, manager: Any, block_size: int, name: str, prompt: list[int]) -> "Held":
        from vllm import SamplingParams
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher
        from vllm.v1.request import Request

        hasher = get_request_block_hasher(block_size, sha256)
        request = Request(name, prompt, SamplingParams(max_tokens=1), None, block_hasher=hasher)
        return cls(manager, request)

    def compute(self, num_new: int) -> None:
        """A step with so many new tokens; the first one takes what the prefix cache has."""
        if self.request.num_computed_tokens == 0:
            blocks, num_hit = self.manager.get_computed_blocks(self.request)[:2]
            assert self.manager.allocate_slots(self.request, num_new, num_hit, blocks) is not None
            self.request.num_computed_tokens = num_hit + num_new
        else:
            assert self.manager.allocate_slots(self.request, num_new) is not None
            self.request.num_computed_tokens += num_new

    def free(self) -> int:
        """Give way; return how many blocks the pool gains."""
        before = self.manager.block_pool.get_num_free_blocks()
        self.manager.free(self.request)
        return int(self.manager.block_pool.get_num_free_blocks() - before)


@pytest.mark.parametrize("chunk", [1, 7, 16, 100])
@pytest.mark.parametrize("name", ["llama-3.1-8b", "gpt-oss-20b", "gemma-3-12b", "mistral-7b-v0.1"])
def test_a_preemption_frees_the_blocks_that_vllms_manager_gives_back(name: str, chunk: int) -> None:
    layout = kv_layout(SHAPES[name], block_size=16)
    manager = vllm_manager(layout)
    for num_steps in (1, 2, 9, 40):
        held = Held.of(manager, layout.block_size, f"{name}-{num_steps}", [num_steps] * chunk * num_steps)
        for _ in range(num_steps):
            held.compute(chunk)
        assert held.free() == layout.num_blocks(chunk * num_steps, num_newest=chunk)
        manager.reset_prefix_cache()


@pytest.mark.parametrize("name", ["llama-3.1-8b", "gpt-oss-20b"])
def test_a_preemption_frees_no_block_that_another_request_holds_too(name: str) -> None:
    layout = kv_layout(SHAPES[name], block_size=16)
    manager = vllm_manager(layout)
    first, second = (Held.of(manager, layout.block_size, str(own), [7] * 96 + [own] * 25) for own in (1, 2))
    for held in (first, second):
        held.compute(121 - (96 if held is second else 0))
        assert held.request.num_computed_tokens == 121
    gained = second.free()
    assert gained == layout.num_freed_blocks(121, shared_tokens=96, num_newest=25)
    assert gained < layout.num_blocks(121, num_newest=25)


@pytest.mark.engine
@pytest.mark.parametrize("window", [None, 64])
def test_an_engine_has_as_many_bytes_in_memory_as_its_layout_says(tmp_path: Path, window: int | None) -> None:
    config = TINY_LLAMA | {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window, "head_dim": 32,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    num_blocks = 40
    with engine(tmp_path, "stock", block_size=128, num_blocks=num_blocks) as llm:
        cache = scheduler_of(llm).kv_cache_config
        (storage_bytes,) = llm.collective_rpc(
            lambda worker: sum(
                {
                    layer.untyped_storage().data_ptr(): layer.untyped_storage().nbytes()
                    for layer in worker.model_runner.kv_caches
                }.values()
            )
        )
    layout = kv_layout(
        ModelShape.from_config(config), block_size=128, element_bytes=4, kernel_block_size=32
    )  # float32 on CPU
    assert cache.num_blocks == num_blocks
    assert storage_bytes == num_blocks * layout.block_bytes
    assert [group.kv_cache_spec.block_size for group in cache.kv_cache_groups] == [layout.block_size]


def test_layers_of_different_sizes_are_not_covered_and_that_is_said() -> None:
    small, large = (Attention(num_heads=8, num_kv_heads=8, head_size=size, value_size=size) for size in (64, 128))
    ((_, mlp),) = SHAPES["llama-2-7b"].layers
    shape = ModelShape(hidden_size=512, vocab_size=100, layers={(small, mlp): 2, (large, mlp): 2})
    with pytest.raises(ValueError, match="layers of one size only are covered"):
        kv_layout(shape, block_size=16)


def test_blocks_of_full_and_windowed_layers_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="block_size 48 and the kernel's 32 are no multiples of each other"):
        kv_layout(SHAPES["gpt-oss-20b"], block_size=48, kernel_block_size=32)
    assert kv_layout(SHAPES["llama-2-7b"], block_size=48, kernel_block_size=32).block_size == 48

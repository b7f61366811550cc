"""Goal: bytes and blocks of a KV cache are those that vLLM allocates.

Method: vLLM's own specs, grouping and managers for published models, on one rank and several, in several precisions.
"""

from types import SimpleNamespace
from typing import Any

import pytest

from cost_service.kv_memory import kv_layout, kv_token_bytes
from cost_service.model_shape import Attention, ModelShape
from tests.model_configs import CONFIGS

SHAPES = {name: ModelShape.from_config(config) for name, config in CONFIGS.items()}


def vllm_specs(shape: ModelShape, block_size: int, parallelism: int, dtype: Any) -> dict[str, Any]:
    """What vLLM's attention layers say they need, layer by layer."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec

    def spec(attention: Attention) -> Any:
        if attention.latent is not None:  # `MLAAttention.get_kv_cache_spec`
            rank, rotary = attention.latent[1:]
            return MLAAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=rank + rotary, dtype=dtype)
        heads = max(1, attention.num_kv_heads // parallelism)  # `ModelConfig.get_num_kv_heads`
        sizes: dict[str, Any] = {"block_size": block_size, "num_kv_heads": heads, "head_size": attention.head_size}
        if attention.window is None:  # `Attention.get_kv_cache_spec`
            return FullAttentionSpec(dtype=dtype, **sizes)
        return SlidingWindowSpec(dtype=dtype, sliding_window=attention.window, **sizes)

    layers = [attention for (attention, _), count in shape.layers.items() for _ in range(count)]
    return {f"layer.{index}": spec(attention) for index, attention in enumerate(layers)}


def vllm_groups(specs: dict[str, Any], *, hybrid: bool) -> list[Any]:
    from vllm.v1.core import kv_cache_utils

    layout = SimpleNamespace(is_block_outermost=False)
    config: Any = SimpleNamespace(
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=not hybrid),
        cache_config=SimpleNamespace(get_resolved_kv_cache_layout=lambda: layout),
        speculative_config=None,
    )
    return kv_cache_utils.get_kv_cache_groups(config, specs)


@pytest.mark.parametrize("hybrid", [True, False], ids=["hybrid", "one group"])
@pytest.mark.parametrize(("parallelism", "dtype"), [(1, "bfloat16"), (4, "bfloat16"), (16, "uint8"), (1, "float32")])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_block_has_the_bytes_that_vllm_allocates_for_it(
    name: str, parallelism: int, dtype: str, hybrid: bool
) -> None:
    import torch
    from vllm.v1.core.kv_cache_utils import _get_kv_cache_bytes_per_block

    element: torch.dtype = getattr(torch, dtype)
    groups = vllm_groups(vllm_specs(SHAPES[name], 16, parallelism, element), hybrid=hybrid)
    layout = kv_layout(
        SHAPES[name], block_size=16, parallelism=parallelism, element_bytes=element.itemsize, hybrid=hybrid
    )
    assert layout.block_bytes == _get_kv_cache_bytes_per_block(groups)
    assert sorted(len(group.layer_names) for group in groups) == sorted(group.num_layers for group in layout.groups)
    assert layout.token_bytes == kv_token_bytes(SHAPES[name], parallelism=parallelism, element_bytes=element.itemsize)


def test_published_models_take_the_published_bytes_per_token() -> None:
    assert kv_token_bytes(SHAPES["llama-3.1-8b"]) == 128 << 10
    assert kv_token_bytes(SHAPES["llama-2-7b"]) == 512 << 10
    assert kv_token_bytes(SHAPES["deepseek-v3"]) == 61 * 576 * 2  # 70,272 bytes: DeepSeek-V3's report
    assert kv_token_bytes(SHAPES["llama-3.1-70b"], parallelism=8) == 80 * 2 * 128 * 2


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 127, 128, 129, 500, 4096])
def test_a_windowed_request_holds_the_blocks_that_vllms_manager_keeps(num_tokens: int) -> None:
    import torch
    from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    spec = SlidingWindowSpec(block_size=16, num_kv_heads=8, head_size=64, dtype=torch.bfloat16, sliding_window=128)
    manager = SlidingWindowManager.__new__(SlidingWindowManager)
    manager.kv_cache_spec, manager.sliding_window, manager.extra_retained_tokens = spec, 128, 0
    skipped = manager.get_num_skipped_tokens(num_tokens) // 16
    total = -(-num_tokens // 16)
    layout = kv_layout(SHAPES["gpt-oss-20b"], block_size=16)
    assert layout.num_blocks(num_tokens) == total + (total - skipped)  # its full group and its windowed one


def test_a_preemption_frees_what_nobody_else_holds() -> None:
    layout = kv_layout(SHAPES["llama-3.1-8b"], block_size=16)
    assert layout.num_freed_blocks(100) == layout.num_blocks(100) == 7
    assert layout.num_freed_blocks(100, shared_tokens=64) == 3
    windowed = kv_layout(SHAPES["gpt-oss-20b"], block_size=16)
    assert windowed.num_freed_blocks(1000) == windowed.num_blocks(1000)
    shared = windowed.num_freed_blocks(1000, shared_tokens=96)
    assert shared == windowed.num_blocks(1000) - 6  # the window's blocks are behind the shared ones


def test_layers_of_different_sizes_are_not_covered_and_that_is_said() -> None:
    small, large = (Attention(num_heads=8, num_kv_heads=8, head_size=size, value_size=size) for size in (64, 128))
    ((_, mlp),) = SHAPES["llama-2-7b"].layers
    shape = ModelShape(hidden_size=512, vocab_size=100, layers={(small, mlp): 2, (large, mlp): 2})
    with pytest.raises(ValueError, match="layers of one size only are covered"):
        kv_layout(shape, block_size=16)

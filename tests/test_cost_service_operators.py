"""Goal: FLOPs of every operator are those that an independent count finds; bytes and properties are those of arithmetic.

Method: torch's FLOP counter over small models of the transformers library, which computes attention over full squares
(eager) where we count the causal half: the squares are put together again from pairs. Hypothesis for properties.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_service.model_shape import Attention, ModelShape
from cost_service.operators import (
    ATTENTION,
    COLLECTIVE,
    Batch,
    Precision,
    attention_work,
    dense_operators,
    total_flops,
)
from tests.model_configs import CONFIGS

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "vocab_size": 128,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 4, "sliding_window": None},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "gemma2": {"num_key_value_heads": 4, "head_dim": 16, "sliding_window": 4096},
    "phi3": {"num_key_value_heads": 8, "pad_token_id": 0},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 8, "n_inner": 96},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "num_key_value_heads": 8, "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
        "v_head_dim": 8, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 48,
        "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
    },
}  # fmt: skip


def counted(family: str, num_tokens: int, num_decodes: int = 0) -> tuple[ModelShape, float, float]:
    """Shape, and counted FLOPs of matrix products by weights and of attention: of a prefill, or of a decode behind it."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = SMALL | FAMILIES[family]
    config = AutoConfig.for_model(family, attn_implementation="eager", **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        if num_decodes:
            with FlopCounterMode(display=False):
                cache = model(torch.zeros((1, num_tokens), dtype=torch.long), use_cache=True).past_key_values
            before = dict(counter.get_flop_counts()["Global"])
            model(torch.zeros((1, 1), dtype=torch.long), past_key_values=cache, use_cache=True)
        else:
            before = {}
            model(torch.zeros((1, num_tokens), dtype=torch.long), use_cache=False, logits_to_keep=1)
    after = counter.get_flop_counts()["Global"]
    by_kind = {str(kind): flops - before.get(kind, 0) for kind, flops in after.items()}
    batched = by_kind.pop("aten.bmm", 0) + by_kind.pop("aten.baddbmm", 0)
    return ModelShape.from_config(config.to_dict()), float(sum(by_kind.values())), float(batched)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefill_has_the_flops_that_torch_counts(family: str) -> None:
    num_tokens = 12
    shape, products, batched = counted(family, num_tokens)
    dense = sum(
        one.calls * one.row_flops * (1 if one.per_sequence else num_tokens)
        for one in dense_operators(shape)
        if one.family == "matmul"
    )
    assert products == pytest.approx(dense, rel=1e-9)
    squares = sum(
        count * attention_work(attention, Batch(prefills=((num_tokens, 0),))).flops * 2 * num_tokens / (num_tokens + 1)
        for (attention, _), count in shape.layers.items()
    )
    assert batched == pytest.approx(squares, rel=0.02)  # the rotary angles are batched products too


@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family != "deepseek_v3"]
)  # expanded there, absorbed here
def test_a_decode_has_the_flops_that_torch_counts(family: str) -> None:
    cached = 11
    shape, products, batched = counted(family, cached, num_decodes=1)
    assert products == pytest.approx(
        sum(one.calls * one.row_flops for one in dense_operators(shape) if one.family == "matmul"), rel=1e-9
    )
    work = sum(
        count * attention_work(attention, Batch(decodes=(cached + 1,))).flops
        for (attention, _), count in shape.layers.items()
    )
    assert batched == pytest.approx(work, rel=0.02)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_token_takes_two_flops_for_every_weight_that_it_passes(name: str) -> None:
    shape = ModelShape.from_config(CONFIGS[name])
    routers = sum(count * shape.hidden_size * mlp.num_experts for (_, mlp), count in shape.layers.items())
    products = sum(one.calls * one.row_flops for one in dense_operators(shape) if one.family == "matmul")
    assert products == pytest.approx(2 * (shape.active_weights + routers), rel=1e-9)


def attentions() -> Iterator[Attention]:
    for name in ("llama-3.1-8b", "gpt-oss-20b", "deepseek-v3"):
        for attention, _ in ModelShape.from_config(CONFIGS[name]).layers:
            yield attention


ATTENTIONS = list(dict.fromkeys(attentions()))
tokens = st.integers(1, 3000)


@given(st.sampled_from(ATTENTIONS), tokens, tokens, st.integers(0, 3000))
def test_a_prefill_in_two_pieces_is_as_much_attention_as_in_one(
    attention: Attention, one: int, two: int, cached: int
) -> None:
    whole = attention_work(attention, Batch(prefills=((one + two, cached),)))
    pieces = attention_work(attention, Batch(prefills=((one, cached), (two, cached + one))))
    assert pieces.flops == pytest.approx(whole.flops)
    assert pieces.bytes_moved >= whole.bytes_moved * 0.999


@given(tokens, st.integers(0, 3000))
def test_a_window_never_adds_work(new: int, cached: int) -> None:
    windowed, full = (
        next(one for one in ATTENTIONS if one.window == window and one.head_size == 64) for window in (128, None)
    )
    batch = Batch(prefills=((new, cached),), decodes=(cached + new,))
    some, all_of_it = attention_work(windowed, batch), attention_work(full, batch)
    assert some.flops <= all_of_it.flops
    assert some.bytes_moved <= all_of_it.bytes_moved


def test_ranks_share_the_work_and_send_each_other_the_rest() -> None:
    shape = ModelShape.from_config(CONFIGS["llama-3.1-70b"])
    batch = Batch(prefills=((512, 100),), decodes=(1000,) * 60)
    assert total_flops(shape, batch, parallelism=8) == pytest.approx(total_flops(shape, batch) / 8, rel=0.01)
    families = {one.family for one in dense_operators(shape, parallelism=8)}
    assert COLLECTIVE in families
    assert COLLECTIVE not in {one.family for one in dense_operators(shape)}
    assert ATTENTION not in families


def test_few_tokens_touch_few_experts_and_many_touch_all() -> None:
    shape = ModelShape.from_config(CONFIGS["qwen3-30b-a3b"])
    (up,) = (one for one in dense_operators(shape) if one.name == "experts_up")
    one, many = up.bytes_moved(np.array([1.0, 10_000.0])) - up.row_bytes * np.array([1.0, 10_000.0])
    assert one == pytest.approx(up.weight_bytes * 8 / 128)
    assert many == pytest.approx(up.weight_bytes)


def test_bytes_follow_the_precision() -> None:
    shape = ModelShape.from_config(CONFIGS["llama-3.1-8b"])
    (half,), (eighth,) = (
        [one for one in dense_operators(shape, precision=precision) if one.name == "down_proj"]
        for precision in (Precision(), Precision(weights=1.0))
    )
    assert half.weight_bytes == 2 * eighth.weight_bytes == 2 * 14336 * 4096
    (attention,) = (one for one in ATTENTIONS if one.head_size == 128 and one.latent is None)
    batch = Batch(decodes=(1000,))
    saved = (
        attention_work(attention, batch).bytes_moved
        - attention_work(attention, batch, precision=Precision(kv=1.0)).bytes_moved
    )
    assert saved == 1000 * 2 * 8 * 128

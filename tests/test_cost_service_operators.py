"""Goal: FLOPs of every operator are those that an independent count finds; bytes and properties are those of arithmetic.

Method: torch's FLOP counter over small models of the transformers library, per class of operators and exact. The library
computes attention over whole rectangles of queries and keys and masks them, where we count what the mask leaves: the test
divides the count by the rectangle and multiplies it by the mask, which it draws itself. Hypothesis for properties.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_service.model_shape import Attention, ModelShape
from cost_service.operators import (
    ATTENTION,
    COLLECTIVE,
    MATMUL,
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
LATENT = {
    "num_key_value_heads": 8, "kv_lora_rank": 32, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 48,
    "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 4, "sliding_window": 8},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "gemma2": {"num_key_value_heads": 4, "head_dim": 16, "sliding_window": 8},
    "gemma3_text": {"num_key_value_heads": 4, "head_dim": 16, "sliding_window": 8, "num_hidden_layers": 7},
    "phi3": {"num_key_value_heads": 8, "pad_token_id": 0},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 8, "n_inner": 96},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True, "ffn_hidden_size": 96, "bias": False},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48, "mlp_only_layers": [1],
    },
    "qwen3_moe": {
        "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    },
    "deepseek_v2": LATENT | {"q_lora_rank": None},
    "deepseek_v3": LATENT | {"q_lora_rank": 24},
}  # fmt: skip
BATCHES = {
    "one prefill": [(12, 0)],
    "one decode": [(1, 11)],
    "mixed": [(12, 0), (5, 9), (3, 1), (1, 11), (1, 2)],
}
"""Of every request the new tokens and those cached before them."""

ATTENTION_NAMES = {"self_attn", "attn", "self_attention"}
PROJECTIONS = {"qkv_proj", "qkv_a_proj", "q_b_proj", "kv_b_proj", "o_proj"}


@dataclass
class Counted:
    """FLOPs that torch counts for a batch, request by request."""

    shape: ModelShape
    projections: float = 0.0
    mlps: float = 0.0
    lm_head: float = 0.0
    attention: float = 0.0
    """What the masks leave of it, with the expansion of cached latents."""


def seen_pairs(new: int, cached: int, window: int | None) -> int:
    """Pairs of a query and a key that the mask leaves, one by one."""
    queries, keys = np.arange(cached, cached + new)[:, None], np.arange(cached + new)[None, :]
    return int(((keys <= queries) & (queries - keys < (window or cached + new))).sum())


def count(family: str, batch: list[tuple[int, int]]) -> Counted:
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

    config = AutoConfig.for_model(family, attn_implementation="eager", **SMALL | FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager").eval()
    found = Counted(ModelShape.from_config(config.to_dict()))
    types = getattr(config, "layer_types", None)
    for new, cached in batch:
        cache = DynamicCache()  # without the config: keeps what is outside of windows too, and masks it
        with torch.no_grad():
            if cached:
                model(torch.zeros((1, cached), dtype=torch.long), past_key_values=cache)
            with FlopCounterMode(display=False) as counter:
                model(torch.zeros((1, new), dtype=torch.long), past_key_values=cache, logits_to_keep=1)
        counts = counter.get_flop_counts()
        total = dict.fromkeys(("products", "batched"), 0.0) | flops_of(counts["Global"])
        head = flops_of(next(flops for name, flops in counts.items() if name.endswith("lm_head")))["products"]
        layers = [flops_of(flops) for name, flops in counts.items() if name.split(".")[-1] in ATTENTION_NAMES]
        projections = sum(layer["products"] for layer in layers)
        # The library caches latents too and expands all of them: what was cached counts as attention, as ours does.
        expanded = sum(flops_of(flops)["products"] for name, flops in counts.items() if name.endswith("kv_b_proj"))
        expanded_anew = expanded * cached / (cached + new)
        found.lm_head += head
        found.projections += projections - expanded_anew
        found.mlps += total["products"] - projections - head
        for index, layer in enumerate(layers):
            sliding = types[index] == "sliding_attention" if types else bool(getattr(config, "sliding_window", None))
            pairs = seen_pairs(new, cached, config.sliding_window if sliding else None)
            found.attention += layer["batched"] * pairs / (new * (cached + new))
        found.attention += expanded_anew
        assert total["batched"] == sum(layer["batched"] for layer in layers)
    return found


def flops_of(by_operation: Any) -> dict[str, float]:
    """Products with weights, and products of activations with each other."""
    batched = {"aten.bmm", "aten.baddbmm"}
    return {
        "products": float(sum(flops for name, flops in by_operation.items() if str(name) not in batched)),
        "batched": float(sum(flops for name, flops in by_operation.items() if str(name) in batched)),
    }


def matmul_flops(shape: ModelShape, batch: Batch, *, chosen: Callable[[str], bool]) -> float:
    return sum(
        one.calls * one.row_flops * (batch.num_sequences if one.per_sequence else batch.num_tokens)
        for one in dense_operators(shape)
        if one.family == MATMUL and chosen(one.name)
    )


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_class_of_operators_has_the_flops_that_torch_counts(family: str, kind: str) -> None:
    requests = BATCHES[kind]
    latent = family.startswith("deepseek")
    # The library's decodes of latent attention are expanded, vLLM's are absorbed (counted below).
    requests = [one for one in requests if one[0] > 1 or not latent] or [(2, 11)]
    theirs = count(family, requests)
    batch = Batch(
        prefills=tuple(one for one in requests if one[0] > 1),
        decodes=tuple(cached + 1 for new, cached in requests if new == 1),
    )
    products = partial(matmul_flops, theirs.shape, batch)
    assert products(chosen=PROJECTIONS.__contains__) == theirs.projections
    assert products(chosen=lambda name: name == "lm_head") == theirs.lm_head
    assert products(chosen=lambda name: name not in {*PROJECTIONS, "lm_head"}) == theirs.mlps
    ours = sum(times * attention_work(one, batch).flops for (one, _), times in theirs.shape.layers.items())
    assert ours == pytest.approx(theirs.attention, rel=1e-12)


@pytest.mark.parametrize("context", [1, 100])
def test_latent_attention_decodes_with_the_flops_of_absorbed_products(context: int) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    heads, nope, rotary, value, rank = 16, 128, 64, 128, 512
    query, latent = torch.empty((heads, 1, nope), device="meta"), torch.empty((context, rank + rotary), device="meta")
    to_latent, back = torch.empty((heads, nope, rank), device="meta"), torch.empty((heads, rank, value), device="meta")
    with FlopCounterMode(display=False) as absorption:
        absorbed = torch.bmm(query, to_latent)
    with FlopCounterMode(display=False) as attending:
        scores = torch.bmm(
            torch.cat((absorbed, torch.empty((heads, 1, rotary), device="meta")), dim=2),
            latent.T.expand(heads, -1, -1),
        )
        summed = torch.bmm(scores, latent[:, :rank].expand(heads, -1, -1))
    with absorption:
        torch.bmm(summed, back)
    shape = ModelShape.from_config(CONFIGS["deepseek-v2-lite"])
    ((attention, _), *_) = shape.layers
    assert attention_work(attention, Batch(decodes=(context,))).flops == attending.get_total_flops()
    row_flops = {one.row_flops for one in dense_operators(shape) if one.name == "kv_b_proj"}
    assert row_flops == {2 * heads * rank * (nope + value)}  # both absorptions together


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
def test_a_prefill_in_two_pieces_is_as_much_attention_as_in_one_but_for_what_is_expanded_anew(
    attention: Attention, one: int, two: int, cached: int
) -> None:
    whole = attention_work(attention, Batch(prefills=((one + two, cached),)))
    pieces = attention_work(attention, Batch(prefills=((one, cached), (two, cached + one))))
    expanded_anew = 0.0
    if attention.latent is not None:  # the second piece finds the first one and all before it as latents
        rank, rotary = attention.latent[1:]
        widths = attention.head_size - rotary + attention.value_size
        expanded_anew = 2.0 * (cached + one) * rank * attention.num_heads * widths
    assert pieces.flops == pytest.approx(whole.flops + expanded_anew)
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


@given(st.sampled_from(sorted(CONFIGS)), tokens, tokens)
def test_operators_by_rows_add_up_over_tokens(name: str, one: int, two: int) -> None:
    for operator in dense_operators(ModelShape.from_config(CONFIGS[name])):
        flops = operator.flops(np.array([float(one), float(two), float(one + two)]))
        assert flops[0] + flops[1] == pytest.approx(flops[2])


@pytest.mark.parametrize(("name", "norms"), [("llama-3.1-8b", 2), ("gemma-2-9b", 4), ("gemma-3-12b", 4)])
def test_a_layer_calls_the_norms_that_its_family_has(name: str, norms: int) -> None:
    shape = ModelShape.from_config(CONFIGS[name])
    calls = sum(one.calls for one in dense_operators(shape) if one.name == "layernorm")
    assert calls == norms * shape.num_layers

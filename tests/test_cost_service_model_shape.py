"""Goal: a config.json is read as the model that it describes, or refused with the field that is wrong.

Method: published configurations against published sizes; one flaw at a time.
"""

import logging
from typing import Any

import pytest

from cost_service.model_shape import SEVEN_BILLION, ModelShape
from tests.model_configs import CONFIGS

ACTIVE_WEIGHTS = {  # published, less the embedding table, which a token does not pass
    "llama-2-7b": 6.74e9 - 0.13e9,
    "llama-3.1-8b": 8.03e9 - 0.53e9,
    "llama-3.1-70b": 70.6e9 - 1.05e9,
    "mistral-7b-v0.1": 7.24e9 - 0.13e9,
    "mixtral-8x7b": 12.9e9 - 0.13e9,
    "qwen2.5-7b": 7.62e9 - 0.54e9,
    "qwen3-32b": 32.8e9 - 0.78e9,
    "qwen3-30b-a3b": 3.35e9 - 0.31e9,
    "gemma-2-9b": 9.24e9,  # tied: the table is the LM head
    "phi-3-mini": 3.82e9 - 0.1e9,
    "deepseek-v2-lite": 2.66e9 - 0.21e9,
    "deepseek-v3": 37.5e9 - 0.93e9,
    "gpt2": 124e6 - 0.8e6,
    "opt-1.3b": 1.32e9,
}


@pytest.mark.parametrize("name", ACTIVE_WEIGHTS)
def test_the_weights_that_a_token_passes_are_the_published_ones(name: str) -> None:
    assert ModelShape.from_config(CONFIGS[name]).active_weights == pytest.approx(ACTIVE_WEIGHTS[name], rel=0.02)


def windows(name: str) -> list[int | None]:
    shape = ModelShape.from_config(CONFIGS[name])
    return sorted(
        (attention.window for (attention, _), count in shape.layers.items() for _ in range(count)), key=lambda w: w or 0
    )  # fmt: skip


def test_layers_have_the_windows_that_their_family_gives_them() -> None:
    assert windows("mistral-7b-v0.1") == [4096] * 32
    assert windows("gemma-2-9b") == [None] * 21 + [4096] * 21
    assert windows("gemma-3-12b") == [None] * 8 + [1024] * 40
    assert windows("gpt-oss-20b") == [None] * 12 + [128] * 12
    assert set(windows("qwen2.5-7b")) == {None}


def test_a_window_of_qwen_is_used_on_demand_only_and_by_its_last_layers() -> None:
    config = CONFIGS["qwen2.5-7b"] | {"sliding_window": 64, "max_window_layers": 20}

    def windowed(changes: dict[str, Any]) -> int:
        shape = ModelShape.from_config(config | changes)
        return sum(count for (attention, _), count in shape.layers.items() if attention.window == 64)

    assert windowed({"use_sliding_window": False}) == windowed({"use_sliding_window": None}) == 0
    assert windowed({"use_sliding_window": True}) == windowed({"use_sliding_window": True, "model_type": "qwen3"}) == 8


def test_falcons_share_one_kv_head_or_groups_of_them() -> None:
    for name, kv_heads in (("falcon-7b", 1), ("falcon-40b", 8)):
        ((attention, _),) = ModelShape.from_config(CONFIGS[name]).layers
        assert attention.num_kv_heads == kv_heads


def test_mixtures_have_experts_in_every_so_many_layers() -> None:
    shape = ModelShape.from_config(CONFIGS["qwen3-30b-a3b"] | {"decoder_sparse_step": 4, "mlp_only_layers": [3]})
    by_experts = {mlp.num_experts: count for (_, mlp), count in shape.layers.items()}
    assert by_experts == {0: 37, 128: 11}


def test_dense_first_layers_and_shared_experts_are_told_apart() -> None:
    shape = ModelShape.from_config(CONFIGS["deepseek-v3"])
    by_experts = {mlp.num_experts: (count, mlp.active_size) for (_, mlp), count in shape.layers.items()}
    assert by_experts == {0: (3, 18432), 256: (58, 9 * 2048)}


def test_what_is_not_known_is_taken_for_the_generic_form_and_said(caplog: pytest.LogCaptureFixture) -> None:
    config = CONFIGS["llama-2-7b"] | {"model_type": "brand_new"}
    with caplog.at_level(logging.WARNING):
        assert ModelShape.from_config(config) == SEVEN_BILLION
    assert "model_type 'brand_new', which is not known here" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "needs hidden_size as a whole number above 0: it is None"),
        ({"num_hidden_layers": 0}, "needs num_hidden_layers"),
        ({"num_attention_heads": "32"}, "needs num_attention_heads .* it is '32'"),
        ({"vocab_size": True}, "needs vocab_size"),
        ({"num_key_value_heads": -1}, "needs num_key_value_heads"),
        ({"intermediate_size": 1.5}, "needs intermediate_size"),
        ({"sliding_window": -4}, "has sliding_window -4"),
        ({"kv_lora_rank": 512}, "needs qk_nope_head_dim"),
        ({"num_experts": "8"}, "has num_experts '8'"),
        ({"intermediate_size": None}, "needs intermediate_size .* it is None"),
        ({"num_experts": 8}, "needs num_experts_per_tok .* it is None"),
    ],
)
def test_a_size_that_is_none_is_named_with_its_file(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^models/x/config.json {message}"):
        ModelShape.from_config(CONFIGS["llama-2-7b"] | change, source="models/x/config.json")

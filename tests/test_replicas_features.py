"""Goal: what is not shown to survive a preemption is refused before anything starts, and plain text models are not.

Method: the settings that switch a feature on, and shortened `config.json` files of models that have it or only name it.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from replicas.features import refused_feature

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "max_window_layers": 28,
    "sliding_window": 131072,
    "use_sliding_window": False,
}
FULL = "full_attention"


def refusal(engine_kwargs: dict[str, Any] | None = None, **hf_config: Any) -> str:
    """The sentence that refuses engine arguments or entries of a Llama's config."""
    said = refused_feature(engine_kwargs or {}, {**LLAMA, **hf_config})
    assert said is not None
    assert said.endswith(".")
    assert "\n" not in said
    return said


# Accepted


@pytest.mark.parametrize(
    "hf_config",
    [
        pytest.param({}, id="a hub id, whose config is not here yet"),
        pytest.param(LLAMA, id="Llama"),
        pytest.param(QWEN2, id="Qwen2, whose window is switched off"),
        pytest.param(
            {**QWEN2, "sliding_window": None, "layer_types": [FULL] * 28}, id="Qwen2 as newer libraries save it"
        ),
        pytest.param({**LLAMA, "model_type": "mistral", "sliding_window": None}, id="Mistral without a window"),
        pytest.param({**LLAMA, "layers_block_type": ["attention"] * 32}, id="attention in every layer"),
        pytest.param({**LLAMA, "attn_type_list": [1] * 32}, id="softmax attention in every layer"),
        pytest.param(
            {**LLAMA, "is_encoder_decoder": False, "vision_config": None}, id="a feature that is named as absent"
        ),
        pytest.param({**LLAMA, "kv_lora_rank": 512, "n_routed_experts": 64}, id="latent attention and experts"),
    ],
)
def test_a_plain_text_model_is_accepted(hf_config: dict[str, Any]) -> None:
    assert refused_feature({"block_size": 32, "enforce_eager": True}, hf_config) is None


@pytest.mark.parametrize(
    "engine_kwargs",
    [
        {"enable_lora": False, "lora_modules": None},
        {"speculative_config": None},
        {"pipeline_parallel_size": 1, "data_parallel_size": 1},
        {"trust_remote_code": False, "enable_prompt_embeds": False},
    ],
)
def test_a_feature_that_is_switched_off_by_name_is_accepted(engine_kwargs: dict[str, Any]) -> None:
    assert refused_feature(engine_kwargs, LLAMA) is None


# Refused by engine arguments


@pytest.mark.parametrize(
    ("engine_kwargs", "words"),
    [
        ({"enable_lora": True}, ["LoRA", "remove enable_lora"]),
        ({"lora_modules": [{"name": "a", "path": "b"}]}, ["LoRA", "lora_modules"]),
        ({"speculative_config": {"method": "ngram"}}, ["Speculative decoding", "remove speculative_config"]),
        ({"pipeline_parallel_size": 2}, ["Pipeline parallelism", "remove pipeline_parallel_size"]),
        ({"data_parallel_size": 2}, ["Data parallelism", "use more replicas"]),
        ({"trust_remote_code": True}, ["trust_remote_code", "a model that vLLM implements itself"]),
        ({"enable_prompt_embeds": True}, ["Prompt embeddings", "remove enable_prompt_embeds"]),
    ],
)
def test_a_feature_of_the_engine_is_refused_by_name_with_the_mend(
    engine_kwargs: dict[str, Any], words: list[str]
) -> None:
    said = refusal(engine_kwargs)
    assert all(word in said for word in words), said


# Refused by the model's config


@pytest.mark.parametrize(
    "hf_config",
    [
        {"vision_config": {"hidden_size": 1024}},
        {"audio_config": {"hidden_size": 1024}},
        {"visual": {"heads": 16}},
        {"vision_tower": "openai/clip-vit-large-patch14"},
        {"speech_config": {"hidden_size": 1024}},
        {"thinker_config": {"model_type": "qwen2_5_omni_thinker"}},
    ],
)
def test_a_multimodal_model_is_refused(hf_config: dict[str, Any]) -> None:
    assert "Multimodal models are not supported: choose a text model" in refusal(**hf_config)


@pytest.mark.parametrize(
    "hf_config",
    [
        pytest.param({"model_type": "mamba", "state_size": 16}, id="Mamba"),
        pytest.param({"model_type": "mamba2", "ssm_state_size": 128}, id="Mamba 2"),
        pytest.param({"model_type": "jamba", "mamba_d_state": 16}, id="Jamba"),
        pytest.param({"model_type": "granitemoehybrid", "mamba_n_heads": 128}, id="Granite hybrid"),
        pytest.param({"model_type": "qwen3_next", "linear_num_key_heads": 16}, id="linear attention"),
        pytest.param({"model_type": "lfm2", "conv_L_cache": 3}, id="convolutions"),
        pytest.param({"layer_types": [FULL, "sliding_attention"] * 16}, id="windows in some layers"),
        pytest.param({"layer_types": ["sliding_attention"] * 32}, id="windows in all layers"),
        pytest.param({"layer_types": [FULL, "linear_attention"]}, id="linear attention in some layers"),
        pytest.param({"layer_types": [FULL, "chunked_attention"]}, id="chunks in some layers"),
        pytest.param({"layers_block_type": ["attention", "mamba"]}, id="blocks of two kinds"),
        pytest.param({"model_type": "mistral", "sliding_window": 4096}, id="Mistral with a window"),
        pytest.param({"model_type": "nemotron_h", "hybrid_override_pattern": "M-M*"}, id="Nemotron-H"),
        pytest.param({"linear_attn_config": {"kda_layers": [1, 2, 3]}}, id="Kimi Linear"),
        pytest.param({"attn_type_list": [0, 0, 1]}, id="MiniMax"),
        pytest.param({"model_type": "deepseek_v32", "index_topk": 2048}, id="sparse attention with an index"),
        pytest.param({**QWEN2, "use_sliding_window": True}, id="Qwen2 whose window is switched on"),
    ],
)
def test_a_model_without_full_attention_in_every_layer_is_refused(hf_config: dict[str, Any]) -> None:
    assert "hybrid KV caches are not supported: choose one with full attention in every layer" in refusal(**hf_config)


def test_an_encoder_decoder_model_is_refused() -> None:
    assert "Encoder-decoder models are not supported: choose a decoder-only model" in refusal(is_encoder_decoder=True)


def test_the_settings_are_named_before_the_model_for_they_are_mended_sooner() -> None:
    assert "LoRA" in refusal({"enable_lora": True}, is_encoder_decoder=True)


# Refused by what vLLM knows, which is all there is for a hub id


@pytest.mark.engine
@pytest.mark.parametrize(
    "hf_config",
    [
        {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 64},
        {"architectures": ["MambaForCausalLM"], "model_type": "mamba", "state_size": 16},
    ],
    ids=["Mistral with a window", "Mamba"],
)
def test_the_engine_refuses_by_what_vllm_knows_of_the_model(tmp_path: Path, hf_config: dict[str, Any]) -> None:
    from vllm.config import ModelConfig

    from replicas.serve_engine import check_model

    config = {"hidden_size": 64, "num_attention_heads": 4, **hf_config}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model_config = ModelConfig(model=str(tmp_path), skip_tokenizer_init=True, max_model_len=128)
    with pytest.raises(ValueError, match="hybrid KV caches are not supported"):
        check_model(model_config)

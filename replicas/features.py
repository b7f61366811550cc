"""Features of vLLM that are not shown to survive a preemption here, and are therefore refused at start.

Rule: plain mappings in, one sentence out; the README's table lists the same features.
"""

from collections.abc import Mapping
from typing import Any

_MULTIMODAL_KEYS = ("vision_config", "audio_config", "visual", "vision_tower", "speech_config", "thinker_config")
_HYBRID_KEYS = (
    "mamba_d_state",
    "ssm_state_size",
    "state_size",
    "linear_num_key_heads",
    "mamba_n_heads",
    "conv_L_cache",
    "hybrid_override_pattern",
    "linear_attn_config",
    "index_topk",
)


def refused_feature(engine_kwargs: Mapping[str, Any], hf_config: Mapping[str, Any]) -> str | None:
    """Name the first feature that may not be used, as one sentence with the mend, or None.

    Args:
        engine_kwargs: vLLM engine arguments as configured.
        hf_config: The model's `config.json`.
    """
    if engine_kwargs.get("enable_lora") or engine_kwargs.get("lora_modules"):
        return "LoRA is not supported: remove enable_lora and lora_modules from engine_kwargs."
    if engine_kwargs.get("speculative_config") is not None:
        return "Speculative decoding is not supported: remove speculative_config from engine_kwargs."
    if engine_kwargs.get("pipeline_parallel_size", 1) != 1:
        return "Pipeline parallelism is not supported: remove pipeline_parallel_size from engine_kwargs."
    if engine_kwargs.get("data_parallel_size", 1) != 1:
        return "Data parallelism inside a replica is not supported: use more replicas instead."
    if engine_kwargs.get("trust_remote_code"):
        return "trust_remote_code is not supported: use a model that vLLM implements itself."
    if engine_kwargs.get("enable_prompt_embeds"):
        return "Prompt embeddings are not supported: remove enable_prompt_embeds from engine_kwargs."
    return refused_model(
        multimodal=any(hf_config.get(key) for key in _MULTIMODAL_KEYS),
        hybrid=_has_hybrid_cache(hf_config),
        encoder_decoder=bool(hf_config.get("is_encoder_decoder")),
    )


def refused_model(*, multimodal: bool, hybrid: bool, encoder_decoder: bool) -> str | None:
    """Name the first property of a model for which it may not be served, as one sentence with the mend, or None."""
    if multimodal:
        return "Multimodal models are not supported: choose a text model."
    if hybrid:
        return "Models with hybrid KV caches are not supported: choose one with full attention in every layer."
    if encoder_decoder:
        return "Encoder-decoder models are not supported: choose a decoder-only model."
    return None


def _has_hybrid_cache(hf_config: Mapping[str, Any]) -> bool:
    if any(hf_config.get(key) for key in _HYBRID_KEYS):
        return True
    layer_types = hf_config.get("layer_types") or hf_config.get("layers_block_type") or []
    if any(kind not in ("full_attention", "attention") for kind in layer_types):
        return True
    if any(kind != 1 for kind in hf_config.get("attn_type_list") or []):  # MiniMax: 1 is softmax attention, 0 linear
        return True
    # A window over every layer is one cache, but blocks outside it are freed: also not shown to be exact.
    return bool(hf_config.get("sliding_window")) and hf_config.get("use_sliding_window", True) is not False

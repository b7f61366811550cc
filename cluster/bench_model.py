"""The model of a benchmark: the folder that was named, or one with random weights that is made."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster import models
from cluster.config import default_home

TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "intermediate_size": 256,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
}  # fmt: skip
SMALL: dict[str, Any] = TINY | {"hidden_size": 256, "intermediate_size": 768, "num_key_value_heads": 4}
"""On CPU a token of its prefill costs a hundredth of a decode step, as with large models on a GPU; of the tiny one less."""

LLAMA_8B: dict[str, Any] = TINY | {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
}  # fmt: skip
"""The shape of Llama-3.1-8B. vLLM makes its weights up on the device, so that tokens mean nothing and only times count."""

RANDOM_MODELS = {"tiny": TINY, "small": SMALL, "llama-8b": LLAMA_8B}
DUMMY = frozenset({"llama-8b"})
"""Those whose weights are too large to be written down."""


def model_folder(source: str | None, made: Path, *, config: dict[str, Any]) -> Path:
    """Return the folder of the model to run; one with random weights of that config is written for no source.

    Raises:
        ValueError: It is no folder with a model.
    """
    if source is None:
        write_model(made, config, weights=config is not LLAMA_8B)
        return made
    folder = models.require(source, default_home())
    if folder is None:
        raise ValueError("--model must be a folder in Hugging Face layout: fetch the model and name its folder.")
    return folder


def number_in(config: Mapping[str, Any], key: str) -> int:
    """A limit that a model's config states.

    Raises:
        ValueError: It states none.
    """
    limit = config.get(key)
    if not isinstance(limit, int) or limit < 1:
        raise ValueError(f"The model's config.json must have a whole number for {key}, above 0.")
    return limit


def write_model(folder: Path, config: dict[str, Any], *, weights: bool) -> None:
    """Write a Llama; its random weights, if they are wanted, make its next token hang on all of its KV cache.

    Why not vLLM's dummy weights: they are so small that attention hardly reaches the logits, so that an engine which
    loads the wrong KV blocks delivers the right tokens, and `--check-exact` would show nothing.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if not weights:
        return
    import numpy as np
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    width, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv_width = width // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"model.embed_tokens": (vocabulary, width, width**0.5), "lm_head": (vocabulary, width, 2.0)}
    norms = ["model.norm"]
    for layer in (f"model.layers.{number}" for number in range(config["num_hidden_layers"])):
        norms += [f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"]
        shapes |= {
            f"{layer}.self_attn.q_proj": (width, width, 3.0),  # attends to few tokens, not to all alike
            f"{layer}.self_attn.k_proj": (kv_width, width, 1.0),
            f"{layer}.self_attn.v_proj": (kv_width, width, 2.0),
            f"{layer}.self_attn.o_proj": (width, width, 2.0),
            f"{layer}.mlp.gate_proj": (inner, width, 1.0),
            f"{layer}.mlp.up_proj": (inner, width, 1.0),
            f"{layer}.mlp.down_proj": (width, inner, 1.0),
        }
    tensors = {f"{name}.weight": np.ones(width, np.float32) for name in norms}
    for name, (rows, columns, gain) in shapes.items():
        matrix = rng.standard_normal((rows, columns), dtype=np.float32)
        tensors[f"{name}.weight"] = (matrix * (gain / columns**0.5)).astype(np.float32)
    save_file(tensors, folder / "model.safetensors")

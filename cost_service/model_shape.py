"""What a decoder-only transformer consists of, read from its `config.json` of Hugging Face.

Covered: multi-head, grouped-query and multi-head latent attention, sliding windows on all or some layers, plain and gated
MLPs, mixtures of experts with shared experts and dense first layers, normalised queries and keys. An architecture that is
not among `KNOWN` is read as the generic form (gated MLP, full attention, from the fields that are there), with a warning.
"""

import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

logger = logging.getLogger(__name__)

PLAIN_MLP = {"gpt2", "opt", "gpt_neox", "gpt_bigcode", "falcon", "phi", "starcoder2", "bloom", "mpt", "gptj"}
"""Model types whose MLP has two matrices and no gate."""

NORMED_HEADS = {"qwen3", "qwen3_moe", "gemma3", "gemma3_text", "olmo2", "cohere2"}
"""Model types that normalise queries and keys."""

KNOWN = PLAIN_MLP | NORMED_HEADS | {
    "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "gemma", "gemma2", "phi3", "deepseek_v2", "deepseek_v3", "gpt_oss",
    "olmo", "smollm3", "granite", "stablelm", "internlm2", "yi", "cohere", "exaone", "ministral",
}  # fmt: skip

FOUR_NORMS = {"gemma2", "gemma3", "gemma3_text"}
"""Model types that normalise behind attention and MLP too, not only before them."""

ALIASES = {
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "num_hidden_layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "num_key_value_heads": ("n_head_kv", "num_kv_heads", "num_key_value_heads"),
    "num_experts_per_tok": ("num_experts_per_tok", "experts_per_token"),
    "vocab_size": ("vocab_size",),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """One layer's attention."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    """Of queries and keys."""

    value_size: int
    """Of values, per head."""

    window: int | None = None
    """Tokens that a token sees, itself included; None: all before it."""

    latent: tuple[int, int, int] | None = None
    """Multi-head latent attention: ranks of queries (0: not compressed) and of keys and values, and rotary size; None:
    keys and values are stored per head."""

    normed: bool = False
    """Whether queries and keys are normalised."""

    def kv_elements(self, parallelism: int) -> int:
        """Numbers that one token stores in this layer on one rank; with more ranks than KV heads each holds one head."""
        if self.latent is not None:
            return self.latent[1] + self.latent[2]
        return max(1, self.num_kv_heads // parallelism) * (self.head_size + self.value_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    """One layer's MLP, or its experts."""

    inner_size: int
    gated: bool = True
    num_experts: int = 0
    """0: no mixture."""

    num_experts_per_token: int = 0
    shared_size: int = 0
    """Inner size of the experts that every token passes."""

    gates_shared: bool = False
    """Whether a gate of one output weighs the shared experts, as in Qwen2-MoE."""

    @property
    def num_matrices(self) -> int:
        """Matrices of hidden_size x inner_size."""
        return 3 if self.gated else 2

    @property
    def active_size(self) -> int:
        """Inner size that one token passes."""
        return self.inner_size * (self.num_experts_per_token if self.num_experts else 1) + self.shared_size


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a model, and its layers by kind."""

    hidden_size: int
    vocab_size: int
    layers: Mapping[tuple[Attention, Mlp], int] = field(hash=False)
    """How many layers there are of each kind."""

    norms_per_layer: int = 2
    """Over the hidden size; those of heads and latents not counted."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, source: str = "The model's config.json") -> Self:
        """Read a config; of a multi-modal one its `text_config`.

        Args:
            source: The file, for messages.

        Raises:
            ValueError: A size is missing or no whole number above 0.
        """
        nested = config.get("text_config") or config.get("llm_config")
        fields = _Fields(nested if isinstance(nested, Mapping) else config, source)
        if fields.kind not in KNOWN:
            logger.warning(
                "%s has model_type %r, which is not known here: it is taken for a gated MLP and full attention.",
                source, fields.kind,
            )  # fmt: skip
        num_layers = fields.size("num_hidden_layers")
        kinds = Counter((fields.attention(layer), fields.mlp(layer)) for layer in range(num_layers))
        return cls(
            hidden_size=fields.size("hidden_size"), vocab_size=fields.size("vocab_size"), layers=dict(kinds),
            norms_per_layer=4 if fields.kind in FOUR_NORMS else 2,
        )  # fmt: skip

    @property
    def num_layers(self) -> int:
        """Layers of all kinds."""
        return sum(self.layers.values())

    @property
    def active_weights(self) -> int:
        """Weights that one token passes, embedding table excluded."""
        per_layer = sum(
            count
            * (_attention_weights(attention, self.hidden_size) + self.hidden_size * mlp.num_matrices * mlp.active_size)
            for (attention, mlp), count in self.layers.items()
        )
        return per_layer + self.hidden_size * self.vocab_size

    @property
    def attention_width(self) -> int:
        """Layers x heads x (d_qk + d_v) / 2."""
        return sum(
            count * attention.num_heads * (attention.head_size + attention.value_size) // 2
            for (attention, _), count in self.layers.items()
        )


def _attention_weights(attention: Attention, hidden_size: int) -> int:
    heads, out = attention.num_heads, attention.num_heads * attention.value_size * hidden_size
    if attention.latent is None:
        keys, values = attention.num_kv_heads * attention.head_size, attention.num_kv_heads * attention.value_size
        return hidden_size * (heads * attention.head_size + keys + values) + out
    query_rank, kv_rank, rotary = attention.latent
    query = heads * attention.head_size
    queries = query_rank * (hidden_size + query) if query_rank else hidden_size * query
    up = kv_rank * heads * (attention.head_size - rotary + attention.value_size)
    return queries + hidden_size * (kv_rank + rotary) + up + out


SEVEN_BILLION = ModelShape(
    hidden_size=4096,
    vocab_size=32000,
    layers={(Attention(num_heads=32, num_kv_heads=32, head_size=128, value_size=128), Mlp(inner_size=11008)): 32},
)
"""Llama-2-7B, for models whose sizes cannot be read."""


class _Fields:
    """A config's values under whatever name they have."""

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        self._config, self._source = config, source
        self.kind = str(config.get("model_type", ""))

    def size(self, name: str, default: int | None = None) -> int:
        value = next(
            (self._config[alias] for alias in ALIASES.get(name, (name,)) if self._config.get(alias) is not None),
            default,
        )
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise ValueError(f"{self._source} needs {name} as a whole number above 0: it is {value!r}.")
        return value

    def count(self, *names: str) -> int:
        """A number that may be missing, null or 0."""
        value = next((self._config[name] for name in names if self._config.get(name) is not None), 0)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{self._source} has {names[0]} {value!r}: it must be a whole number and not negative.")
        return value

    def attention(self, layer: int) -> Attention:
        heads = self.size("num_attention_heads")
        if self.count("kv_lora_rank"):
            nope, rotary = self.size("qk_nope_head_dim"), self.size("qk_rope_head_dim")
            latent = (self.count("q_lora_rank"), self.size("kv_lora_rank"), rotary)
            return Attention(
                num_heads=heads,
                num_kv_heads=1,
                head_size=nope + rotary,
                value_size=self.size("v_head_dim"),
                latent=latent,
            )
        kv_heads = 1 if self._shares_one_kv_head() else self.size("num_key_value_heads", heads)
        head_size = self.size("head_dim", self.size("hidden_size") // heads)
        return Attention(
            num_heads=heads, num_kv_heads=kv_heads, head_size=head_size, value_size=head_size, window=self.window(layer),
            normed=self.kind in NORMED_HEADS,
        )  # fmt: skip

    def _shares_one_kv_head(self) -> bool:
        """Falcon's later architecture has groups of heads although its configs say `multi_query`."""
        return bool(self._config.get("multi_query")) and not self._config.get("new_decoder_architecture")

    def window(self, layer: int) -> int | None:
        """The layer's window; `layer_types` says which have one, else the habit of the model's family does."""
        window = self.count("sliding_window") or None
        # Qwen's configs name a window that is used only on demand; other families know no such switch.
        if window is None or not self._config.get("use_sliding_window", not self.kind.startswith("qwen")):
            return None
        types = self._config.get("layer_types")
        if isinstance(types, list) and len(types) == self.size("num_hidden_layers"):
            return window if types[layer] == "sliding_attention" else None
        if self.kind == "gemma2":
            return window if layer % 2 == 0 else None
        if pattern := self.count("sliding_window_pattern", "_sliding_window_pattern"):
            return window if (layer + 1) % pattern else None
        if self.kind in ("gemma3", "gemma3_text"):
            return window if (layer + 1) % 6 else None
        if self.kind in ("qwen2", "qwen3"):
            return window if layer >= self.count("max_window_layers") else None
        return window

    def mlp(self, layer: int) -> Mlp:
        gated = self.kind not in PLAIN_MLP
        experts = self.count("num_experts", "num_local_experts", "n_routed_experts")
        # Plain MLPs are four times as wide where nothing else is said; gated ones have no such custom.
        inner = self.size("intermediate_size", None if gated else 4 * self.size("hidden_size"))
        if not experts or self._is_dense(layer):
            return Mlp(inner_size=inner, gated=gated)
        expert_size = self.count("moe_intermediate_size") or inner
        shared = self.count("shared_expert_intermediate_size") or self.count("n_shared_experts") * expert_size
        return Mlp(
            inner_size=expert_size, gated=gated, num_experts=experts, shared_size=shared,
            num_experts_per_token=self.size("num_experts_per_tok"),
            gates_shared=self.count("shared_expert_intermediate_size") > 0,
        )  # fmt: skip

    def _is_dense(self, layer: int) -> bool:
        """Whether a layer of a mixture of experts has none."""
        listed = layer in (self._config.get("mlp_only_layers") or [])
        skipped = (layer + 1) % (self.count("decoder_sparse_step") or 1) != 0
        return listed or skipped or layer < self.count("first_k_dense_replace")


def read_config(path: Path) -> dict[str, Any]:
    """Read a model's `config.json`.

    Raises:
        ValueError: There is none, or it is no JSON object.
    """
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): give a model's config.json.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, as Hugging Face writes it.")
    return config

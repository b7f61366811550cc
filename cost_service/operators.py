"""FLOPs and bytes of every operator of a step, from a model's shape and what is in the batch (one tensor-parallel rank).

Rules:
- One FLOP is a multiplication or an addition. A matrix product of n rows takes 2 * n * inputs * outputs.
- Bytes are those that must be moved once: inputs, outputs and the weights that are touched. Of E experts, n tokens that
  choose k each by chance touch E * (1 - (1 - k / E)^n) in the mean.
- Causal attention of n new tokens behind r cached ones reads n * r + n * (n + 1) / 2 pairs; a window of w leaves each token
  at most w of them.
- Latent attention is counted as vLLM executes it. Decodes are absorbed: scores against the latent for all heads, and the
  products that lead to the latent and back take the FLOPs of `kv_b_proj`, as which they are counted. Prefills are expanded
  to heads; what is cached before a prefill is expanded anew, which is counted as attention: pieces take more than a whole.
- Logits are computed for one token of each request, as vLLM does.
- Names are those of vLLM's profiles; operators whose weights are split over ranks are counted as one rank's share, norms,
  embedding and what is fused into them are whole on every rank.

Source of the formulas: Kaplan et al. (arXiv 2001.08361, appendix B) for dense layers; DeepSeek-V2 (arXiv 2405.04434, section
2.1) for latent attention; vLLM 0.29 `model_executor/models/llama.py` and `layers/mla.py` for what runs as one operator.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cost_service.model_shape import Attention, Mlp, ModelShape

Array = NDArray[np.float64]

MATMUL, ATTENTION, STREAM, COLLECTIVE = "matmul", "attention", "stream", "collective"
"""Families: limited by FLOPs where there are enough rows; by both; by bytes; by the links between ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What one step computes."""

    prefills: tuple[tuple[int, int], ...] = ()
    """Of each prefill the new tokens, and those cached before them."""

    decodes: tuple[int, ...] = ()
    """Of each decode the KV tokens that it reads, its own included."""

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(new for new, _ in self.prefills) + len(self.decodes)

    @property
    def num_sequences(self) -> int:
        """Requests in the step."""
        return len(self.prefills) + len(self.decodes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """Bytes per element."""

    weights: float = 2.0
    activations: float = 2.0
    kv: float = 2.0


HALF = Precision()
"""Sixteen bits everywhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """One operator of a model on one rank: one call computes a number of rows, tokens or requests."""

    name: str
    family: str
    calls: int
    """Per step: layers that have it."""

    row_flops: float
    row_bytes: float
    """Inputs and outputs of a row."""

    weight_bytes: float = 0.0
    experts: tuple[int, int] = (1, 1)
    """Experts that the weights are of, and that a row passes."""

    per_sequence: bool = False
    """Whether its rows are requests."""

    def flops(self, rows: Array) -> Array:
        """FLOPs of one call."""
        return self.row_flops * rows

    def bytes_moved(self, rows: Array) -> Array:
        """Bytes of one call."""
        experts, chosen = self.experts
        touched = 1.0 - (1.0 - chosen / experts) ** rows if chosen < experts else 1.0
        moved: Array = self.row_bytes * rows + self.weight_bytes * touched
        return moved


def dense_operators(shape: ModelShape, *, parallelism: int = 1, precision: Precision = HALF) -> tuple[Operator, ...]:
    """Every operator whose cost depends only on the number of rows: all but attention."""
    hidden, act = shape.hidden_size, precision.activations
    operators = [
        Operator(name="embedding", family=STREAM, calls=1, row_flops=0.0, row_bytes=2 * act * hidden),
        _norm("final_layernorm", 1, hidden, act),
    ]
    for (attention, mlp), count in shape.layers.items():
        operators += _attention_operators(attention, count, hidden, parallelism, precision)
        operators += _mlp_operators(mlp, count, hidden, parallelism, precision)
        operators.append(_norm("layernorm", shape.norms_per_layer * count, hidden, act))
        if parallelism > 1:  # a ring all-reduce sends and receives each row twice, but for one rank's share of it
            sent = 4 * act * hidden * (parallelism - 1) / parallelism
            operators.append(
                Operator(name="all_reduce", family=COLLECTIVE, calls=2 * count, row_flops=0.0, row_bytes=sent)
            )  # fmt: skip
    operators.append(_matmul("lm_head", 1, hidden, shape.vocab_size / parallelism, precision, per_sequence=True))
    return tuple(operators)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionWork:
    """One layer's attention for one batch on one rank."""

    flops: float
    bytes_moved: float


def attention_work(
    attention: Attention, batch: Batch, *, parallelism: int = 1, precision: Precision = HALF
) -> AttentionWork:
    """FLOPs and bytes of one layer's attention over a batch."""
    heads = attention.num_heads / parallelism
    flops = moved = 0.0
    kv_token_bytes = precision.kv * attention.kv_elements(parallelism)
    for new, cached in batch.prefills:
        flops += 2 * heads * (attention.head_size + attention.value_size) * _pairs(new, cached, attention.window)
        moved += kv_token_bytes * _kv_tokens(new, cached, attention.window)
        if attention.latent is not None:
            flops += 2 * cached * attention.latent[1] * _expanded_width(attention, heads)
    if attention.latent is None:
        decode_width = attention.head_size + attention.value_size
    else:  # absorbed: scores against latent and rotary part, sums of latents
        _, kv_rank, rotary = attention.latent
        decode_width = 2 * kv_rank + rotary
    for context in batch.decodes:
        seen = min(context, attention.window or context)
        flops += 2 * heads * decode_width * seen
        moved += kv_token_bytes * seen
    query_bytes = heads * (attention.head_size + attention.value_size) * precision.activations
    return AttentionWork(flops=flops, bytes_moved=moved + batch.num_tokens * query_bytes)


def total_flops(shape: ModelShape, batch: Batch, *, parallelism: int = 1) -> float:
    """FLOPs of a whole step on one rank."""
    total = sum(
        count * attention_work(attention, batch, parallelism=parallelism).flops
        for (attention, _), count in shape.layers.items()
    )
    for operator in dense_operators(shape, parallelism=parallelism):
        rows = batch.num_sequences if operator.per_sequence else batch.num_tokens
        total += operator.calls * operator.row_flops * rows
    return total


def _attention_operators(
    attention: Attention, count: int, hidden: int, parallelism: int, precision: Precision
) -> Sequence[Operator]:
    heads, kv_heads = attention.num_heads / parallelism, max(1.0, attention.num_kv_heads / parallelism)
    queries, out = heads * attention.head_size, heads * attention.value_size
    act = precision.activations
    operators = []
    if attention.latent is None:
        keys = kv_heads * attention.head_size
        operators.append(
            _matmul("qkv_proj", count, hidden, queries + keys + kv_heads * attention.value_size, precision)
        )
        rotated = queries + keys
    else:
        query_rank, kv_rank, rotary = attention.latent
        # Down to both ranks is one operator and whole on every rank, up to the heads is another.
        operators.append(_matmul("qkv_a_proj", count, hidden, (query_rank or queries) + kv_rank + rotary, precision))
        if query_rank:
            operators.append(_matmul("q_b_proj", count, query_rank, queries, precision))
        operators.append(_matmul("kv_b_proj", count, kv_rank, _expanded_width(attention, heads), precision))
        rotated = (heads + 1) * rotary
    if attention.normed:
        operators.append(_elementwise("qk_norm", count, rotated, rotated, 4.0, act))
    operators.append(_elementwise("rotary_emb", count, rotated, rotated, 3.0, act))
    operators.append(_matmul("o_proj", count, out, hidden, precision))
    return operators


def _mlp_operators(mlp: Mlp, count: int, hidden: int, parallelism: int, precision: Precision) -> Sequence[Operator]:
    ups = 2 if mlp.gated else 1
    up, down = ("gate_up_proj", "down_proj") if mlp.gated else ("up_proj", "down_proj")
    operators = []
    if mlp.num_experts:
        experts, chosen, inner = mlp.num_experts, mlp.num_experts_per_token, mlp.inner_size / parallelism
        operators.append(_matmul("router", count, hidden, experts + mlp.gates_shared, precision))
        for name, inputs, outputs in (("experts_up", hidden, ups * inner), ("experts_down", inner, hidden)):
            one = _matmul(name, count, inputs, outputs, precision)
            operators.append(
                Operator(
                    name=name, family=MATMUL, calls=count, row_flops=chosen * one.row_flops,
                    row_bytes=chosen * one.row_bytes, weight_bytes=experts * one.weight_bytes, experts=(experts, chosen),
                )
            )  # fmt: skip
        operators.append(
            _elementwise("experts_act_fn", count, chosen * ups * inner, chosen * inner, 5.0, precision.activations)
        )
    if dense := mlp.shared_size if mlp.num_experts else mlp.inner_size:
        inner = dense / parallelism
        operators.append(_matmul(up, count, hidden, ups * inner, precision))
        operators.append(_elementwise("act_fn", count, ups * inner, inner, 5.0, precision.activations))
        operators.append(_matmul(down, count, inner, hidden, precision))
    return operators


def _matmul(
    name: str, calls: int, inputs: float, outputs: float, precision: Precision, *, per_sequence: bool = False
) -> Operator:
    return Operator(
        name=name, family=MATMUL, calls=calls, row_flops=2.0 * inputs * outputs,
        row_bytes=precision.activations * (inputs + outputs), weight_bytes=precision.weights * inputs * outputs,
        per_sequence=per_sequence,
    )  # fmt: skip


def _norm(name: str, calls: int, hidden: int, element_bytes: float) -> Operator:
    """RMS norm with the residual added: reads and writes both."""
    return _elementwise(name, calls, 2.0 * hidden, 2.0 * hidden, 2.5, element_bytes)


def _elementwise(
    name: str, calls: int, read: float, written: float, flops_per_element: float, element_bytes: float
) -> Operator:
    return Operator(
        name=name, family=STREAM, calls=calls, row_flops=flops_per_element * read,
        row_bytes=element_bytes * (read + written),
    )  # fmt: skip


def _expanded_width(attention: Attention, heads: float) -> float:
    """Keys without their rotary part, and values, of all heads of one latent."""
    assert attention.latent is not None
    return heads * (attention.head_size - attention.latent[2] + attention.value_size)


def _pairs(new: int, cached: int, window: int | None) -> float:
    """Pairs of a query and a token that it sees."""
    if window is None or cached + new <= window:
        return new * cached + new * (new + 1) / 2
    whole = max(0, window - cached)  # queries that still see everything before them
    return whole * cached + whole * (whole + 1) / 2 + (new - whole) * window


def _kv_tokens(new: int, cached: int, window: int | None) -> int:
    """Tokens whose KV some query of the prefill sees."""
    return new + (cached if window is None else min(cached, window - 1))

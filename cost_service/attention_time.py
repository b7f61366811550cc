"""Seconds that one layer's attention kernel takes for a batch: a model of thread blocks on a GPU, times a learned residual.

Method: FlashAttention gives a thread block to every tile of prefill queries and head, and to every decoding request and
head; each walks over its KV tokens one after another. A kernel of that kind takes as long as the longest of
    its longest walk                            token_s * longest
    all walks over the blocks that run at once  token_s * walked / slots
    reading the KV                              kv_bytes / bytes_per_s
in a p-norm, for what is nearly the longest counts too. Batches of decodes alone run another kernel (query heads that share
KV are one block) and have coefficients of their own. Sources: FlashAttention-2 (arXiv 2307.08691, section 3.2); fitted to
profiles of two GPUs, `slots` comes out close to their number of multiprocessors.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
from numpy.typing import NDArray

from cost_service.rates import fit_rates, p_norm
from cost_service.residual import Estimate, Residual

Array = NDArray[np.float64]

TILE_TOKENS = 64
"""Prefill queries per thread block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """One layer's attention on one rank."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    kv_element_bytes: float = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionWork:
    """What batches ask of an attention kernel: columns of equal length, one row per batch."""

    prefill_tokens: Array
    prefill_tiles: Array
    prefill_walked: Array
    """KV tokens that the tiles of one head walk over together."""

    prefill_longest: Array
    """KV tokens of the longest prefill; 0 without any."""

    prefill_kv_tokens: Array
    num_decodes: Array
    decode_walked: Array
    """KV tokens of all decoding requests."""

    decode_longest: Array

    @classmethod
    def of_grid(
        cls, *, prefill_tokens: Array, cached_tokens: Array, num_decodes: Array, decode_tokens: Array,
        longest_decode: Array | None = None,
    ) -> Self:  # fmt: skip
        """Batches of at most one prefill (new tokens behind cached ones) and decodes of one mean context."""
        some, tiles = prefill_tokens > 0, np.ceil(prefill_tokens / TILE_TOKENS)
        causal = np.minimum(TILE_TOKENS * tiles * (tiles + 1) / 2, tiles * prefill_tokens)
        context = np.where(some, cached_tokens + prefill_tokens, 0.0)
        longest = decode_tokens if longest_decode is None else longest_decode
        return cls(
            prefill_tokens=prefill_tokens,
            prefill_tiles=tiles,
            prefill_walked=tiles * cached_tokens + causal,
            prefill_longest=context,
            prefill_kv_tokens=context,
            num_decodes=num_decodes,
            decode_walked=num_decodes * decode_tokens,
            decode_longest=np.where(num_decodes > 0, longest, 0.0),
        )

    @classmethod
    def of_batch(cls, prefills: Sequence[tuple[int, int]], decodes: Sequence[int]) -> Self:
        """One batch: prefills as (new tokens, cached tokens), decodes as contexts."""
        new, cached = np.array([*prefills, (0, 0)], dtype=np.float64).T
        zero = np.zeros(len(new))
        one = cls.of_grid(prefill_tokens=new, cached_tokens=cached, num_decodes=zero, decode_tokens=zero)
        return cls(
            prefill_tokens=one.prefill_tokens.sum(keepdims=True),
            prefill_tiles=one.prefill_tiles.sum(keepdims=True),
            prefill_walked=one.prefill_walked.sum(keepdims=True),
            prefill_longest=one.prefill_longest.max(keepdims=True),
            prefill_kv_tokens=one.prefill_kv_tokens.sum(keepdims=True),
            num_decodes=np.array([float(len(decodes))]),
            decode_walked=np.array([float(sum(decodes))]),
            decode_longest=np.array([float(max(decodes, default=0))]),
        )

    def rows(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> Self:
        """Return the chosen rows."""
        return type(self)(**{field.name: getattr(self, field.name)[chosen] for field in fields(self)})

    def __len__(self) -> int:
        return len(self.num_decodes)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCosts:
    """Coefficients of one kernel."""

    launch_s: float
    block_s: float
    """Per thread block."""

    token_s: float
    """Per KV token of a walk."""

    slots: float
    """Thread blocks that run at once."""

    bytes_per_s: float
    norm: float

    def seconds(self, blocks: Array, walked: Array, longest: Array, num_bytes: Array) -> Array:
        """Return what the base says for rows of thread blocks, tokens walked in all, longest walk and bytes read."""
        walks = (self.token_s * longest, self.token_s * walked / self.slots)
        return self.launch_s + self.block_s * blocks + p_norm(self.norm, *walks, num_bytes / self.bytes_per_s)


STARTS = (
    KernelCosts(launch_s=5e-6, block_s=1e-8, token_s=2e-8, slots=150.0, bytes_per_s=1.4e12, norm=3.0),
    KernelCosts(launch_s=5e-7, block_s=1e-11, token_s=1e-10, slots=4.0, bytes_per_s=1e10, norm=1.0),
    KernelCosts(launch_s=1e-3, block_s=3e-6, token_s=1e-5, slots=4000.0, bytes_per_s=2e13, norm=8.0),
)
"""Where a fit begins, and the least and the most of each coefficient: from a slow core to the fastest GPU."""


def _fit_kernel(columns: Sequence[Array], measured_s: Array) -> KernelCosts:
    return fit_rates(STARTS, lambda costs: costs.seconds(*columns), measured_s)


class AttentionTime:
    """Time of attention on one kind of GPU, for any shape of heads."""

    def __init__(self) -> None:
        self.mixed, self.decode = STARTS[0], STARTS[0]
        self.residual = Residual()

    def fit(self, samples: Sequence[tuple[AttentionShape, AttentionWork, Array]]) -> None:
        """Learn from measured batches (seconds per row), of one or several shapes.

        Raises:
            ValueError: No samples, or seconds that are not finite and above 0.
        """
        measured_s = np.concatenate([seconds for _, _, seconds in samples]) if samples else np.zeros(0)
        for name in ("mixed", "decode"):
            parts = [(_columns(shape, work), _alone(work) == (name == "decode"), s) for shape, work, s in samples]
            columns = tuple(np.concatenate([c[i][chosen] for c, chosen, _ in parts]) for i in range(4)) if parts else ()
            seconds = np.concatenate([s[chosen] for _, chosen, s in parts]) if parts else np.zeros(0)
            if len(seconds) >= len(fields(KernelCosts)):
                setattr(self, name, _fit_kernel(columns, seconds))
        features = [self._features(shape, work) for shape, work, _ in samples]
        bases = [self.base_s(shape, work) for shape, work, _ in samples]
        empty = (np.zeros((0, 1)), np.zeros(0))
        sizes = np.concatenate([_longest(work) for _, work, _ in samples]) if samples else None
        self.residual.fit(
            *((np.concatenate(features), np.concatenate(bases)) if samples else empty), measured_s, sizes=sizes
        )

    def base_s(self, shape: AttentionShape, work: AttentionWork) -> Array:
        """Seconds by the physical base alone."""
        columns = _columns(shape, work)
        return np.where(_alone(work), self.decode.seconds(*columns), self.mixed.seconds(*columns))

    def predict(self, shape: AttentionShape, work: AttentionWork) -> Estimate:
        """Seconds of one layer, per row."""
        return self.residual.estimate(self._features(shape, work), self.base_s(shape, work), sizes=_longest(work))

    def _features(self, shape: AttentionShape, work: AttentionWork) -> Array:
        blocks, walked, longest, _ = _columns(shape, work)
        return np.column_stack(
            (
                np.log2(1 + work.prefill_tokens),
                np.log2(1 + work.num_decodes),
                work.prefill_walked / (work.prefill_walked + work.decode_walked + 1),
                np.log2((1 + work.prefill_longest) / (1 + work.decode_longest)),
                np.log2((1 + longest) * shape.num_heads / (1 + walked)),
                np.log2(self.base_s(shape, work)),
                np.log2(1 + blocks),
                np.full(len(work), np.log2(shape.num_heads)),
            )
        )


def _alone(work: AttentionWork) -> NDArray[np.bool_]:
    return work.prefill_tokens == 0


def _longest(work: AttentionWork) -> Array:
    """KV tokens of the longest walk."""
    longest: Array = np.maximum(work.prefill_longest, work.decode_longest)
    return longest


def _columns(shape: AttentionShape, work: AttentionWork) -> tuple[Array, Array, Array, Array]:
    """Thread blocks, tokens walked in all, longest walk, bytes read."""
    decode_heads = np.where(_alone(work), shape.num_kv_heads, shape.num_heads)
    blocks = shape.num_heads * work.prefill_tiles + decode_heads * work.num_decodes
    walked = shape.num_heads * work.prefill_walked + decode_heads * work.decode_walked
    longest = _longest(work)
    kv_bytes = 2 * shape.num_kv_heads * shape.head_size * shape.kv_element_bytes
    return blocks, walked, longest, kv_bytes * (work.prefill_kv_tokens + work.decode_walked)

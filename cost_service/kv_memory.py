"""Exact bytes of a model's KV cache, as vLLM lays it out: per token, block, layer and rank; and what a preemption frees.

Rules:
- A layer stores keys and values of the rank's heads; with more ranks than KV heads each rank holds one head, repeated.
  Latent attention stores one vector of latent and rotary part, whole on every rank.
- Layers of one kind form one group. A hybrid model (full and windowed layers) has several groups of equally many layers,
  padded; every group has a block table of its own over one pool, so that a block holds one group's layers.
- A windowed group keeps the blocks of the last `window - 1` tokens only; with a connector that does not support hybrid
  caches vLLM keeps them all, in one group (`hybrid=False`).

Source: vLLM 0.29 `v1/kv_cache_interface.py` (`AttentionSpec.unpadded_page_size_bytes`), `v1/core/kv_cache_utils.py`
(`_get_kv_cache_groups_uniform_page_size`, `_get_kv_cache_bytes_per_block`), `v1/core/single_type_kv_cache_manager.py`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cost_service.model_shape import ModelShape

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
"""Bytes per element by the name of vLLM's `kv_cache_dtype` or the model's dtype."""

LARGEST_UNEVEN = 1.5
"""Layer counts of kinds that differ by less are padded to the larger one, else they are split into groups of the smaller."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvGroup:
    """Layers that share a block table."""

    num_layers: int
    window: int | None

    def num_blocks(self, num_tokens: int, block_size: int) -> int:
        """Blocks that a request with so many computed tokens holds in this group."""
        total = -(-num_tokens // block_size)
        if self.window is None:
            return total
        return total - max(0, num_tokens - self.window + 1) // block_size


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    """How one rank's KV cache is laid out."""

    block_size: int
    page_bytes: int
    """Of one layer in one block."""

    groups: tuple[KvGroup, ...]

    @property
    def block_bytes(self) -> int:
        """Bytes of a block of the pool on one rank."""
        return self.page_bytes * max(group.num_layers for group in self.groups)

    @property
    def token_bytes(self) -> int:
        """Bytes of one more token in all layers, as long as no window is full."""
        return self.page_bytes // self.block_size * sum(group.num_layers for group in self.groups)

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks of the pool that a request with so many computed tokens holds, over all groups."""
        return sum(group.num_blocks(num_tokens, self.block_size) for group in self.groups)

    def num_freed_blocks(self, num_tokens: int, shared_tokens: int = 0) -> int:
        """Blocks that the pool gains when such a request gives way.

        Args:
            shared_tokens: At its front, in blocks that others hold too.
        """
        freed = 0
        for group in self.groups:
            total = -(-num_tokens // self.block_size)
            dropped = total - group.num_blocks(num_tokens, self.block_size)
            freed += total - max(dropped, min(total, shared_tokens // self.block_size))
        return freed


def kv_layout(
    shape: ModelShape, *, block_size: int, parallelism: int = 1, element_bytes: int = 2, hybrid: bool = True
) -> KvLayout:
    """Return the layout of a model's KV cache.

    Args:
        hybrid: False where a connector keeps vLLM from treating windowed layers on their own.

    Raises:
        ValueError: Layers of different sizes, which vLLM packs in ways that are not covered here.
    """
    sizes, windows = set(), Counter[int | None]()
    for (attention, _), count in shape.layers.items():
        sizes.add(element_bytes * attention.kv_elements(parallelism))
        windows[attention.window] += count
    if len(sizes) != 1:
        raise ValueError(
            f"The model's layers take {sorted(sizes)} bytes per token: layers of one size only are covered."
        )
    if not hybrid or len(windows) == 1:
        window = next(iter(windows)) if len(windows) == 1 and hybrid else None
        groups: Sequence[KvGroup] = [KvGroup(num_layers=shape.num_layers, window=window)]
    else:
        fewest, most = min(windows.values()), max(windows.values())
        size = most if most < LARGEST_UNEVEN * fewest else fewest
        groups = [
            KvGroup(num_layers=len(range(index, count, -(-count // size))), window=window)
            for window, count in windows.items()
            for index in range(-(-count // size))
        ]
    return KvLayout(block_size=block_size, page_bytes=block_size * sizes.pop(), groups=tuple(groups))


def kv_token_bytes(shape: ModelShape, *, parallelism: int = 1, element_bytes: int = 2) -> int:
    """Bytes of one token in all layers on one rank, windows not full."""
    return sum(
        count * element_bytes * attention.kv_elements(parallelism) for (attention, _), count in shape.layers.items()
    )

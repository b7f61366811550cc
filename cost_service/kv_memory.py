"""Exact bytes of a model's KV cache, as vLLM lays it out: per token, block, layer and rank; and what a preemption frees.

Rules:
- A layer stores keys and values of the rank's heads; with more ranks than KV heads each rank holds one head, repeated.
  Latent attention stores one vector of latent and rotary part, whole on every rank.
- Layers of one kind form one group. A hybrid model (full and windowed layers) has several groups of equally many layers,
  padded; every group has a block table of its own over one pool, so that a block holds one group's layers.
- A windowed group keeps the blocks of the last `window - 1` tokens before a step; what falls out of the window in a step is
  dropped at the next one. With a connector that does not support hybrid caches vLLM keeps everything of a hybrid model,
  in one group (`hybrid=False`); a model with nothing but windowed layers of one kind stays windowed.
- Windowed layers take blocks of the smallest size that the attention kernel knows, whatever `--block-size` says; beside
  full layers the smaller of both sizes is raised to the larger one.

Source: vLLM 0.29 `v1/kv_cache_interface.py` (`AttentionSpec.unpadded_page_size_bytes`), `v1/core/kv_cache_utils.py`
(`unify_kv_cache_spec_page_size`, `_get_kv_cache_groups_uniform_page_size`, `_get_kv_cache_bytes_per_block`),
`v1/core/single_type_kv_cache_manager.py`, `model_executor/layers/attention/attention.py` (`_largest_kernel_block_within`).
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cost_service.model_shape import ModelShape

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
"""Bytes per element by the name of vLLM's `kv_cache_dtype` or the model's dtype."""

KERNEL_BLOCK_SIZE = 16
"""Tokens of the smallest block that attention kernels on GPUs take; vLLM's CPU kernel takes 32."""

LARGEST_UNEVEN = 1.5
"""Layer counts of kinds that differ by less are padded to the larger one, else they are split into groups of the smaller."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvGroup:
    """Layers that share a block table."""

    num_layers: int
    window: int | None

    def num_dropped_blocks(self, num_tokens: int, block_size: int, num_newest: int) -> int:
        """Blocks at the front of a request that its window had left behind before the newest tokens were computed."""
        if self.window is None:
            return 0
        return max(0, num_tokens - num_newest - self.window + 1) // block_size


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

    def num_blocks(self, num_tokens: int, *, num_newest: int = 1) -> int:
        """Blocks of the pool that a request with so many computed tokens holds, over all groups.

        Args:
            num_newest: Those of the tokens that its last step has computed: 1 of a decode, the chunk of a prefill.
        """
        return self.num_freed_blocks(num_tokens, num_newest=num_newest)

    def num_freed_blocks(self, num_tokens: int, *, shared_tokens: int = 0, num_newest: int = 1) -> int:
        """Blocks that the pool gains when such a request gives way: those that it holds alone.

        Args:
            shared_tokens: At its front, in blocks that others hold too.
            num_newest: As for `num_blocks`.
        """
        total = -(-num_tokens // self.block_size)
        num_shared = min(total, shared_tokens // self.block_size)
        dropped = (group.num_dropped_blocks(num_tokens, self.block_size, num_newest) for group in self.groups)
        return sum(total - max(num_shared, gone) for gone in dropped)


def kv_layout(
    shape: ModelShape,
    *,
    block_size: int,
    parallelism: int = 1,
    element_bytes: int = 2,
    hybrid: bool = True,
    kernel_block_size: int = KERNEL_BLOCK_SIZE,
) -> KvLayout:
    """Return the layout of a model's KV cache.

    Args:
        block_size: As the engine has settled it; kernels for latent attention have a size of their own.
        hybrid: False where a connector keeps vLLM from treating windowed layers on their own.
        kernel_block_size: Smallest block that the attention kernel takes.

    Raises:
        ValueError: Layers of different sizes, or blocks that are no multiples of each other: vLLM pads and packs them in
            ways that are not covered here.
    """
    sizes, windows = set(), Counter[int | None]()
    for (attention, _), count in shape.layers.items():
        sizes.add(element_bytes * attention.kv_elements(parallelism))
        windows[attention.window] += count
    if len(sizes) != 1:
        raise ValueError(
            f"The model's layers take {sorted(sizes)} bytes per token: layers of one size only are covered."
        )
    if not hybrid and None in windows:
        windows = Counter({None: shape.num_layers})
    tokens = _block_tokens(windows, block_size, kernel_block_size)
    return KvLayout(block_size=tokens, page_bytes=tokens * sizes.pop(), groups=tuple(_groups(windows)))


def _block_tokens(windows: Mapping[int | None, int], block_size: int, kernel_block_size: int) -> int:
    """Tokens per block, which all groups have in common."""
    if set(windows) == {None}:
        return block_size
    if None not in windows:
        return kernel_block_size
    smaller, larger = sorted((block_size, kernel_block_size))
    if larger % smaller:
        raise ValueError(
            f"block_size {block_size} and the kernel's {kernel_block_size} are no multiples of each other, and the model "
            "has full and windowed layers: choose a multiple."
        )
    return larger


def _groups(windows: Mapping[int | None, int]) -> Iterator[KvGroup]:
    """Layers by window, in groups of about equally many."""
    fewest, most = min(windows.values()), max(windows.values())
    size = most if most < LARGEST_UNEVEN * fewest else fewest
    for window, count in windows.items():
        num_groups = -(-count // size)
        for index in range(num_groups):
            yield KvGroup(num_layers=len(range(index, count, num_groups)), window=window)


def kv_token_bytes(shape: ModelShape, *, parallelism: int = 1, element_bytes: int = 2) -> int:
    """Bytes of one token in all layers on one rank, windows not full."""
    return sum(
        count * element_bytes * attention.kv_elements(parallelism) for (attention, _), count in shape.layers.items()
    )

"""Copies KV blocks between an engine's KV cache and a host buffer (torch).

Rules:
- A block is copied whole, in every layer: its bytes come back as they were, the partly filled last block included.
- Ordering: on CPU the copies are synchronous. On CUDA they run on side streams, ordered by `replicas.copy_schedule` after
  what wrote a block and before what overwrites it, and the host never waits.
"""

import statistics
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce

import numpy as np
import torch
from numpy.typing import NDArray

from replicas.transfer import Carried
from replicas.vllm_cuda_copy import CudaCopies

Bytes = NDArray[np.uint8]

MEASURED_BLOCKS = (1, 9)
"""Numbers of blocks whose copies are timed at start: their difference is the price of a block, the rest is fixed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CopySpeeds:
    """What copies take from the engine, measured."""

    fixed_s: float
    """Seconds that a step's copies of one direction take, whatever their number."""

    out_block_s: float
    in_block_s: float


def bytes_per_block(kv_cache_config: object) -> int:
    """Bytes of one KV block over all layers of one worker (vLLM's `KVCacheConfig`: tensors of `num_blocks` blocks)."""
    num_blocks: int = kv_cache_config.num_blocks  # type: ignore[attr-defined]
    total = sum(tensor.size for tensor in kv_cache_config.kv_cache_tensors)  # type: ignore[attr-defined]
    size, rest = divmod(total, num_blocks)
    assert rest == 0, f"{total} bytes of KV cache do not divide into {num_blocks} blocks"
    return size


class BlockCopier:
    """The worker's end: views of its KV cache as rows of blocks, and a host buffer of the same row size."""

    def __init__(self, kv_caches: Mapping[str, torch.Tensor], *, num_blocks: int, num_slots: int) -> None:
        """Build the views and the host buffer.

        Args:
            kv_caches: Layer name to KV tensor, as vLLM registers them; layers may share storage.
            num_blocks: Blocks in the engine's pool; every storage holds a whole number of bytes per block.
            num_slots: Blocks that the host buffer holds.
        """
        self._num_blocks, self._num_slots = num_blocks, num_slots
        self._device_rows = _unique_block_rows(kv_caches, num_blocks)
        self._on_cpu = all(rows.device.type == "cpu" for rows in self._device_rows)
        # Pinned memory lets CUDA copies run without a staging buffer; there is nothing to pin on CPU.
        self._host_rows = [
            torch.zeros((num_slots, rows.shape[1]), dtype=torch.uint8, pin_memory=not self._on_cpu)
            for rows in self._device_rows
        ]
        self.block_bytes = sum(rows.shape[1] for rows in self._device_rows)
        self._cuda = None if self._on_cpu else CudaCopies(self._device_rows, self._host_rows)
        self._device_bytes = [rows.numpy() for rows in self._device_rows] if self._on_cpu else []
        self._host_bytes = [rows.numpy() for rows in self._host_rows] if self._on_cpu else []
        self._zero_slots: list[int] = []
        self._written_blocks: Sequence[int] | None = None

    def begin_step(self, written_blocks: Sequence[int] | None) -> None:
        """Say which blocks the step may write that it did not have before (None: unknown); `copy_out` must follow."""
        self._written_blocks = written_blocks

    def copy_out(self, blocks: Sequence[int], slots: Sequence[int]) -> None:
        """Copy device blocks to host slots, pair by pair; on CUDA in every step, with none too."""
        if self._cuda is not None:
            pairs = list(zip(blocks, slots, strict=True))
            self._cuda.copy_out(pairs, zero_slots=self._zero_slots, written_blocks=self._written_blocks)
            self._zero_slots, self._written_blocks = [], None
            return
        _copy_rows(self._device_bytes, blocks, self._host_bytes, slots)

    def copy_in(self, slots: Sequence[int], blocks: Sequence[int], *, synchronous: bool = True) -> Callable[[], bool]:
        """Copy host slots to device blocks, pair by pair; return what tells whether that is done.

        Args:
            synchronous: The forward pass that follows may read the blocks; else nothing may use them before they are done.
        """
        if self._cuda is not None:
            pairs = list(zip(blocks, slots, strict=True))
            return partial(self._cuda.is_done, self._cuda.copy_in(pairs, synchronous=synchronous))
        _copy_rows(self._host_bytes, slots, self._device_bytes, blocks)
        return lambda: True

    def take_transfers(self) -> list[Carried]:
        """What transfers beside the engine have told; none on CPU, where the engine waits for its copies."""
        return [] if self._cuda is None else self._cuda.take_transfers()

    def checksum(self, slot: int) -> int:
        """CRC-32 of a host slot's bytes in all layers; on CPU only, where a copy is complete when it returns."""
        assert self._on_cpu, "a checksum of what may still be on its way"
        return reduce(lambda crc, host: zlib.crc32(host[slot], crc), self._host_bytes, 0)

    def zero(self, slots: Sequence[int]) -> None:
        """Overwrite host slots with zeros, for they held another tenant's KV; on CUDA with the next copies out."""
        if self._cuda is not None:
            self._zero_slots += slots
            return
        for host in self._host_bytes:
            host[slots] = 0

    def measure(self) -> CopySpeeds | None:
        """Time copies between the first blocks and slots, before anything of use is in either; None where none fit."""
        few, many = MEASURED_BLOCKS
        if many > min(self._num_slots, self._num_blocks) or not self._on_cpu:
            return None
        rows = list(range(many))

        def median_s(copy: Callable[[list[int], list[int]], object], num: int) -> float:
            times_s = []
            for _ in range(7):
                start_s = time.perf_counter()
                copy(rows[:num], rows[:num])
                times_s.append(time.perf_counter() - start_s)
            return statistics.median(times_s)

        one_s = {copy: median_s(copy, few) for copy in (self.copy_out, self.copy_in)}
        block_s = {copy: max(0.0, median_s(copy, many) - first_s) / (many - few) for copy, first_s in one_s.items()}
        fixed_s = max(0.0, statistics.fmean(one_s[copy] - few * block_s[copy] for copy in one_s))
        return CopySpeeds(fixed_s=fixed_s, out_block_s=block_s[self.copy_out], in_block_s=block_s[self.copy_in])


def _copy_rows(sources: Sequence[Bytes], rows: Sequence[int], targets: Sequence[Bytes], to_rows: Sequence[int]) -> None:
    """Copy rows of every layer, pair by pair: thirty times as fast as torch's copies by index, which move single bytes."""
    for source, target in zip(sources, targets, strict=True):
        for row, to_row in zip(rows, to_rows, strict=True):
            target[to_row] = source[row]


def _unique_block_rows(kv_caches: Mapping[str, torch.Tensor], num_blocks: int) -> list[torch.Tensor]:
    """Views of shape (num_blocks, bytes), one or more per storage, uint8.

    Source: vLLM 0.29 `v1/simple_kv_offload/worker.py`, which reads the same layout: within a storage, blocks lie at
    multiples of the block stride; K and V may be two regions of `num_blocks` blocks each.
    """
    rows: list[torch.Tensor] = []
    seen: set[int] = set()
    for name, tensor in kv_caches.items():
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen:
            continue
        seen.add(storage.data_ptr())
        block_dim = next((dim for dim in (0, 1) if tensor.shape[dim] % num_blocks == 0), None)
        assert block_dim is not None, (
            f"KV cache {name} of shape {tuple(tensor.shape)} has no axis of {num_blocks} blocks"
        )
        physical = tensor.shape[block_dim] // num_blocks
        row_bytes = tensor.stride(block_dim) * tensor.element_size() * physical
        raw = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
        assert raw.numel() % (num_blocks * row_bytes) == 0, f"KV cache {name}: {raw.numel()} bytes, rows of {row_bytes}"
        rows.extend(raw.view(-1, num_blocks, row_bytes))
    return rows

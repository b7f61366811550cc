"""Goal: on a GPU, copies on side streams move the right bytes while the compute stream goes on writing, and nobody waits.

Method: random histories on small caches. Slow kernels on the compute stream make every missing wait show; the expected
contents are kept in plain values. The plan of streams and events itself is checked without a GPU in
tests/test_replicas_copy_schedule.py.
"""

import random
import time

import pytest
import torch

from replicas.vllm_block_copy import BlockCopier

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: no CUDA device is present"),
]

NUM_BLOCKS, NUM_SLOTS, ROW = 64, 96, 4096
SLOW_KERNEL_CYCLES = 2_000_000  # about a millisecond


@pytest.mark.parametrize("seed", range(5))
def test_every_slot_and_block_holds_what_was_planned(seed: int) -> None:
    rng = random.Random(seed)
    caches = {f"layer.{i}": torch.zeros((NUM_BLOCKS, ROW), dtype=torch.uint8, device="cuda") for i in range(3)}
    copier = BlockCopier(caches, num_blocks=NUM_BLOCKS, num_slots=NUM_SLOTS)
    blocks, slots = [0] * NUM_BLOCKS, [0] * NUM_SLOTS
    for step in range(300):
        value = 1 + step % 250
        out = rng.sample(range(NUM_BLOCKS), rng.randint(0, 8))
        to = rng.sample(range(NUM_SLOTS), len(out))
        back = rng.sample([slot for slot in range(NUM_SLOTS) if slot not in to], rng.randint(0, 8))
        into = rng.sample(range(NUM_BLOCKS), len(back))
        written = rng.sample([block for block in range(NUM_BLOCKS) if block not in into], rng.randint(0, 16))
        copier.begin_step(written + into)
        copier.copy_out(out, to)
        for block, slot in zip(out, to, strict=True):
            slots[slot] = blocks[block]
        if back:
            copier.copy_in(back, into)
        for slot, block in zip(back, into, strict=True):
            blocks[block] = slots[slot]
        torch.cuda._sleep(SLOW_KERNEL_CYCLES)
        for rows in copier._device_rows:
            rows[torch.tensor(written, dtype=torch.long, device="cuda")] = value
        for block in written:
            blocks[block] = value
    torch.cuda.synchronize()
    for rows, host in zip(copier._device_rows, copier._host_rows, strict=True):
        assert [int(row.unique()) for row in rows] == blocks
        assert [int(row.unique()) for row in host] == slots


def test_transfers_tell_how_long_they_took() -> None:
    caches = {"layer": torch.zeros((NUM_BLOCKS, 1 << 20), dtype=torch.uint8, device="cuda")}
    copier = BlockCopier(caches, num_blocks=NUM_BLOCKS, num_slots=NUM_SLOTS)
    copier.begin_step(None)
    copier.copy_out(range(32), range(32))
    copier.copy_in(range(32, 48), range(32, 48))
    torch.cuda.synchronize()
    copier.begin_step(None)
    copier.copy_out([], [])
    out, back = sorted(copier.take_transfers(), key=lambda one: one.direction, reverse=True)
    assert (out.num_blocks, back.num_blocks) == (32, 16)
    assert min(out.seconds, back.seconds) > 0.0
    assert copier.take_transfers() == []


def test_the_host_is_free_again_at_once() -> None:
    caches = {"layer": torch.zeros((NUM_BLOCKS, 1 << 20), dtype=torch.uint8, device="cuda")}
    copier = BlockCopier(caches, num_blocks=NUM_BLOCKS, num_slots=NUM_SLOTS)
    torch.cuda.synchronize()
    torch.cuda._sleep(400 * SLOW_KERNEL_CYCLES)
    start_s = time.perf_counter()
    copier.begin_step(None)
    copier.copy_out(range(32), range(32))
    copier.copy_in(range(32), range(32))
    assert time.perf_counter() - start_s < 0.1
    torch.cuda.synchronize()

"""Goal: KV blocks travel to host memory and back byte by byte, and nothing beside them moves.

Method: caches of random bytes in the layouts that attention backends use, random maps of blocks and slots; after a copy
every row is compared: mapped rows with their source, unmapped rows and the source with what they were.
"""

import random
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
block_copy = pytest.importorskip("replicas.vllm_block_copy")

pytestmark = pytest.mark.engine

NUM_BLOCKS, NUM_SLOTS = 13, 9
BLOCK_SIZE, NUM_HEADS, HEAD_SIZE, NUM_LAYERS = 4, 2, 8, 3

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
    ),
]


def random_bytes(num: int, seed: int, device: str) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num,), dtype=torch.uint8, generator=generator).to(device)


def blocks_first(device: str) -> dict[str, Any]:
    """Shape (num_blocks, 2, ...): K and V of a block side by side."""
    shape = (NUM_BLOCKS, 2, NUM_HEADS, BLOCK_SIZE, HEAD_SIZE)
    return {f"layer.{i}": storage_of(shape, torch.float32, i, device) for i in range(NUM_LAYERS)}


def keys_and_values_first(device: str) -> dict[str, Any]:
    """Shape (2, num_blocks, ...): all K, then all V."""
    shape = (2, NUM_BLOCKS, BLOCK_SIZE, NUM_HEADS, HEAD_SIZE)
    return {f"layer.{i}": storage_of(shape, torch.bfloat16, i, device) for i in range(NUM_LAYERS)}


def latent(device: str) -> dict[str, Any]:
    """Shape (num_blocks, block_size, width): one latent vector per token, no K and V."""
    return {f"layer.{i}": storage_of((NUM_BLOCKS, BLOCK_SIZE, 24), torch.float16, i, device) for i in range(2)}


def shared_storage(device: str) -> dict[str, Any]:
    """Layers 0 and 2 are one tensor under two names, layer 1 is another."""
    caches = blocks_first(device)
    return {
        "layer.0": caches["layer.0"],
        "layer.1": caches["layer.1"],
        "layer.2": caches["layer.0"].view_as(caches["layer.0"]),
    }


def one_storage_for_all_layers(device: str) -> dict[str, Any]:
    """One allocation, a region of blocks per layer."""
    whole = storage_of((NUM_LAYERS, NUM_BLOCKS, 2, BLOCK_SIZE, NUM_HEADS, HEAD_SIZE), torch.float32, 0, device)
    return {f"layer.{i}": whole[i] for i in range(NUM_LAYERS)}


def all_layers_within_a_block(device: str) -> dict[str, Any]:
    """One allocation, all layers of a block side by side."""
    whole = storage_of((NUM_BLOCKS, NUM_LAYERS, 2, BLOCK_SIZE, NUM_HEADS, HEAD_SIZE), torch.float32, 0, device)
    return {f"layer.{i}": whole[:, i] for i in range(NUM_LAYERS)}


def strided_heads_first(device: str) -> dict[str, Any]:
    """Shape (2, num_blocks, block_size, heads, ...) over memory in which heads come before tokens."""
    shape = (2, NUM_BLOCKS, NUM_HEADS, BLOCK_SIZE, HEAD_SIZE)
    return {f"layer.{i}": storage_of(shape, torch.float32, i, device).transpose(2, 3) for i in range(NUM_LAYERS)}


def kernel_blocks(device: str) -> dict[str, Any]:
    """Attention kernels with smaller blocks than the pool's: two of theirs are one of ours."""
    shape = (2 * NUM_BLOCKS, 2, BLOCK_SIZE // 2, NUM_HEADS, HEAD_SIZE)
    return {f"layer.{i}": storage_of(shape, torch.float32, i, device) for i in range(NUM_LAYERS)}


def storage_of(shape: tuple[int, ...], dtype: Any, seed: int, device: str) -> Any:
    """A tensor over a storage of its own, filled with random bytes (as floats, some of them are no numbers)."""
    num_bytes = torch.Size(shape).numel() * torch.empty(0, dtype=dtype).element_size()
    return random_bytes(num_bytes, seed, device).view(dtype).view(shape)


LAYOUTS = [
    blocks_first,
    keys_and_values_first,
    latent,
    shared_storage,
    one_storage_for_all_layers,
    all_layers_within_a_block,
    strided_heads_first,
    kernel_blocks,
]


def block_bytes_of(caches: dict[str, Any], block: int) -> list[bytes]:
    """Every byte of one block in every layer, read through the layers' own tensors."""
    result = []
    for tensor in caches.values():
        dim = 1 if tensor.shape[0] == 2 else 0
        per_block = tensor.shape[dim] // NUM_BLOCKS
        part = tensor.narrow(dim, block * per_block, per_block)
        result.append(part.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return result


def all_blocks(caches: dict[str, Any]) -> list[list[bytes]]:
    return [block_bytes_of(caches, block) for block in range(NUM_BLOCKS)]


def host_of(copier: Any) -> list[bytes]:
    """Every host slot's bytes, all layers of a slot in one."""
    return [b"".join(rows[slot].numpy().tobytes() for rows in copier._host_rows) for slot in range(NUM_SLOTS)]


def fill_host(copier: Any, seed: int) -> None:
    for index, rows in enumerate(copier._host_rows):
        rows.copy_(random_bytes(rows.numel(), seed + index, "cpu").view(rows.shape))


def poison(caches: dict[str, Any]) -> None:
    for tensor in caches.values():
        tensor.untyped_storage().fill_(0xA5)


def copier_for(caches: dict[str, Any]) -> Any:
    return block_copy.BlockCopier(caches, num_blocks=NUM_BLOCKS, num_slots=NUM_SLOTS)


def settle(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(4))
def test_out_and_in_again_moves_exactly_the_mapped_blocks(layout: Any, seed: int, device: str) -> None:
    rng = random.Random(seed)
    caches = layout(device)
    copier = copier_for(caches)
    fill_host(copier, seed=99)
    before, host_before = all_blocks(caches), host_of(copier)
    num = rng.randint(1, NUM_SLOTS)
    blocks, slots = rng.sample(range(NUM_BLOCKS), num), rng.sample(range(NUM_SLOTS), num)

    copier.copy_out(blocks, slots)
    settle(device)
    assert all_blocks(caches) == before  # the source is as it was
    host_after = host_of(copier)
    for slot in range(NUM_SLOTS):
        assert (host_after[slot] == host_before[slot]) == (slot not in slots)

    poison(caches)
    poisoned = all_blocks(caches)
    targets = rng.sample(range(NUM_BLOCKS), num)
    copier.copy_in(slots, targets)
    settle(device)
    assert host_of(copier) == host_after
    after = all_blocks(caches)
    for block in range(NUM_BLOCKS):
        expected = before[blocks[targets.index(block)]] if block in targets else poisoned[block]
        assert after[block] == expected, f"block {block} of {layout.__name__}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_host_slot_holds_the_very_bytes_of_its_block(layout: Any) -> None:
    caches = layout("cpu")
    copier = copier_for(caches)
    copier.copy_out([5], [2])
    distinct = {tensor.data_ptr(): tensor for tensor in caches.values()}
    expected = b"".join(block_bytes_of({str(i): t for i, t in enumerate(distinct.values())}, 5))
    assert sorted(host_of(copier)[2]) == sorted(expected)
    assert copier.block_bytes == len(expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_blocks_of_all_layers_belong_to_exactly_one_row_each(layout: Any) -> None:
    caches = layout("cpu")
    copier = copier_for(caches)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in caches.values()}
    assert copier.block_bytes * NUM_BLOCKS == sum(storages.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_size_that_the_scheduler_plans_with_is_the_size_that_the_worker_holds(layout: Any) -> None:
    caches = layout("cpu")
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in caches.values()}
    config = SimpleNamespace(
        num_blocks=NUM_BLOCKS, kv_cache_tensors=[SimpleNamespace(size=size) for size in storages.values()]
    )
    assert block_copy.bytes_per_block(config) == copier_for(caches).block_bytes


def test_a_cache_that_does_not_divide_into_blocks_is_refused() -> None:
    config = SimpleNamespace(num_blocks=NUM_BLOCKS, kv_cache_tensors=[SimpleNamespace(size=NUM_BLOCKS * 10 + 1)])
    with pytest.raises(AssertionError, match="do not divide"):
        block_copy.bytes_per_block(config)


def test_a_cache_without_an_axis_of_blocks_is_refused_by_the_name_of_its_layer() -> None:
    with pytest.raises(AssertionError, match=r"layer\.7"):
        copier_for({"layer.7": torch.zeros(3, NUM_BLOCKS + 1, 4)})


def test_a_host_buffer_of_zero_slots_can_be_built() -> None:
    block_copy.BlockCopier(blocks_first("cpu"), num_blocks=NUM_BLOCKS, num_slots=0)

"""Goal: the simulated block pool counts, finds and evicts as vLLM's does; small cases by hand, drawn ones against a list."""

import random
from itertools import takewhile
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.decode_batch import DecodeBatch
from cluster.simulated_blocks import Holding, PrefixPart, SimulatedBlocks
from cluster.simulated_request import SimulatedRequest, prefix_parts
from cluster.simulated_step import SimulatedSettings
from cost_service.traces import TraceRequest


def holding(*keys: int) -> Holding:
    """A request whose parts have a block each."""
    return Holding([PrefixPart(key, 1) for key in keys])


def hold(blocks: SimulatedBlocks, one: Holding, num_blocks: int) -> int:
    """Let a request hold so many full blocks; return how many of them it has found."""
    hit = blocks.find(one, num_blocks)
    blocks.hold(one, hit)
    blocks.take(num_blocks - hit.num_blocks)
    blocks.cache(one, num_blocks)
    return hit.num_blocks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_blocks": 1}, "num_blocks must be at least 2"),
        ({"block_size": 0}, "block_size of a simulated engine must be at least 1"),
        ({"max_num_batched_tokens": 8}, "must not be below max_num_seqs"),
        ({"enable_chunked_prefill": False}, "must not be below max_model_len"),
        ({"watermark": 1.0}, "watermark must be at least 0 and below 1"),
    ],
)
def test_settings_that_vllm_would_refuse_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimulatedSettings(**{"num_blocks": 10} | changes)


def test_a_preempted_request_finds_what_nobody_has_taken_of_its_blocks() -> None:
    blocks, victim, other = SimulatedBlocks(11, caching=True), Holding(), Holding()
    hold(blocks, victim, 8)
    blocks.free(victim, 8, 7)  # the last one is not full
    hold(blocks, other, 5)  # two that were never used, the one that is not full, and the last two full ones
    assert blocks.num_free == 5
    assert blocks.find(victim, 8).num_blocks == 5
    assert hold(blocks, victim, 5) == 5
    assert blocks.num_free == 0
    blocks.check([(victim, 5), (other, 5)])


def test_a_prefix_is_found_by_all_who_have_its_keys_and_counted_once() -> None:
    blocks = SimulatedBlocks(11, caching=True)
    first, second, third = holding(1, 2, 3), holding(1, 2, 9), holding(7)
    assert hold(blocks, first, 4) == 0
    assert hold(blocks, second, 3) == 2
    assert hold(blocks, third, 1) == 0
    assert blocks.num_free == 10 - 4 - 1 - 1
    assert blocks.num_shared(first) == blocks.num_shared(second) == 2
    blocks.free(first, 4, 4)
    blocks.check([(second, 3), (third, 1)])
    assert blocks.num_shared(second) == 0
    assert blocks.find(holding(1, 2, 3, 4), 4).num_blocks == 3


def test_the_blocks_that_were_freed_first_are_evicted_first_and_of_them_the_last() -> None:
    blocks = SimulatedBlocks(7, caching=True)
    old, new = holding(1, 2, 3), holding(4, 5, 6)
    hold(blocks, old, 3)
    hold(blocks, new, 3)
    blocks.free(old, 3, 3)
    blocks.free(new, 3, 3)
    blocks.take(2)
    assert blocks.find(holding(1, 2, 3), 3).num_blocks == 1
    assert blocks.find(holding(4, 5, 6), 3).num_blocks == 3


def test_nothing_is_found_without_a_prefix_cache() -> None:
    blocks, one = SimulatedBlocks(7, caching=False), holding(1, 2)
    hold(blocks, one, 2)
    blocks.free(one, 2, 2)
    assert blocks.num_free == 6
    assert blocks.find(holding(1, 2), 2).num_blocks == 0


def test_a_run_is_parted_where_somebody_holds_a_part_of_it() -> None:
    blocks = SimulatedBlocks(11, caching=True)
    long, short = Holding([PrefixPart(1, 6)]), Holding([PrefixPart(1, 6)])
    hold(blocks, long, 6)
    assert hold(blocks, short, 4) == 4
    assert blocks.num_shared(long) == blocks.num_shared(short) == 4
    blocks.check([(long, 6), (short, 4)])
    blocks.free(long, 6, 6)
    assert blocks.num_free == 6
    blocks.take(5)  # four that were never used, and the last of the six
    blocks.check([(short, 4), (Holding(), 5)])
    assert blocks.find(Holding([PrefixPart(1, 6)]), 6).num_blocks == 5


def test_keys_are_equal_as_far_as_the_hashes_say() -> None:
    def keys(*hashes: int, prompt_tokens: int, block_size: int = 16) -> list[int]:
        one = TraceRequest(arrival_s=0.0, tenant="", prompt_tokens=prompt_tokens, output_tokens=1, prefix_hashes=hashes)
        parts = prefix_parts(one, block_size=block_size)
        return [part.key << 24 | block for part in parts for block in range(part.num_blocks)]

    one, other = keys(5, 6, prompt_tokens=1000), keys(5, 7, prompt_tokens=1024)
    assert len(one) == 1000 // 16
    assert one[:32] == other[:32]
    assert not set(one[32:]) & set(other)
    assert keys(prompt_tokens=1000) == []
    # A block across the end of a hash is known by the hash in which it ends.
    one, other = (keys(5, last, prompt_tokens=1024, block_size=48) for last in (6, 7))
    assert len(one) == 1024 // 48
    assert [same == also for same, also in zip(one, other, strict=True)] == [True] * (512 // 48) + [False] * 11


class ListedBlock:
    def __init__(self) -> None:
        self.key: tuple[int, ...] | None = None
        self.num_holders = 0


class ListedBlocks:
    """The same pool, block by block: all blocks of the requests have keys, their own ones such that nobody else has."""

    def __init__(self, num_blocks: int) -> None:
        self.free = [ListedBlock() for _ in range(num_blocks - 1)]
        self.cached: list[ListedBlock] = []

    def find(self, keys: list[tuple[int, ...]]) -> list[ListedBlock]:
        first = {block.key: block for block in reversed(self.cached)}
        return [first[key] for key in takewhile(first.__contains__, keys)]

    def hold(self, found: list[ListedBlock], num_more: int) -> list[ListedBlock]:
        for block in found:
            if not block.num_holders:
                self.free.remove(block)
        held = found + [self.free.pop(0) for _ in range(num_more)]
        for block in held[len(found) :]:
            if block.key is not None:
                self.cached.remove(block)
                block.key = None
        for block in held:
            block.num_holders += 1
        return held

    def cache(self, held: list[ListedBlock], keys: list[tuple[int, ...]]) -> None:
        for block, key in zip(held, keys, strict=False):
            if block.key is None:
                block.key = key
                self.cached.append(block)

    def give_back(self, held: list[ListedBlock]) -> None:
        for block in reversed(held):
            block.num_holders -= 1
            if not block.num_holders:
                self.free.insert(0 if block.key is None else len(self.free), block)


def prompt(rng: random.Random) -> list[PrefixPart]:
    """Up to three parts of five blocks; many prompts begin alike."""
    key, parts = 1, []
    for _ in range(rng.randrange(4)):
        key = 2 * key + rng.randrange(2)
        parts.append(PrefixPart(key, 5))
    return parts


@pytest.mark.parametrize("seed", range(4))
def test_runs_of_blocks_are_what_single_blocks_would_be(seed: int) -> None:
    rng = random.Random(seed)
    runs, listed = SimulatedBlocks(36, caching=True), ListedBlocks(36)
    requests = [Holding() for _ in range(6)]
    lengths, num_cached, names = [1] * 6, [0] * 6, list(range(-6, 0))
    held: dict[int, list[ListedBlock]] = {}
    for move in range(8_000):
        number, choice = rng.randrange(6), rng.randrange(8)
        if number not in held and choice < 4:  # else the one who was there before comes back
            requests[number], lengths[number], names[number] = Holding(prompt(rng)), rng.randint(1, 18), move
        one, num_full = requests[number], lengths[number]
        keys: list[tuple[int, ...]] = [(part.key, block) for part in one.parts for block in range(part.num_blocks)]
        keys += [(-1, names[number], block) for block in range(num_full)]
        if number in held and choice and num_cached[number] < num_full:  # the next chunk of its prefill
            num_cached[number] = min(num_full, num_cached[number] + choice)
            runs.cache(one, num_cached[number])
            listed.cache(held[number], keys[: num_cached[number]])
        elif number in held:
            runs.free(one, num_full + 1, num_cached[number])  # the last one does not get full
            listed.give_back(held.pop(number))
        else:
            max_blocks = num_full if choice % 4 else rng.randint(0, num_full)
            hit, found = runs.find(one, max_blocks), listed.find(keys[:max_blocks])
            assert (move, hit.num_blocks) == (move, len(found))
            assert hit.num_free_blocks == sum(not block.num_holders for block in found)
            num_more = num_full + 1 - len(found)
            if max_blocks == num_full and num_more + hit.num_free_blocks <= runs.num_free:  # else it only asks
                runs.hold(one, hit)
                runs.take(num_more)
                held[number], num_cached[number] = listed.hold(found, num_more), len(found)
        assert runs.num_free == len(listed.free)
        for other, blocks in held.items():
            assert runs.num_shared(requests[other]) == sum(block.num_holders > 1 for block in blocks)
        runs.check((requests[other], len(blocks)) for other, blocks in held.items())


@given(
    lengths=st.lists(st.tuples(st.integers(1, 30), st.integers(2, 40)), min_size=1, max_size=10),
    budget=st.integers(0, 60), block_size=st.integers(1, 8),
)  # fmt: skip
def test_a_batch_in_strides_is_one_in_single_steps(
    lengths: list[tuple[int, int]], budget: int, block_size: int
) -> None:
    batch = DecodeBatch(block_size)
    requests = []
    for number, (prompt, output) in enumerate(lengths):
        request = SimulatedRequest(str(number), tenant="", arrival_s=0.0, prompt_tokens=prompt, output_tokens=output)
        request.num_computed, request.num_output, request.place = prompt, 1, number
        batch.join(request)
        requests.append(request)
    computed = {request: request.num_computed for request in requests}
    num_steps = min(batch.num_steps_to_end, batch.num_steps_within(budget))
    assert batch.num_steps_to_end == min(output for _, output in lengths) - 1
    needed = 0
    for step in range(num_steps):
        needs = sum(tokens % block_size == 0 for tokens in computed.values())
        assert needs == batch.num_needed_blocks(1, after=step)
        needed += needs
        computed = {request: tokens + 1 for request, tokens in computed.items()}
    assert needed == batch.num_needed_blocks(num_steps) <= budget
    ended = batch.advance(num_steps)
    assert ended == [one for one in requests if computed[one] + 1 == one.prompt_tokens + one.output_tokens]
    assert batch.num_context_tokens == sum(computed[one] + 1 for one in requests if one not in ended)

"""Goal: the simulated block pool counts, finds and evicts as vLLM's does; small cases by hand, drawn ones against a list."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.decode_batch import DecodeBatch
from cluster.simulated_blocks import Holding, SimulatedBlocks
from cluster.simulated_request import SimulatedRequest, prefix_keys
from cluster.simulated_step import SimulatedSettings
from cost_service.traces import TraceRequest


def hold(blocks: SimulatedBlocks, holding: Holding, num_blocks: int) -> int:
    """Let a request hold so many full blocks; return how many of them it has found."""
    hit = blocks.find(holding, num_blocks)
    blocks.hold(holding, hit)
    blocks.take(num_blocks - hit.num_blocks)
    blocks.cache(holding, num_blocks)
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
    first, second, third = Holding([1, 2, 3]), Holding([1, 2, 9]), Holding([7])
    assert hold(blocks, first, 4) == 0
    assert hold(blocks, second, 3) == 2
    assert hold(blocks, third, 1) == 0
    assert blocks.num_free == 10 - 4 - 1 - 1
    assert blocks.num_shared(first) == blocks.num_shared(second) == 2
    blocks.free(first, 4, 4)
    blocks.check([(second, 3), (third, 1)])
    assert blocks.num_shared(second) == 0
    assert blocks.find(Holding([1, 2, 3, 4]), 4).num_blocks == 3


def test_the_blocks_that_were_freed_first_are_evicted_first_and_of_them_the_last() -> None:
    blocks = SimulatedBlocks(7, caching=True)
    old, new = Holding([1, 2, 3]), Holding([4, 5, 6])
    hold(blocks, old, 3)
    hold(blocks, new, 3)
    blocks.free(old, 3, 3)
    blocks.free(new, 3, 3)
    blocks.take(2)
    assert blocks.find(Holding([1, 2, 3]), 3).num_blocks == 1
    assert blocks.find(Holding([4, 5, 6]), 3).num_blocks == 3


def test_nothing_is_found_without_a_prefix_cache() -> None:
    blocks, one = SimulatedBlocks(7, caching=False), Holding([1, 2])
    hold(blocks, one, 2)
    blocks.free(one, 2, 2)
    assert blocks.num_free == 6
    assert blocks.find(Holding([1, 2]), 2).num_blocks == 0


def test_keys_are_equal_as_far_as_the_hashes_say() -> None:
    def keys(*hashes: int, prompt_tokens: int) -> tuple[int, ...]:
        one = TraceRequest(arrival_s=0.0, tenant="", prompt_tokens=prompt_tokens, output_tokens=1, prefix_hashes=hashes)
        return prefix_keys(one, block_size=16)

    one, other = keys(5, 6, prompt_tokens=1000), keys(5, 7, prompt_tokens=1024)
    assert len(one) == 1000 // 16
    assert one[:32] == other[:32]
    assert not set(one[32:]) & set(other)
    assert keys(prompt_tokens=1000) == ()


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

"""Goal: prompts share as many tokens as their prefix hashes say, none else, and are the same wherever they are made.

Method: single requests against each other; the fast drawing of tokens against the generator's own method.
"""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.prompts import FIRST_TOKEN_ID, RequestSpec, draw_token_ids, with_other_tokens, with_prompts
from cost_service.traces import TraceRequest


def prompts(*requests: TraceRequest, seed: int = 0, vocab: int = 50_000) -> list[tuple[int, ...]]:
    return [made.prompt_token_ids for made in with_prompts(requests, vocab=vocab, seed=seed)]


def request(prompt_tokens: int, *hashes: int, hash_tokens: int = 512, ids: tuple[int, ...] = ()) -> TraceRequest:
    return TraceRequest(
        arrival_s=1.5, tenant="a", prompt_tokens=prompt_tokens, output_tokens=9, prefix_hashes=hashes,
        hash_tokens=hash_tokens, prompt_token_ids=ids,
    )  # fmt: skip


@given(st.integers(0, 400), st.integers(FIRST_TOKEN_ID + 1, 1 << 31), st.integers(0, 9))
def test_tokens_are_drawn_as_the_generator_itself_would_and_leave_it_in_the_same_state(
    num: int, vocab: int, seed: int
) -> None:
    fast, slow = random.Random(seed), random.Random(seed)
    assert draw_token_ids(fast, num, vocab) == [slow.randrange(FIRST_TOKEN_ID, vocab) for _ in range(num)]
    assert fast.getstate() == slow.getstate()


def test_a_request_keeps_what_it_is_and_is_named_by_its_place() -> None:
    first, second = with_prompts([request(3), request(4)], vocab=512)
    assert first == RequestSpec(
        request_id="request-0", tenant="a", arrival_s=1.5, prompt_token_ids=first.prompt_token_ids, output_tokens=9
    )
    assert (second.request_id, second.num_tokens) == ("request-1", 4 + 9)


def test_prompts_are_equal_as_far_as_their_hashes_are() -> None:
    one, other, alone = prompts(request(1400, 1, 2, 3), request(1200, 1, 2, 4), request(1400, 5, 2, 3))
    assert one[:1024] == other[:1024]
    assert one[1024:1200] != other[1024:]
    assert one[:512] != alone[:512]
    assert [len(one), len(other)] == [1400, 1200]


def test_a_prompt_that_ends_inside_a_block_is_the_beginning_of_one_that_does_not() -> None:
    short, long = prompts(request(700, 1, 2), request(1024, 1, 2))
    assert short == long[:700]


def test_what_no_hash_covers_is_the_requests_own() -> None:
    one, other = prompts(request(600, 1), request(600, 1))
    assert one[:512] == other[:512]
    assert one[512:] != other[512:]


def test_smaller_blocks_share_as_many_as_their_size_says() -> None:
    one, other = prompts(request(30, 1, 2, hash_tokens=10), request(30, 1, 2, hash_tokens=10))
    assert one[:20] == other[:20]
    assert one[20:] != other[20:]


def test_a_seed_gives_the_same_prompts_and_another_seed_others() -> None:
    given = request(600, 1, 2)
    assert prompts(given, seed=3) == prompts(given, seed=3)
    assert prompts(given, seed=3)[0][:512] != prompts(given, seed=4)[0][:512]
    assert prompts(request(50), seed=3) != prompts(request(50), seed=4)


def test_the_very_tokens_of_a_seed_do_not_change_with_the_code() -> None:
    """Old result files name their workload by its options alone."""
    assert prompts(request(5, 1, hash_tokens=3), vocab=512) == [(409, 437, 407, 138, 375)]


def test_prompts_of_the_source_are_kept_cut_and_continued() -> None:
    kept, short, long = prompts(request(3, ids=(7, 8, 9)), request(2, ids=(7, 8, 9)), request(5, ids=(7, 8, 9)))
    assert (kept, short, long[:3]) == ((7, 8, 9), (7, 8), (7, 8, 9))
    assert len(long) == 5


@pytest.mark.parametrize("vocab", [0, FIRST_TOKEN_ID, 1 << 32])
def test_a_vocabulary_without_ordinary_tokens_is_refused(vocab: int) -> None:
    with pytest.raises(ValueError, match="vocab must be above 3"):
        prompts(request(1), vocab=vocab)


@given(
    st.lists(st.integers(0, 5), max_size=5), st.integers(1, 40), st.integers(1, 9), st.integers(FIRST_TOKEN_ID + 1, 600)
)
def test_lengths_and_tokens_stay_inside_what_is_asked(
    hashes: list[int], prompt_tokens: int, hash_tokens: int, vocab: int
) -> None:
    (prompt,) = prompts(request(prompt_tokens, *hashes, hash_tokens=hash_tokens), vocab=vocab)
    assert len(prompt) == prompt_tokens
    assert all(FIRST_TOKEN_ID <= token < vocab for token in prompt)


@given(st.integers(0, 99), st.integers(40, 600))
def test_in_other_words_requests_are_alike_where_they_were_and_all_else_is_the_same(seed: int, vocab: int) -> None:
    made = list(with_prompts([request(300, 1, hash_tokens=64), request(300, 1, hash_tokens=64)], vocab=600))
    others = with_other_tokens(made, vocab, random.Random(seed))
    before, after = ([token for one in of for token in one.prompt_token_ids] for of in (made, others))
    pairs = set(zip(before, after, strict=True))
    assert len(pairs) == len(set(before)) == len(set(after)), "ids are exchanged one for one"
    assert all(one == other for one, other in pairs if not FIRST_TOKEN_ID <= one < vocab)
    assert all(FIRST_TOKEN_ID <= other < vocab for one, other in pairs if FIRST_TOKEN_ID <= one < vocab)
    assert before != after
    for one, other in zip(made, others, strict=True):
        assert (one.request_id, one.tenant, one.arrival_s, one.num_tokens) == (
            other.request_id, other.tenant, other.arrival_s, other.num_tokens
        )  # fmt: skip

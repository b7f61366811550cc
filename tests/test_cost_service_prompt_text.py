"""Goal: whoever does not tokenize takes the same prompt for the same size and text, in whatever form it comes.

Method: prompts of both endpoints in all forms that requests may have.
"""

import pytest

from cost_service.prompt_text import BYTES_PER_TOKEN, TOKENS_PER_MESSAGE, prompt_pieces, prompt_size


@pytest.mark.parametrize(
    ("request_", "size"),
    [
        ({"prompt": "x" * 9}, (1, 3)),
        ({"prompt": "ä" * 4}, (1, 2)),
        ({"prompt": [5, 6, 7]}, (1, 3)),
        ({"prompt": ["x" * 8, "x" * 16]}, (2, 3)),
        ({"prompt": [[1], [1, 2, 3]]}, (2, 2)),
        ({"messages": [{"role": "user", "content": "x" * 8}] * 2}, (1, 2 * (2 + TOKENS_PER_MESSAGE))),
        ({"messages": [{"role": "user", "content": [{"text": "x" * 4}] * 3}]}, (1, 3 + TOKENS_PER_MESSAGE)),
    ],
)
def test_a_prompt_is_taken_for_its_bytes(request_: dict[str, object], size: tuple[int, int]) -> None:
    assert prompt_size(request_) == size


def text(request: dict[str, object]) -> bytes:
    return b"".join(prompt_pieces(request))


def test_tokens_count_as_many_bytes_as_they_are_taken_for() -> None:
    assert len(text({"prompt": [1, 2, 70_000]})) == 3 * BYTES_PER_TOKEN
    assert text({"prompt": [1, 2, 3]}).startswith(text({"prompt": [1, 2]}))


def test_of_several_prompts_the_first_one_counts() -> None:
    assert text({"prompt": ["one", "two"]}) == text({"prompt": "one"})
    assert text({"prompt": [[1], [2]]}) == text({"prompt": [1]})


def test_a_conversation_that_goes_on_begins_as_it_did_before() -> None:
    before = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    after = [*before, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "More"}]
    assert text({"messages": after}).startswith(text({"messages": before}))


def test_who_says_something_is_part_of_the_text() -> None:
    one, other = ({"messages": [{"role": role, "content": "x"}]} for role in ("user", "assistant"))
    assert text(one) != text(other)


def test_parts_of_a_message_count_as_one_text() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    whole = {"messages": [{"role": "user", "content": "Hello"}]}
    assert text({"messages": [{"role": "user", "content": parts}]}) == text(whole)

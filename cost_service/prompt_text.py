"""A prompt as whoever does not tokenize sees it: how many tokens it is taken for, and its text in the model's order.

Rule: of a request that was checked, or of the same fields of Ray's request models. What is no text counts as none.
"""

from collections.abc import Iterator, Mapping
from typing import Any

BYTES_PER_TOKEN = 4
"""Of English text, about."""

TOKENS_PER_MESSAGE = 4
"""What a chat template adds, about."""


def prompt_size(request: Mapping[str, Any]) -> tuple[int, int]:
    """Return the number of a request's prompts, and the tokens that they are taken for, each on average."""
    if "messages" in request:
        return 1, sum(TOKENS_PER_MESSAGE + _text_tokens(message["content"]) for message in request["messages"])
    prompts = _prompts(request["prompt"])
    sizes = [_text_tokens(one) if isinstance(one, str) else len(one) for one in prompts]
    return len(prompts), sum(sizes) // len(sizes)


def prompt_pieces(request: Mapping[str, Any]) -> Iterator[bytes]:
    """Yield what a request's first prompt consists of: equal beginnings are equal prompts so far.

    Tokens come as `BYTES_PER_TOKEN` bytes each, so that lengths in bytes mean the same for both kinds of prompts.
    """
    if "messages" in request:
        for message in request["messages"]:
            yield f"\0{message['role']}\0".encode()
            yield from _text_pieces(message["content"])
        return
    first = _prompts(request["prompt"])[0]
    if isinstance(first, str):
        yield first.encode(errors="surrogatepass")
    else:
        yield b"".join(token.to_bytes(BYTES_PER_TOKEN, "little", signed=True) for token in first)


def _prompts(prompt: Any) -> list[Any]:
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


def _text_pieces(text: str | list[dict[str, str]]) -> Iterator[bytes]:
    if isinstance(text, str):
        yield text.encode(errors="surrogatepass")
        return
    for part in text:
        yield part["text"].encode(errors="surrogatepass")


def _text_tokens(text: str | list[dict[str, str]]) -> int:
    """Of a text, or of a message's text parts."""
    if isinstance(text, str):
        return -(-(len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))) // BYTES_PER_TOKEN)
    return sum(_text_tokens(part["text"]) for part in text)

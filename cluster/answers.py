"""Reads out of answers why they ended and how many tokens they had; never what they say.

Source: vLLM 0.29 `entrypoints/openai/chat_completion/serving.py` and `completion/serving.py`: a streamed choice's last event
has its `finish_reason`; with `stream_options.include_usage` one more event without choices has the usage.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FINISH, USAGE = '"finish_reason":"', '"choices":[]'
"""What marks those events; in a text quotes are escaped, so that no answer can say it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a whole answer ended."""

    reasons: Sequence[str]
    """`finish_reason` of each of its sequences."""

    output_tokens: int
    """Of all sequences together."""

    @property
    def by_itself(self) -> bool:
        """Whether the model was done, in all sequences."""
        return set(self.reasons) == {"stop"}

    @property
    def cut(self) -> bool:
        """Whether the limit was what ended it, in all sequences."""
        return set(self.reasons) == {"length"}


class AnswerReader:
    """Reads one answer, whole or event by event."""

    def __init__(self, *, wants_usage: bool, on_end: Callable[[Ending], None]) -> None:
        """Begin an answer.

        Args:
            wants_usage: Whether the client has asked for a stream's usage; else the event with it is ours alone.
            on_end: Called once, with an answer's ending; never for one that breaks off.
        """
        self._wants_usage, self._on_end = wants_usage, on_end
        self._reasons: list[str] = []

    def read_whole(self, reasons: Sequence[str], output_tokens: int) -> None:
        """Take note of an answer that came at once."""
        self._on_end(Ending(reasons=reasons, output_tokens=output_tokens))

    def read(self, event: str) -> bool:
        """Take note of a server-sent event; return whether it is for the client."""
        if FINISH in event:
            self._reasons += [reason for choice in _body(event)["choices"] if (reason := choice.get("finish_reason"))]
        if USAGE not in event or (usage := _body(event).get("usage")) is None:
            return True
        self.read_whole(self._reasons, usage["completion_tokens"])
        return self._wants_usage


def with_usage(checked: Mapping[str, Any]) -> dict[str, Any]:
    """What a checked request must have added so that its answer tells its usage: nothing where it asks for it anyway."""
    if not checked.get("stream") or wants_usage(checked):
        return {}
    return {"stream_options": {"include_usage": True}}  # alone: `continuous_usage_stats` means nothing without it


def wants_usage(checked: Mapping[str, Any]) -> bool:
    """Whether the client has asked for a stream's usage."""
    return bool(checked.get("stream_options", {}).get("include_usage"))


def _body(event: str) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(event.removeprefix("data: "))
    return body

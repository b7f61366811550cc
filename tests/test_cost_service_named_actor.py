"""Goal: whoever exchanges with an actor of the cluster goes on while it is away, says so once, and finds it when it is back.

Method: the loop itself, over a lookup that answers as Ray's does; tests/test_ray_serve.py kills the real actor.
"""

import asyncio
from collections.abc import Iterator

import pytest

from cost_service import named_actor


class Enough(BaseException):
    """Ends the loop, which no `Exception` may."""


def run(monkeypatch: pytest.MonkeyPatch, lookups: list[str | None], answers: list[Exception | None]) -> list[str]:
    """Let the loop meet these lookups and answers; return what it did."""
    told: list[str] = []
    found: Iterator[str | None] = iter(lookups)
    coming = iter(answers)

    def find(name: str) -> str | None:
        assert name == "n"
        actor = next(found)
        told.append(f"found {actor}")
        return actor

    async def exchange(actor: str) -> None:
        answer = next(coming, Enough())
        told.append(f"asked {actor}")
        if answer is not None:
            raise answer

    monkeypatch.setattr(named_actor, "find_actor", find)
    with pytest.raises(Enough):
        asyncio.run(
            named_actor.exchange_for_ever(
                "n",
                exchange,
                lambda away: told.append("away" if away else "back"),
                interval_s=lambda: 0.0,
                kept="costs stay",
            )
        )
    return told


def test_an_actor_that_answers_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, ["a"], [None, None]) == ["found a", "asked a", "asked a", "asked a"]


def test_one_that_is_away_is_said_once_and_looked_up_until_it_is_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told = run(monkeypatch, [None, "a", "a", "b"], [RuntimeError("died"), ValueError("refused"), None])
    assert told == [
        "found None", "away", "found a", "asked a", "found a", "asked a", "found b", "asked b", "back", "asked b"
    ]  # fmt: skip
    assert caplog.text.count("The actor n does not answer") == 1


def test_one_that_never_answers_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named_actor, "TIMEOUT_S", 0.01)
    told: list[bool] = []

    async def exchange(actor: str) -> None:
        if told:
            raise Enough
        await asyncio.Event().wait()

    monkeypatch.setattr(named_actor, "find_actor", lambda name: "a")
    with pytest.raises(Enough):
        asyncio.run(
            named_actor.exchange_for_ever("n", exchange, told.append, interval_s=lambda: 0.0, kept="costs stay")
        )
    assert told == [True]

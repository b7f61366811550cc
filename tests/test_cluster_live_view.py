"""Goal: whoever watches a cluster sees at a glance how it has been, how it is, and what is away.

Method: looks as `cluster.status` finds them; tests/test_ray_monitoring.py has the command on a running application.
"""

import re
from typing import Any

import pytest

from cluster.live_view import BLOCKS, PLAIN_BLOCKS, LiveView, Look, blocks_for, draw, plain_line, redrawn
from cluster.status import summarise

TOTALS = {
    "epoch": "e", "num_kv_blocks": 100, "num_free_kv_blocks": 25, "output_tokens": 0, "swaps": 0, "recomputes": 0,
    "num_running": 3, "num_waiting": 4,
}  # fmt: skip


def told(name: str, seen_s: float, **totals: Any) -> dict[str, Any]:
    return {
        "application": "app", "replica": name, "pid": 1, "age_s": totals.pop("age_s", 0.1), "seen_s": seen_s,
        "totals": TOTALS | totals,
    }  # fmt: skip


FAIR = {"pools": {"one": {"gap_of_bound": 0.25}, "two": {"gap_of_bound": None}}}


def test_a_look_sums_up_all_replicas_since_the_look_before() -> None:
    rows = [
        summarise(told("a", 12.0, output_tokens=100, swaps=5, recomputes=2), told("a", 10.0, output_tokens=40, swaps=3)),
        summarise(told("b", 12.0, num_free_kv_blocks=10, output_tokens=7), told("b", 10.0, epoch="old", output_tokens=9)),
        summarise({**told("c", 12.0), "totals": None, "age_s": None}, None),
    ]  # fmt: skip
    assert Look.of(rows, FAIR) == Look(
        num_replicas=3, num_running=6, num_waiting=8, tokens_per_s=30.0, kv_used_fraction=0.9, preemptions=4,
        gap_of_bound=0.25,
    )  # fmt: skip


def test_what_is_away_is_said_and_the_rest_is_shown() -> None:
    silent = summarise(told("replica-1", 1.0, age_s=31.4), None)
    look = Look.of([silent], {"away": "no actor fairness is running."}, ["AdaptiveLLMServer:m of app: 1 STARTING."])
    assert look.away == (
        "AdaptiveLLMServer:m of app: 1 STARTING.",
        "Replica replica-1: its engine has 3 running and is silent for 31 s.",
        "Fairness: no actor fairness is running.",
    )
    assert look.num_running == 3
    view = LiveView()
    view.add(look)
    lines = view.frame("", time="now", width=100, height=30)
    assert [line for line in lines if line.startswith("Away: ")] == [f"Away: {each}" for each in look.away]
    assert "Away: AdaptiveLLMServer" in plain_line(look, time="now")


def test_an_idle_engine_that_says_nothing_is_not_away() -> None:
    assert Look.of([summarise(told("a", 1.0, age_s=900.0, num_running=0), None)], FAIR).away == ()


def test_where_nothing_answers_figures_are_unknown_and_not_zero() -> None:
    view = LiveView()
    view.add(Look(num_replicas=1, num_running=1, num_waiting=0, tokens_per_s=5.0, kv_used_fraction=0.5, preemptions=0))
    view.add(Look.of([], {"away": "gone."}, ["Replicas: no application of ours is running."]))
    tokens = next(line for line in view.frame("", time="", width=80, height=30) if line.startswith("tokens/s"))
    assert re.fullmatch(r"tokens/s +█ {9,}- +most 5", tokens), tokens
    assert "tokens/s -" in plain_line(Look(), time="")


@pytest.mark.parametrize(
    ("values", "top", "drawn"),
    [
        ([], None, ""),
        ([0.0, 0.0], None, "▁▁"),
        ([0.0, 7.0], None, "▁█"),
        ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], None, BLOCKS),
        ([0.001, 700.0], None, "▂█"),
        ([0.5, 1.0, 9.0], 1.0, "▅██"),
        ([None, 1.0, None], None, " █ "),
    ],
)
def test_a_curve_goes_from_nothing_to_the_most(values: list[float | None], top: float | None, drawn: str) -> None:
    assert draw(values, top=top) == drawn


@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 50), (30, 5), (10, 2)])
def test_a_frame_fits_its_terminal_however_long_one_watches(width: int, height: int) -> None:
    view = LiveView()
    for number in range(1000):
        view.add(Look(num_replicas=2, num_running=number, num_waiting=0, tokens_per_s=0.0, preemptions=number % 9))
        lines = view.frame("table\n" * 60, time="12:00:00", width=width, height=height)
        assert len(lines) < height, "the last line would scroll"
        assert max(map(len, lines)) <= width
    assert lines[-1].startswith("... ")


def test_a_frame_is_drawn_over_the_one_before() -> None:
    assert redrawn(["a", "b"]) == "\033[Ha\033[K\nb\033[K\n\033[J"


@pytest.mark.parametrize(("encoding", "blocks"), [("utf-8", BLOCKS), ("latin-1", PLAIN_BLOCKS), (None, PLAIN_BLOCKS)])
def test_a_terminal_without_blocks_gets_letters(encoding: str | None, blocks: str) -> None:
    assert blocks_for(encoding) == blocks
    assert len(blocks) == len(BLOCKS)

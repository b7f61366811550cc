"""Goal: people see how many replicas run, how many are wanted, and what the load asks for and why.

Method: what controller and replicas say, as plain values; tests/test_ray_scaling.py has the command on a running
application.
"""

from dataclasses import asdict
from typing import Any

from cluster.scaling import scaling_rows, scaling_text
from global_scheduler.autoscaling import AutoscalerSettings
from tests.test_replicas_messages import TOTALS_FIELDS

SETTINGS = AutoscalerSettings(min_replicas=1, max_replicas=6, target_queued_s=5.0)
QUIET = {
    "num_waiting": 0,
    "num_kv_blocks": 100,
    "num_free_kv_blocks": 80,
    "max_num_seqs": 10,
    "queued_s": 0.0,
    "epoch": "e",
}


def deployment(*states: str, target: int, scaled: bool = True) -> dict[str, Any]:
    return {
        "application": "app", "deployment": "AdaptiveLLMServer:m", "target": target, "states": list(states),
        "autoscaling": asdict(SETTINGS) if scaled else None,
    }  # fmt: skip


def said(name: str, *, seen_s: float = 10.0, age_s: float = 0.1, **totals: Any) -> dict[str, Any]:
    """One replica's status."""
    return {
        name: {
            "replica": name, "application": "app", "seen_s": seen_s, "age_s": age_s,
            "totals": TOTALS_FIELDS | QUIET | totals,
        }
    }  # fmt: skip


def test_a_fixed_number_is_shown_with_what_is_not_running_yet() -> None:
    rows = scaling_rows([deployment("RUNNING", "STARTING", target=2, scaled=False)], {}, {})
    assert scaling_text(rows) == "AdaptiveLLMServer:m: 1 replicas running, 1 starting, 2 wanted."


def test_a_scaled_number_is_shown_with_what_the_load_asks_for_and_why() -> None:
    now = said("a", queued_s=12.0) | said("b", queued_s=9.0)
    (row,) = scaling_rows([deployment("RUNNING", "RUNNING", target=2)], now, {})
    assert (row["running"], row["wanted"], row["asked"], row["least"], row["most"]) == (2, 2, 5, 1, 6)
    assert scaling_text([row]) == (
        "AdaptiveLLMServer:m: 2 replicas running, 2 wanted; 1 to 6 are allowed, the load asks for 5: "
        "10.5 s of predicted work wait at a replica, 5 s are aimed at."
    )


def test_preemptions_are_counted_between_two_looks() -> None:
    before, now = said("a", seen_s=10.0, swaps=0, recomputes=5), said("a", seen_s=12.0, swaps=3, recomputes=6)
    (row,) = scaling_rows([deployment("RUNNING", target=1)], now, before)
    assert (row["asked"], row["why"]) == (2, "a replica preempts 2.0 times a second, 1 are borne")
    (row,) = scaling_rows([deployment("RUNNING", target=1)], now, said("a", swaps=0, recomputes=5, epoch="older"))
    assert row["asked"] == 1, "another life of the engine"


def test_who_has_said_nothing_is_said() -> None:
    (row,) = scaling_rows([deployment("RUNNING", target=1)], said("a", age_s=99.0, num_running=3), {})
    assert (row["asked"], row["why"]) == (1, "no replica says how full it is")
    idle = {"a": {"replica": "a", "application": "app", "seen_s": 1.0, "age_s": None, "totals": None}}
    (row,) = scaling_rows([deployment("RUNNING", target=1)], idle, {})
    assert (row["asked"], row["why"]) == (1, "0.00 of memory and seats are in use, 0.8 is aimed at")

"""Goal: weighted turnaround is what a request took over what it would have taken alone, and a lost report costs nothing.

Method: by hand; the engine's side with vLLM's scheduler is in tests/test_replicas_vllm_admission.py.
"""

import pytest

from replicas.turnaround import WINDOW, Ended, TurnaroundMeans, Turnarounds


def test_a_request_counts_by_its_ratio_and_one_without_a_prediction_not_at_all() -> None:
    turnarounds = Turnarounds()
    turnarounds.add("f", turnaround_s=3.0, alone_s=1.0)
    turnarounds.add("f", turnaround_s=1.0, alone_s=1.0)
    turnarounds.add("g", turnaround_s=9.0, alone_s=0.0)
    assert turnarounds.of(["f", "g", "f"]) == {"f": Ended(num=2, weighted_turnaround=4.0)}


def test_alone_is_at_the_pace_of_the_fastest_steps() -> None:
    turnarounds = Turnarounds()
    assert turnarounds.alone_step_s == 0.0
    for step_s in (0.0, 0.3, 0.1, 0.0, 0.2):
        turnarounds.note_step(step_s)
    assert turnarounds.alone_step_s == 0.1


def test_the_mean_is_the_same_whether_a_report_is_lost_or_repeated() -> None:
    means = TurnaroundMeans()
    assert means.read("e", {"f": Ended(num=1, weighted_turnaround=2.0)}) == {"f": 2.0}
    assert means.read("e", {"f": Ended(num=1, weighted_turnaround=2.0)}) == {}
    assert means.read("e", {"f": Ended(num=4, weighted_turnaround=20.0)}) == {"f": pytest.approx(5.0)}
    assert means.means == {"f": Ended(num=4, weighted_turnaround=pytest.approx(5.0))}


def test_another_life_of_the_engine_counts_from_zero() -> None:
    means = TurnaroundMeans()
    means.read("e", {"f": Ended(num=5, weighted_turnaround=50.0)})
    assert means.read("e2", {"f": Ended(num=5, weighted_turnaround=5.0)}) == {"f": pytest.approx(5.5)}


def test_old_requests_are_forgotten() -> None:
    means = TurnaroundMeans()
    means.read("e", {"f": Ended(num=WINDOW, weighted_turnaround=100.0 * WINDOW)})
    num = WINDOW
    for _ in range(10):
        num += WINDOW
        (mean,) = means.read("e", {"f": Ended(num=num, weighted_turnaround=100.0 * WINDOW + num - WINDOW)}).values()
    assert mean == pytest.approx(1.0)

"""Goal: a run is held to the ratios that an earlier one has reached, never to its times, and only where both are sure.

Method: hand-made reports; the baseline that the project keeps is read as it is.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from cluster import bench
from cluster.bench_baseline import Baseline, baseline_of, read, regressions
from cluster.bench_figures import RATIO_FIGURES

KEPT = Path(__file__).parents[1] / "docs" / "baseline.json"
SETTINGS = {"trace": "synthetic:", "seed": 1, "policies": ["stock", "swap"], "repeats": 3, "num_kv_blocks": 7}


def ratio(low: float, high: float) -> dict[str, Any]:
    return {"median": (low + high) / 2, "low": low, "high": high, "repeats": [low, high]}


def report(times: float = 1.0, **ratios: dict[str, Any]) -> dict[str, Any]:
    figures = dict.fromkeys(RATIO_FIGURES, times)
    given = {"throughput_tokens_per_s": ratio(1.1, 1.2), "ttft_s_p99": ratio(0.8, 0.9)} | ratios
    arms = {name: {"repeats": [{**figures, "records": ["a request"]}] * 3} for name in ("stock", "swap")}
    return {
        "benchmark": "preemption", "command": "python -m cluster bench", "settings": SETTINGS, "interval": "95 %",
        "machine": {"cores": 2, "load_average_at_end": 1.5}, "arms": arms, "ratio_to_stock": {"swap": given},
    }  # fmt: skip


def against(now: dict[str, Any]) -> list[str]:
    return regressions(baseline_of(report()), now)


def test_a_baseline_is_small_and_holds_no_request(tmp_path: Path) -> None:
    kept = baseline_of(report())
    assert set(kept) == {"benchmark", "command", "settings", "interval", "machine", "stock", "ratio_to_stock"}
    assert kept["machine"] == {"cores": 2}
    assert "a request" not in json.dumps(kept)
    path = tmp_path / "baseline.json"
    path.write_text(json.dumps(kept))
    assert read(path) == kept


def test_times_may_be_whatever_they_are() -> None:
    assert against(report(times=1000.0)) == []


def test_what_is_worse_beyond_both_intervals_is_named() -> None:
    (sentence,) = against(report(throughput_tokens_per_s=ratio(0.9, 1.0)))
    assert sentence == (
        "swap has regressed: throughput_tokens_per_s / stock is 0.950 (0.900 to 1.000), "
        "and the baseline has 1.150 (1.100 to 1.200)."
    )
    (sentence,) = against(report(ttft_s_p99=ratio(1.0, 1.1)))
    assert sentence.startswith("swap has regressed: ttft_s_p99 / stock is 1.050")


def test_what_may_be_chance_or_is_better_is_not() -> None:
    assert against(report(throughput_tokens_per_s=ratio(0.9, 1.15))) == []
    assert against(report(ttft_s_p99=ratio(0.85, 1.3))) == []
    assert against(report(throughput_tokens_per_s=ratio(2.0, 2.1), ttft_s_p99=ratio(0.1, 0.2))) == []


def test_a_ratio_that_is_there_no_more_is_named() -> None:
    now = report()
    del now["ratio_to_stock"]["swap"]["ttft_s_p99"]
    assert against(now) == ["swap has no ttft_s_p99 / stock any more; it was 0.850."]


def baseline(document: dict[str, Any] | None = None, target: Path | None = None) -> Baseline:
    return Baseline(baseline_of(report()) if document is None else document, target)


@pytest.mark.parametrize(
    ("settings", "arms", "stock", "repeats", "message"),
    [
        (SETTINGS, ["stock", "swap"], "stock", 1, "needs the arm stock, another one, and at least 2 --repeats"),
        (SETTINGS, ["swap", "adaptive"], None, 3, "needs the arm stock"),
        (SETTINGS, ["stock"], "stock", 3, "another one"),
        (SETTINGS, ["stock", "adaptive"], "stock", 3, "has an arm swap, and this run has none: add it to --policy"),
        (SETTINGS | {"seed": 2}, ["stock", "swap"], "stock", 3, "measured with seed 1, and this run has 2"),
        (SETTINGS | {"rate": 2}, ["stock", "swap"], "stock", 3, "measured with rate None, and this run has 2"),
    ],
)
def test_what_could_not_be_compared_is_refused_before_it_runs(
    settings: dict[str, Any], arms: list[str], stock: str | None, repeats: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        baseline().expect(settings, arms, stock, repeats)


def test_more_arms_and_repeats_and_other_blocks_can_be_compared() -> None:
    more = SETTINGS | {"policies": ["stock", "swap", "adaptive"], "repeats": 9, "num_kv_blocks": 8}
    baseline().expect(more, ["stock", "swap", "adaptive"], "stock", 9)


def test_without_a_baseline_every_run_is_welcome() -> None:
    Baseline(None, None).expect({}, ["swap"], None, 1)
    assert Baseline(None, None).judged(report()) == {}


def test_an_interrupted_run_is_neither_kept_nor_judged(tmp_path: Path) -> None:
    target = tmp_path / "kept.json"
    assert baseline(target=target).judged(report(throughput_tokens_per_s=ratio(0.1, 0.2)) | {"partial": True}) == {}
    assert not target.exists()
    assert baseline(target=target).judged(report()) == {"regressions": []}
    assert read(target) == baseline_of(report())


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"settings": {}, "ratio_to_stock": {}}', "[" * 5000])
def test_a_file_that_is_no_baseline_is_one_sentence_and_status_2(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "b.json"
    path.write_text(text)
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    assert bench.main(parser.parse_args(["--baseline", str(path)])) == 2
    assert capsys.readouterr().err == (
        "Error: --baseline b.json holds no ratios to stock: make one with --save-baseline.\n"
    )


def test_the_baseline_that_the_project_keeps_fits_the_command_that_it_names(tmp_path: Path) -> None:
    kept = read(KEPT)
    command = kept["command"].split()
    assert command[:4] == ["python", "-m", "cluster", "bench"]
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    plan = bench.plan_of(parser.parse_args(command[4:]), tmp_path)
    Baseline(kept, None).expect(plan.as_report(), plan.arms, plan.stock_arm, len(plan.workloads))
    assert KEPT.stat().st_size < 20_000

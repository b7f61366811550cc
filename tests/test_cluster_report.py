"""Goal: a result becomes one page that stands alone, says what was measured, and is the same for the same result."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.__main__ import main
from cluster.records import RequestRecord
from cluster.report import page, read_result
from cluster.service_curve import service_gaps

CALIBRATION = {"ttft_s": 0.1, "ttft_s_per_prompt_token": 0.001, "s_per_output_token": 0.01, "check": {}}


def record(name: str, tenant: str, arrival_s: float, first_s: float | None, finish_s: float | None) -> dict[str, Any]:
    return {
        "request_id": name, "tenant": tenant, "arrival_s": arrival_s, "first_token_s": first_s, "finish_s": finish_s,
        "prompt_tokens": 100, "output_tokens": 10, "delivered_tokens": 10 if finish_s else (0 if first_s is None else 3),
        "swaps": 0, "recomputes": 0,
    }  # fmt: skip


def run(**more: Any) -> dict[str, Any]:
    names = (
        "throughput_tokens_per_s", "weighted_turnaround_mean", "weighted_turnaround_p99", "ttft_s_p50", "ttft_s_p99",
        "tpot_s_p50", "tpot_s_p99", "preemptions", "swaps", "recomputes", "jain_index", "max_service_gap", "unfinished",
        "requests",
    )  # fmt: skip
    figures = dict.fromkeys(names, 1.5)
    records = [
        record("a", "one<two>", 0.0, 1.0, 2.0), record("b", "three", 0.5, 1.5, None), record("c", "three", 1.0, None, None)
    ]  # fmt: skip
    return {**figures, "tenants": dict.fromkeys(("one<two>", "three"), figures), "records": records, **more}


def result(**more: Any) -> dict[str, Any]:
    costs = {"swap": {"measured": 3.0, "predicted_s": 2.0, "measured_s": 4.0}}
    arms = {"stock": {"repeats": [run()]}, "adaptive": {"repeats": [run(preemption_costs=costs)]}}
    ratio = {"median": 1.07, "low": 1.01, "high": 1.2}
    return {
        "benchmark": "preemption", "settings": {"repeats": 1}, "machine": {"cores": 2}, "calibration": CALIBRATION,
        "interval": "of logarithms", "arms": arms, "command": "python -m cluster bench --policy stock,adaptive",
        "ratio_to_stock": {"adaptive": {"throughput_tokens_per_s": ratio}}, **more,
    }  # fmt: skip


def test_a_page_says_what_was_compared_and_how_to_repeat_it() -> None:
    text = page(result())
    assert "throughput_tokens_per_s, adaptive / stock</td><td>1.07</td><td>1.01</td><td>1.2" in text
    assert "adaptive: swap</td><td>3</td><td>2</td><td>4</td><td>0.5" in text
    assert "<pre>python -m cluster bench --policy stock,adaptive</pre>" in text
    assert text.count("<svg") == 3


def test_a_page_needs_nothing_from_elsewhere_and_runs_nothing() -> None:
    text = page(result())
    assert "<script" not in text
    assert "src=" not in text
    assert "one&lt;two&gt;" in text
    assert "one<two>" not in text


def test_a_page_of_a_simulation_says_so_and_shows_all_that_a_benchmarks_does(tmp_path: Path) -> None:
    trace, simulated = tmp_path / "trace.csv", tmp_path / "simulated.json"
    lines = [f"{number * 0.02},t{number % 3},{1 + number * 37 % 900},{1 + number * 53 % 300}" for number in range(150)]
    trace.write_text("\n".join(["arrival_s,tenant,prompt_tokens,output_tokens", *lines]) + "\n")
    arguments = [
        "simulate",
        "--trace",
        f"csv:{trace}",
        "--replicas",
        "1",
        "--pool-fraction",
        "0.4",
        "--policy",
        "stock,swap",
    ]
    assert main([*arguments, "--json", str(simulated), "--plot", str(tmp_path / "plot.svg")]) == 0
    assert main(["report", str(simulated)]) == 0
    text = (tmp_path / "simulated.html").read_text()
    assert "SIMULATED" in text
    assert "SIMULATED" not in page(result())
    assert text.count("<svg") == 3
    assert "throughput_tokens_per_s, swap / stock" in text
    assert "swap: swap</td>" in text
    assert "<td>t1</td>" in text
    assert "Simulated" in (tmp_path / "plot.svg").read_text()
    assert "records" not in json.loads(simulated.read_text())["arms"]["swap"]


def test_a_page_of_fair_admission_holds_the_gap_against_the_bound(tmp_path: Path) -> None:
    path = tmp_path / "fair.json"
    arguments = ["simulate", "--trace", "synthetic:requests=200,rate=inf,tenants=2", "--replicas", "1"]
    arguments += ["--pool-fraction", "0.4", "--admission", "first-come,fair", "--policy", "adaptive"]
    assert main([*arguments, "--json", str(path)]) == 0
    text = page(read_result(path))
    seen = json.loads(path.read_text())["arms"]["fair/adaptive"]["fairness"]
    for name in ("max_service_gap", "bound", "gap_over_bound"):
        assert f"<td>fairness: {name}</td><td>-</td><td>{seen[name]:.4g}</td>" in text
    assert seen["bound"] > 0
    assert "<!-- bound, fair/adaptive -->" in text  # matplotlib's comment on the text of a legend
    assert "<!-- bound, first-come/adaptive -->" not in text
    assert "fairness: bound" not in page(result())


def test_a_page_of_running_clusters_says_so() -> None:
    assert "<title>Policies compared over HTTP</title>" in page(result(benchmark="served"))


def test_the_same_result_gives_the_same_page() -> None:
    assert page(result()) == page(result())


def test_the_command_writes_the_page_beside_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(result()))
    assert read_result(path) == result()
    assert main(["report", str(path)]) == 0
    assert (tmp_path / "bench.html").read_text() == page(result())
    assert main(["report", str(path), "--output", str(tmp_path / "other.html")]) == 0
    assert "other.html" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"arms": {}}', '{"arms": {"stock": {"repeats": [{}]}}}'])
def test_what_is_no_result_is_refused(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.json"
    path.write_text(text)
    assert main(["report", str(path)]) == 2
    assert "must be a result of bench or simulate" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "none.json")]) == 2


def gaps_of(*records: dict[str, Any]) -> list[tuple[float, float]]:
    return service_gaps([RequestRecord(**one) for one in records])


def test_a_gap_is_between_tenants_that_wait_at_the_same_time() -> None:
    """Both wait from 0 to 4; one of them is served from 1 to 3: 100 for its prompt and 20 for ten tokens."""
    served, waits = record("a", "one", 0.0, 1.0, 3.0), record("b", "two", 0.0, 4.0, 4.0)
    curve = gaps_of(served, record("c", "one", 0.0, 4.0, 4.0), waits)
    at = {round(at_s, 6): gap for at_s, gap in curve}
    assert at[0.5] == 0.0
    assert at[2.0] == pytest.approx(110.0)
    assert at[3.5] == pytest.approx(120.0)
    assert at[4.0] == 0.0


def test_a_tenant_that_begins_to_wait_owes_nothing_for_what_was_before() -> None:
    """The first tenant is served alone; then both wait, and the gap begins at zero."""
    curve = gaps_of(
        record("a", "one", 0.0, 0.5, 1.0), record("b", "one", 0.0, 4.0, 4.0), record("c", "two", 2.0, 4.0, 4.0)
    )  # fmt: skip
    assert max(gap for _, gap in curve) == 0.0

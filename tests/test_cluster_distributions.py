"""Goal: a run's distributions are those of its requests, in a size that does not grow with them."""

import json

from cluster.bench_figures import Calibration, quantile
from cluster.distributions import SHARES, TENANT_SHARES, distributions
from cluster.records import RequestRecord

ALONE = Calibration(ttft_s=0.1, ttft_s_per_prompt_token=0.001, s_per_output_token=0.01)


def record(number: int, **changes: float | None) -> RequestRecord:
    times = {"first_token_s": number + 1.0 + number % 7, "finish_s": number + 9.0 + number % 5} | changes
    return RequestRecord(
        request_id=str(number), tenant=f"t{number % 3}", arrival_s=float(number), prompt_tokens=100 + number % 11,
        output_tokens=20, delivered_tokens=0 if times["first_token_s"] is None else 20, **times,  # type: ignore[arg-type]
    )  # fmt: skip


def test_values_are_those_at_the_shares_of_all_and_of_each_tenant() -> None:
    records = [record(number) for number in range(200)]
    spread = distributions(records, ALONE)
    firsts_s = [1.0 + number % 7 for number in range(200)]
    assert spread["ttft_s"] == [quantile(firsts_s, share) for share in SHARES]
    turnarounds = [(9.0 + number % 5) / ALONE.alone_s(records[number]) for number in range(1, 200, 3)]
    assert spread["tenants"]["t1"]["weighted_turnaround"] == [quantile(turnarounds, share) for share in TENANT_SHARES]


def test_a_request_without_an_end_counts_nowhere() -> None:
    whole, cut = [record(number) for number in range(30)], [record(31, first_token_s=None, finish_s=None)]
    everybody = distributions(whole + cut, ALONE)
    assert everybody["ttft_s"] == distributions(whole, ALONE)["ttft_s"]
    assert distributions(cut, ALONE)["tenants"]["t1"] == {"weighted_turnaround": None, "ttft_s": None}


def test_the_size_does_not_grow_with_the_requests() -> None:
    few, many = (len(json.dumps(distributions(map(record, range(num)), ALONE))) for num in (30, 3000))
    assert many < 2 * few

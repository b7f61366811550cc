"""Goal: output lengths are predicted as well as the past allows, and never much worse than the tenant's own quantiles.

Method: made-up tenants with known habits; hypothesis for histories of anything; the public traces where they are at hand.
"""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_service import output_length
from cost_service.evaluate_lengths import LEAST_GAIN, evaluate_lengths, oracle_losses
from cost_service.output_length import (
    EVERYBODY,
    HISTORY,
    NEWEST,
    PREDICTORS,
    QUANTILES,
    History,
    OutputLength,
    quantiles_of,
)
from cost_service.traces import TraceRequest, load_trace
from tests.shared_data import needs_data


def requests(num: int, *, by_prompt: bool, tenants: int = 4, seed: int = 0) -> list[TraceRequest]:
    """Tenants whose lengths follow their prompts, or only the tenant."""
    rng, made = random.Random(seed), []
    for index in range(num):
        tenant, prompt = rng.randrange(tenants), int(2 ** rng.uniform(3, 11))
        middle = 20 + prompt / 2 if by_prompt else 60 * (1 + tenant)
        made.append(
            TraceRequest(
                arrival_s=float(index), tenant=f"t{tenant}", prompt_tokens=prompt,
                output_tokens=max(1, int(middle * rng.lognormvariate(0.0, 0.3))),
            )
        )  # fmt: skip
    return made


def test_prompts_that_tell_the_length_are_listened_to() -> None:
    report = evaluate_lengths(requests(1500, by_prompt=True))
    assert report["held_out_loss_ratio"] < 0.6
    assert report["share_of_honest_gain"] > 0.5


def test_where_only_the_tenant_matters_next_to_nothing_is_lost() -> None:
    report = evaluate_lengths(requests(2000, by_prompt=False))
    assert report["loss_ratio"] < 1.01
    assert report["oracle_gain"] < LEAST_GAIN
    assert report["oracle_gain_in_hindsight"] == pytest.approx(report["oracle_gain_by_chance"], abs=0.01)
    assert report["share_of_honest_gain"] is None
    for quantile, share in report["coverage"].items():
        assert share == pytest.approx(float(quantile), abs=0.06)


def test_a_habit_that_changes_is_followed() -> None:
    model = OutputLength()
    for length in [100] * 300 + [1000] * 150:
        model.observe("t", 50, length)
    assert model.predict("t", 50)[1] > 500


def test_a_new_tenant_is_taken_for_one_of_all() -> None:
    model = OutputLength()
    assert model.predict("t", 10)[1] == pytest.approx(output_length.FIRST_GUESS[1])
    for index in range(400):
        model.observe(f"old {index % 7}", 100, 300 + index % 50)
    assert 280 < model.predict("new", 100)[1] < 370


def test_kinds_of_requests_have_histories_of_their_own() -> None:
    model = OutputLength()
    for _ in range(60):
        model.observe("t", 100, 20, kind="completion")
        model.observe("t", 100, 900, kind="chat")
    assert model.predict("t", 100, kind="completion")[1] < 100 < 500 < model.predict("t", 100, kind="chat")[1]


def test_an_oracle_that_leaves_out_what_it_judges_does_not_gain_from_chance() -> None:
    losses = {way: loss.mean() for way, loss in oracle_losses(requests(2000, by_prompt=False), num_bins=8).items()}
    assert losses["hindsight"] == pytest.approx(losses["chance"], rel=0.01)
    assert losses["hindsight"] < losses["honest"] * 0.98


def test_an_oracle_gains_from_prompts_that_tell_the_length() -> None:
    losses = {way: loss.mean() for way, loss in oracle_losses(requests(2000, by_prompt=True), num_bins=4).items()}
    assert losses["honest"] < 0.7 * losses["chance"]


def test_lengths_that_never_change_are_matched() -> None:
    made = [TraceRequest(arrival_s=0.0, tenant="a", prompt_tokens=1, output_tokens=7)] * 50
    report = evaluate_lengths(made)
    assert report["held_out_loss_ratio"] == pytest.approx(1.0, abs=1e-3)
    assert report["share_of_hindsight_gain"] is None
    with pytest.raises(ValueError, match="at least 2 requests"):
        evaluate_lengths(made[:1])


def test_to_predict_changes_nothing() -> None:
    model = OutputLength()
    for request in requests(50, by_prompt=True):
        model.observe(request.tenant, request.prompt_tokens, request.output_tokens)
    before = json.dumps(model.to_document())
    model.predict("t0", 5)
    model.predict("never seen", 5)
    assert json.dumps(model.to_document()) == before


def test_a_document_does_not_change_with_the_model() -> None:
    model = OutputLength()
    model.observe("a", 3, 4)
    document, before = model.to_document(), json.dumps(model.to_document())
    model.observe("a", 3, 400)
    assert json.dumps(document) == before


def test_a_tenant_that_is_forgotten_is_predicted_as_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_length, "MAX_TENANTS", 3)
    model = OutputLength()
    for tenant in ("gone", "a", "b", "c"):
        for _ in range(40):
            model.observe(tenant, 10, 5000 if tenant == "gone" else 50)
    assert model.predict("gone", 10) == model.predict("new", 10)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_length, "MAX_TENANTS", 10)
    model = OutputLength()
    for index in range(40):
        model.observe(f"t{index}", 10, 10)
    for index in range(HISTORY + 1500):
        model.observe("often", index % 97, index % 89)
    model.check()
    document = model.to_document()
    held = {one["name"]: len(one["requests"]) for one in document["tenants"]}
    assert held == {**{f"t{index}": 1 for index in range(31, 40)}, "often": HISTORY}
    assert len(document["everybody"]) == EVERYBODY


def test_memory_is_bounded_over_all_tenants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_length, "MAX_REQUESTS", 100)
    model = OutputLength()
    for index in range(300):
        model.observe(f"t{index % 3}", 10, 10)
        model.observe(f"once {index}", 10, 10, cut=True)
        model.check()
    held = [(one["name"], len(one["requests"])) for one in model.to_document()["tenants"]]
    assert sum(num for _, num in held) <= 100
    assert held[-1] == ("once 299", 1)
    assert model.predict("once 0", 10) == model.predict("new", 10)


def test_a_request_that_was_cut_is_learned_as_one_of_those_that_were_longer() -> None:
    """Half of the requests are cut, at limits that do not depend on their lengths: quantiles stay where they are."""
    model, left_out, rng = OutputLength(), OutputLength(), random.Random(0)
    for _ in range(1000):
        length, most, prompt = int(200 * rng.lognormvariate(0.0, 0.8)), rng.choice([50, 200, 1000]), rng.randrange(99)
        model.observe("t", prompt, min(length, most), cut=length >= most)
        if length < most:
            left_out.observe("t", prompt, length)
    assert model.own_quantiles("t")[:2] == pytest.approx((72, 200), rel=0.12)
    assert model.own_quantiles("t")[2] == pytest.approx(558, rel=0.25)
    assert left_out.own_quantiles("t")[1] < 160, "those that are left stop early"


def test_where_nobody_was_longer_a_limit_is_a_length() -> None:
    model = OutputLength()
    for _ in range(50):
        model.observe("t", 10, 16, cut=True)
    assert model.predict("t", 10, 16) == (16, 16, 16)
    model.observe("other", 10, 700)
    model.observe("t", 10, 16, cut=True)
    assert model.to_document()["tenants"][-1]["requests"][-1] == [10, 700]


def test_beyond_a_limit_no_predictor_is_blamed() -> None:
    model, same = OutputLength(), OutputLength()
    for one in (model, same):
        for index in range(40):
            one.observe("t", index, 100 + index)
    before = model.to_document()
    model.observe("t", 20, 50, cut=True)
    same.observe("t", 20, 50)
    assert model.to_document()["common"] == before["common"], "all of them had said more than 50"
    assert same.to_document()["common"] != before["common"]


def test_the_tenants_own_quantiles_are_everybodys_while_it_has_none() -> None:
    model = OutputLength()
    assert model.own_quantiles("a") == output_length.FIRST_GUESS
    for length in range(101):
        model.observe("a", 5, length)
    assert model.own_quantiles("a") == model.own_quantiles("new") == (10, 50, 90)
    assert model.own_quantiles("a", 60) == (10, 50, 60)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=80), st.integers(1, 40))
def test_a_history_answers_as_one_that_sorts_anew(pairs: list[tuple[int, int]], size: int) -> None:
    history = History(size)
    for prompt, length in pairs:
        history.add(prompt, length)
        history.check()
    kept = pairs[-size:]
    assert history.to_pairs() == kept
    assert quantiles_of(history.rising) == pytest.approx(np.quantile([length for _, length in kept], QUANTILES))
    assert history.near(20, len(kept)) == pytest.approx(quantiles_of(sorted(length for _, length in kept)))
    longer = sorted(length for _, length in kept if length > 20)
    assert history.longer(20) in (longer or [None])
    newest = [length for _, length in kept[-NEWEST:]]
    assert history.newest().num == len(newest)
    assert history.newest().mean == pytest.approx(np.mean(newest))
    assert history.newest().quantiles == pytest.approx(np.quantile(newest, QUANTILES))


def test_what_a_history_keeps_of_its_requests_follows_each_new_one() -> None:
    history = History(3)
    for length, median, mean in ((1, 1, 1), (3, 2, 2), (8, 3, 4), (10, 8, 7)):
        history.add(5, length)
        for _ in range(2):
            assert history.quantiles()[1] == history.newest().quantiles[1] == median
            assert history.newest().mean == mean


HISTORIES = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 10**6), st.integers(0, 10**6)), max_size=60)


@given(HISTORIES, st.integers(0, 10**6), st.integers(1, 5000) | st.none())
def test_quantiles_rise_and_stay_within_what_is_allowed(
    history: list[tuple[str, int, int]], prompt: int, max_tokens: int | None
) -> None:
    model = OutputLength()
    for tenant, prompt_tokens, length in history:
        model.observe(tenant, prompt_tokens, length)
    model.check()
    predicted = model.predict("a", prompt, max_tokens)
    assert list(predicted) == sorted(predicted)
    assert predicted[0] >= 1
    assert predicted[-1] <= (max_tokens or 10**6 + 1e-6), "a mean of equal numbers may be rounded up"
    again = OutputLength.from_document(json.loads(json.dumps(model.to_document())))
    assert again.predict("a", prompt, max_tokens) == predicted
    for one in (model, again):
        one.observe("a", prompt, 17)
        one.observe("a", prompt, 17, cut=True)
    assert again.to_document() == model.to_document()


def damaged(**changes: object) -> dict[str, object]:
    model = OutputLength()
    model.observe("a", 3, 4)
    tenant, common = dict(model.to_document()["tenants"][0]), model.to_document()["common"]
    fields = {key: value for key, value in changes.items() if key in tenant}
    return {**model.to_document(), "tenants": [tenant | fields], "common": changes.get("common", common)}


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"schema": output_length.SCHEMA - 1},
        {"schema": output_length.SCHEMA},
        {"schema": output_length.SCHEMA, "tenants": 3},
        damaged(requests=[[1]]),
        damaged(requests=[[1, -1]]),
        damaged(requests=[[1, float("nan")]]),
        damaged(weights=[]),
        damaged(weights=[[float("nan")] * len(PREDICTORS)] * 3),
        damaged(weights=[[2.0] * len(PREDICTORS)] * 3),
        damaged(common=[[1.0] * len(PREDICTORS)] * 3),
    ],
)
def test_a_document_that_is_none_is_refused(document: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="begin anew"):
        OutputLength.from_document(document)


@pytest.mark.parametrize("value", [-1, 1.5, True, None, "3", float("nan"), 10**400])
def test_numbers_that_are_none_are_refused(value: object) -> None:
    model = OutputLength()
    with pytest.raises(ValueError, match="prompt_tokens must be a whole number"):
        model.predict("t", value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="output_tokens must be a whole number"):
        model.observe("t", 1, value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_tokens must be a whole number"):
        model.predict("t", 1, 0)


@needs_data
@pytest.mark.parametrize(
    ("source", "most"),
    [
        ("vtc:vtc_arena", 0.92),
        ("servegen:servegen/sampled_deepseek-r1_1h_4rps.csv", 1.01),
        ("servegen:servegen/sampled_m-large_1h_8rps.csv", 1.01),
        ("azure:azure_llm_2023", 0.45),
        ("mooncake:mooncake", 1.01),
    ],
)
def test_public_traces_are_predicted_as_well_as_is_asked(data: Path, source: str, most: float) -> None:
    """Half of the honest oracle's gain; that in hindsight is chance on the ServeGen traces, as their shuffling shows."""
    name, _, path = source.partition(":")
    report = evaluate_lengths(load_trace(f"{name}:{data / path}"))
    assert report["loss_ratio"] < most
    assert report["held_out_loss_ratio"] < min(1.01, 1.0 - 0.5 * report["oracle_gain"])
    if name == "servegen":
        assert report["oracle_gain"] < 0.0
        assert report["oracle_gain_in_hindsight"] < report["oracle_gain_by_chance"] + LEAST_GAIN

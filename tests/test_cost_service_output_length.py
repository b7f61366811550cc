"""Goal: output lengths are predicted as well as the past allows, and never much worse than the tenant's own quantiles.

Method: made-up tenants with known habits; hypothesis for histories of anything; the public traces where they are at hand.
"""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_service import output_length
from cost_service.evaluate_lengths import evaluate_lengths, oracle_loss
from cost_service.output_length import HISTORY, OutputLength
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
    assert report["oracle_gain"] < 0.01
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
    made = requests(2000, by_prompt=False)
    assert oracle_loss(made, folds=1) < oracle_loss(made, folds=5)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_length, "MAX_TENANTS", 10)
    model = OutputLength()
    for index in range(40):
        model.observe(f"t{index}", 10, 10)
    for _ in range(HISTORY + 50):
        model.observe("often", 10, 10)
    model.check()
    document = model.to_document()
    assert len(document["tenants"]) == 10
    assert len(document["tenants"]["often"]["lengths"]) == HISTORY
    assert "t39" in document["tenants"]
    assert "t5" not in document["tenants"]


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
    assert predicted[-1] <= (max_tokens or 10**6)
    again = OutputLength.from_document(json.loads(json.dumps(model.to_document())))
    assert again.predict("a", prompt, max_tokens) == predicted


ODD = {"a": {"prompts": [1], "lengths": [], "weights": []}}


@pytest.mark.parametrize(
    "document", [{}, {"schema": 2}, {"schema": 1}, {"schema": 1, "tenants": []}, {"schema": 1, "tenants": ODD}]
)
def test_a_document_that_is_none_is_refused(document: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="begin anew"):
        OutputLength.from_document(document)


@pytest.mark.parametrize("value", [-1, 1.5, True, None, "3", float("nan")])
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
    "source", ["vtc:vtc_arena/real_trace.csv", "servegen:servegen/sampled_deepseek-r1_1h_4rps.csv"]
)
def test_public_traces_are_predicted_as_well_as_is_asked(data: Path, source: str) -> None:
    name, _, path = source.partition(":")
    report = evaluate_lengths(load_trace(f"{name}:{data / path}")[:6000])
    assert report["loss_ratio"] < 1.01
    assert report["share_of_honest_gain"] is None or report["share_of_honest_gain"] > 0.5

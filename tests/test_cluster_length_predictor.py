"""Goal: an ingress predicts what its tenants' requests will generate, learns from each that tells it, and shares it once.

Method: requests as the checks let them pass, with made-up endings; the real cost service between several ingresses.
"""

import random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.answers import Ending
from cluster.length_predictor import Expectation, LengthPredictor
from cost_service.length_messages import MAX_FINISHED, LengthNews
from cost_service.length_service import LengthService
from cost_service.output_length import FIRST_GUESS, OutputLength
from replicas.request_stamp import OUTPUT_TOKENS, make_stamp

CONTEXT = 2048


def chat(text: str = "Hello", **fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], **fields}


def completion(prompt: Any = "Hello", **fields: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": prompt, "max_tokens": 1000, **fields}


def predictor(source: str = "a") -> LengthPredictor:
    return LengthPredictor(source=source, max_model_len=CONTEXT)


def serve(one: LengthPredictor, checked: dict[str, Any], length: int, reason: str = "stop", tenant: str = "t") -> None:
    one.finish(one.expect(tenant, checked), Ending(reasons=[reason], output_tokens=length))


def exchange(one: LengthPredictor, service: LengthService) -> LengthNews:
    news = msgspec.json.decode(service.exchange(msgspec.json.encode(one.report())), type=LengthNews)
    one.hear(news, OutputLength.from_document(news.model) if news.model is not None else None)
    for request in news.finished:
        one.learn_other(request)
    return news


def median(one: LengthPredictor, checked: dict[str, Any], tenant: str = "t") -> float:
    return one.expect(tenant, checked).quantiles[1]


def test_what_has_been_generated_is_predicted_and_stamped() -> None:
    one = predictor()
    assert one.expect("t", chat()).quantiles == pytest.approx(FIRST_GUESS)
    for _ in range(60):
        serve(one, chat(), 40)
    assert one.expect("t", chat()).output_tokens() == {"median_tokens": 40, "upper_tokens": 40}


def test_chats_and_completions_and_models_are_told_apart() -> None:
    one = predictor()
    for _ in range(60):
        serve(one, chat(), 900)
        serve(one, completion(), 20)
    assert median(one, completion()) < 100 < 500 < median(one, chat())
    assert one.expect("t", chat()).kind != one.expect("t", chat() | {"model": "other"}).kind


@pytest.mark.parametrize(
    ("checked", "most"),
    [(chat(max_tokens=30), 30), (chat(max_completion_tokens=20, max_tokens=30), 20), (chat(), CONTEXT),
     ({"model": "m", "prompt": "x"}, 16), (completion(max_tokens=8), 8)],
)  # fmt: skip
def test_no_more_is_predicted_than_the_request_may_generate(checked: dict[str, Any], most: int) -> None:
    one = predictor()
    for _ in range(60):
        serve(one, checked | {"max_tokens": CONTEXT}, 5000)
    assert one.expect("t", checked).quantiles[-1] <= most


def test_a_request_that_may_not_end_sooner_is_predicted_to_last_that_long() -> None:
    assert one_stamp(chat(min_tokens=400, max_tokens=500)) == [400, 500]
    assert one_stamp(chat(ignore_eos=True, max_tokens=500)) == [500, 500]


def one_stamp(checked: dict[str, Any]) -> Any:
    return list(predictor().expect("t", checked).output_tokens().values())


def test_longer_prompts_are_told_from_shorter_ones_whatever_they_are_made_of() -> None:
    sizes = [
        predictor().expect("t", checked).prompt_tokens
        for checked in (
            chat("x" * 40), chat("x" * 400), chat([{"type": "text", "text": "x" * 4000}]), completion(list(range(2000))),
            completion("\u20ac" * 4000), completion("x" * 40_000),
        )
    ]  # fmt: skip
    assert sizes == sorted(set(sizes))
    assert predictor().expect("t", completion(["x" * 400] * 3)).prompt_tokens == 100
    assert predictor().expect("t", completion([[1, 2], [1, 2, 3, 4]])).prompt_tokens == 3


def test_lengths_that_follow_the_prompt_are_found_out_without_tokenizing() -> None:
    one, rng = predictor(), random.Random(0)
    for _ in range(600):
        num = rng.randrange(1, 200)
        serve(one, chat("word " * num), 2 * num)
    assert median(one, chat("word " * 20)) < 80 < 250 < median(one, chat("word " * 180))
    assert one.quality.loss < 0.6 * one.quality.own_loss


@pytest.mark.parametrize(
    ("checked", "reasons"),
    [(chat(), ["abort"]), (chat(), []), (chat(), [None]), (chat(n=2), ["stop", "stop"]),
     (chat(ignore_eos=True), ["length"]), (completion(["a", "b"]), ["stop", "stop"])],
)  # fmt: skip
def test_who_does_not_tell_one_length_teaches_nothing(checked: dict[str, Any], reasons: list[Any]) -> None:
    one = predictor()
    before = one.expect("t", chat())
    one.finish(one.expect("t", checked), Ending(reasons=reasons, output_tokens=7))
    assert one.expect("t", chat()) == before
    assert one.report().finished == ()
    assert one.quality.num_requests == 0


def test_a_limit_does_not_teach_that_answers_are_short() -> None:
    one, rng = predictor(), random.Random(0)
    for _ in range(800):
        length, most = int(200 * rng.lognormvariate(0.0, 0.8)), rng.choice([50, 200, 1000])
        checked = chat(max_tokens=most)
        serve(one, checked, min(most, length), "length" if length >= most else "stop")
    assert median(one, chat()) == pytest.approx(200, rel=0.2)
    assert one.quality.num_cut > 300


def test_four_of_five_lengths_lie_within_the_interval() -> None:
    one, rng = predictor(), random.Random(1)
    for _ in range(1500):
        serve(one, chat("x" * rng.randrange(1, 2000)), int(200 * rng.lognormvariate(0.0, 0.6)))
    assert one.quality.coverage == pytest.approx(0.8, abs=0.04)
    assert one.quality.loss_ratio == pytest.approx(1.0, abs=0.03)


def test_what_one_ingress_learned_reaches_the_others_and_the_next_ones() -> None:
    service, (one, other) = LengthService(), (predictor("a"), predictor("b"))
    exchange(one, service), exchange(other, service)
    for _ in range(60):
        serve(one, chat(), 900)
    exchange(one, service)
    assert median(other, chat()) == pytest.approx(FIRST_GUESS[1])
    assert len(exchange(other, service).finished) == 60
    late = predictor("c")
    exchange(late, service)
    for each in (one, other, late):
        assert median(each, chat()) == pytest.approx(900, rel=0.01)
    for each in (one, other, late):
        assert exchange(each, service).finished == ()


def test_a_report_whose_answer_was_lost_is_learned_once() -> None:
    service, one = LengthService(), predictor()
    exchange(one, service)
    serve(one, chat(), 900)
    service.exchange(msgspec.json.encode(one.report()))  # the answer does not come
    serve(one, chat(), 800)
    exchange(one, service)
    assert service.status()["learned"] == 1
    exchange(one, service)
    assert service.status()["learned"] == 2


def test_what_ended_while_the_model_was_on_its_way_is_not_forgotten() -> None:
    service, one = LengthService(), predictor()
    serve(one, chat(), 100)
    news = msgspec.json.decode(service.exchange(msgspec.json.encode(one.report())), type=LengthNews)
    assert news.model is not None
    serve(one, chat(), 300)
    one.hear(news, OutputLength.from_document(news.model))
    assert median(one, chat()) == pytest.approx(200, rel=0.1)


def test_without_the_cost_service_it_learns_from_its_own_and_remembers_a_bounded_part_for_others() -> None:
    one = predictor()
    one.report()
    for _ in range(MAX_FINISHED + 10):
        serve(one, completion(), 700)
    assert median(one, completion()) == pytest.approx(700, rel=0.01)
    assert one.report().finished == (), "the report that is under way stays as it is"
    one.hear(LengthNews(newest=0), None)
    assert len(one.report().finished) == MAX_FINISHED


PROMPTS = st.text(max_size=40) | st.lists(st.integers(0, 9), min_size=1) | st.lists(st.text(), min_size=1)


@given(PROMPTS.filter(bool), st.integers(1, CONTEXT), st.booleans(), st.lists(st.integers(0, CONTEXT), max_size=20))
def test_any_request_gets_a_stamp_that_the_engine_takes(
    prompt: Any, max_tokens: int, ignore_eos: bool, lengths: list[int]
) -> None:
    one = predictor()
    for length in lengths:
        serve(one, completion(), length)
    expected: Expectation = one.expect("t", completion(prompt, max_tokens=max_tokens, ignore_eos=ignore_eos))
    lower, upper = make_stamp(tenant="t", **expected.output_tokens())[OUTPUT_TOKENS]
    assert 1 <= int(lower) <= int(upper) <= max_tokens

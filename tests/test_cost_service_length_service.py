"""Goal: what ingresses tell of output lengths is learned once, told to the others, bounded, and there after a restart.

Method: made-up reports; a store in memory, and the real one.
"""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cluster.state import SqliteStore
from cost_service import length_service
from cost_service.length_messages import MAX_FINISHED, FinishedRequest, LengthNews, LengthReport
from cost_service.length_service import COLLECTION, LOG, MAX_NEWS, NAME, LengthQuality, LengthService
from cost_service.output_length import OutputLength
from tests.stores import kept


def finished(length: int = 50, *, tenant: str = "t", **changes: Any) -> FinishedRequest:
    fields: dict[str, Any] = {
        "kind": "m/chat", "prompt_tokens": 10, "cut": False, "within": True, "loss": 1.0, "own_loss": 2.0,
    }  # fmt: skip
    return FinishedRequest(tenant=tenant, output_tokens=length, **fields | changes)


def report(number: int, *requests: FinishedRequest, source: str = "a", heard: int | None = 0) -> bytes:
    return msgspec.json.encode(LengthReport(source=source, number=number, heard=heard, finished=requests))


def stored(*requests: FinishedRequest) -> dict[str, Any]:
    """The document of a service that has learned these, or one."""
    service = LengthService()
    service.exchange(report(1, *(requests or [finished()])))
    ((_, _, document),) = service.unsaved()
    told: dict[str, Any] = json.loads(json.dumps(document))
    return told


def news(answer: bytes) -> LengthNews:
    return msgspec.json.decode(answer, type=LengthNews)


def test_an_ingress_hears_of_others_requests_and_never_of_its_own() -> None:
    service = LengthService()
    assert news(service.exchange(report(1, finished(1), finished(2)))).finished == ()
    told = news(service.exchange(report(1, finished(3), source="b")))
    assert [request.output_tokens for request in told.finished] == [1, 2]
    assert told.newest == 3
    again = news(service.exchange(report(2, source="b", heard=told.newest)))
    assert (again.finished, again.newest) == ((), 3)
    assert [one.output_tokens for one in news(service.exchange(report(2, heard=2))).finished] == [3]


def test_a_repeated_or_belated_report_is_learned_once() -> None:
    service = LengthService()
    for number in (1, 1, 2, 1, 2):
        service.exchange(report(number, finished(number)))
    assert service.status()["learned"] == 2


def test_a_new_ingress_gets_the_whole_model() -> None:
    service = LengthService()
    service.exchange(report(1, *[finished(70)] * 50))
    told = news(service.exchange(report(1, source="b", heard=None)))
    assert told.model is not None
    model = OutputLength.from_document(told.model)
    assert model.predict("t", 10, kind="m/chat")[1] == pytest.approx(70)
    assert told.finished == ()


def test_who_was_away_for_long_hears_of_the_newest() -> None:
    service = LengthService()
    for number in range(4):
        service.exchange(report(number, *[finished(1000 * number + index) for index in range(LOG // 2)]))
    service.check()
    told = news(service.exchange(report(1, source="b", heard=1)))
    assert [one.output_tokens for one in told.finished] == list(range(3000 + LOG // 2 - MAX_NEWS, 3000 + LOG // 2))
    assert told.newest == 4 * (LOG // 2)


def test_what_was_learned_is_there_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    service, again = LengthService(), LengthService()
    keeper = kept(service, SqliteStore(path))
    service.exchange(report(1, *[finished(70)] * 50))
    keeper.keep(1.0)
    assert list(service.unsaved()) == [], "nothing new"
    kept(again, SqliteStore(path))
    again.check()
    assert again.status()["learned"] == 50
    again.exchange(report(1, *[finished(70)] * 50))
    assert again.status()["learned"] == 50, "the report from before the kill was learned"
    first, second = (news(one.exchange(report(1, source="new", heard=None))).model for one in (service, again))
    assert first == second


def test_an_ingress_that_remembers_more_than_the_store_hears_of_all_that_is_new() -> None:
    service = LengthService()
    service.exchange(report(1, finished(5)))
    told = news(service.exchange(report(7, source="b", heard=900)))
    assert ([one.output_tokens for one in told.finished], told.newest) == ([5], 1)


@pytest.mark.parametrize(
    "change",
    [
        3,
        {"schema": 0},
        {"newest": "x"},
        {"newest": -1},
        {"more": 1},
        {"numbers": [["a"]]},
        {"model": {}},
        {"model": 5},
        {"model": {"schema": 2, "tenants": 3}},
    ],
)
def test_a_damaged_record_is_said_and_learned_anew(change: Any, caplog: pytest.LogCaptureFixture) -> None:
    damaged = change if not isinstance(change, dict) else stored() | change
    service = LengthService()
    service.restore({COLLECTION: {NAME: damaged}})
    assert caplog.text.count("are left out, and learned anew") == 1
    assert service.status()["learned"] == 0
    service.exchange(report(2, finished()))
    assert service.status()["learned"] == 1
    assert len(list(service.unsaved())) == 1


@pytest.mark.parametrize("field", ["schema", "newest", "numbers", "model"])
def test_a_record_without_a_field_is_said_and_learned_anew(field: str, caplog: pytest.LogCaptureFixture) -> None:
    document, service = stored(), LengthService()
    del document[field]
    service.restore({COLLECTION: {NAME: document}})
    assert service.status()["learned"] == 0
    assert field in caplog.text


def test_what_is_read_late_does_not_undo_what_was_learned_meanwhile() -> None:
    service, twin = LengthService(), LengthService()
    document = stored(*[finished(70)] * 50)
    service.exchange(report(1, *[finished(9)] * 30, source="late"))
    service.restore({COLLECTION: {NAME: document}})
    service.check()
    twin.restore({COLLECTION: {NAME: document}})
    twin.exchange(report(1, *[finished(9)] * 30, source="late"))
    assert service.status()["learned"] == 80
    first, second = (list(one.unsaved()) for one in (service, twin))
    assert first == second
    service.exchange(report(1, *[finished(9)] * 30, source="late"))
    assert service.status()["learned"] == 80, "a repeated report"


def changed(**fields: Any) -> bytes:
    document = json.loads(report(1, finished()))
    return json.dumps(document | fields).encode()


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"[" * 100_000, changed(finished=[[1]]), changed(finished=[["t", "k", -1, 1, False, True, 1.0, 1.0]]),
     changed(finished=[["t", "k", 1, 10**10, False, True, 1.0, 1.0]]), changed(number=-1), changed(more=1),
     changed(finished=[["t", "k", 1, 1, False, True, 1.0, None]]),
     changed(finished=[["t", "k", 1, 1, False, True, 1.0, 1.0]] * (MAX_FINISHED + 1))],
)  # fmt: skip
def test_a_report_that_is_none_is_refused_and_changes_nothing(data: bytes) -> None:
    service = LengthService()
    with pytest.raises(ValueError):  # noqa: PT011  # msgspec's own sentences
        service.exchange(data)
    assert service.status()["learned"] == 0


def test_ingresses_that_come_and_go_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(length_service, "MAX_SOURCES", 5)
    service = LengthService()
    for number in range(40):
        service.exchange(report(1, finished(), source=f"ingress {number}"))
        service.exchange(report(number, source="always there"))
    service.check()
    assert service.status()["learned"] == 40
    service.exchange(report(39, finished(), source="always there"))
    assert service.status()["learned"] == 40


def test_quality_is_of_the_newest_requests() -> None:
    quality = LengthQuality()
    assert quality.loss_ratio is None
    for _ in range(3):
        quality.add(finished(within=False, loss=4.0))
    quality.add(finished(cut=True))
    assert (quality.coverage, quality.loss, quality.loss_ratio) == pytest.approx((0.25, 3.25, 1.625))
    for _ in range(8 * length_service.WINDOW):
        quality.add(finished())
    assert (quality.coverage, quality.loss_ratio) == pytest.approx((1.0, 0.5), abs=1e-3)
    assert (quality.num_requests, quality.num_cut) == (4 + 8 * length_service.WINDOW, 1)


def test_status_says_nothing_of_quality_before_there_was_a_request() -> None:
    service = LengthService()
    assert service.status() == {"learned": 0, "judged": 0, "cut": 0}
    service.exchange(report(1, finished()))
    assert service.status() == {
        "learned": 1, "judged": 1, "cut": 0, "coverage": 1.0, "loss_tokens": 1.0, "loss_ratio": 0.5
    }  # fmt: skip

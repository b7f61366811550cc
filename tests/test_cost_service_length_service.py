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


class MemoryStore:
    def __init__(self, document: Any = None) -> None:
        self.documents: dict[str, Any] = {} if document is None else {NAME: document}
        self.num_saved = 0

    def load(self, collection: str) -> dict[str, Any]:
        assert collection == COLLECTION
        return dict(self.documents)

    def save(self, collection: str, name: str, document: Any) -> None:
        assert collection == COLLECTION
        self.documents[name] = json.loads(json.dumps(document))
        self.num_saved += 1


def finished(length: int = 50, *, tenant: str = "t", **changes: Any) -> FinishedRequest:
    fields: dict[str, Any] = {
        "kind": "m/chat", "prompt_tokens": 10, "cut": False, "within": True, "loss": 1.0, "own_loss": 2.0,
    }  # fmt: skip
    return FinishedRequest(tenant=tenant, output_tokens=length, **fields | changes)


def report(number: int, *requests: FinishedRequest, source: str = "a", heard: int | None = 0) -> bytes:
    return msgspec.json.encode(LengthReport(source=source, number=number, heard=heard, finished=requests))


def news(answer: bytes) -> LengthNews:
    return msgspec.json.decode(answer, type=LengthNews)


def test_an_ingress_hears_of_others_requests_and_never_of_its_own() -> None:
    service = LengthService(MemoryStore())
    assert news(service.exchange(report(1, finished(1), finished(2)))).finished == ()
    told = news(service.exchange(report(1, finished(3), source="b")))
    assert [request.output_tokens for request in told.finished] == [1, 2]
    assert told.newest == 3
    again = news(service.exchange(report(2, source="b", heard=told.newest)))
    assert (again.finished, again.newest) == ((), 3)
    assert [one.output_tokens for one in news(service.exchange(report(2, heard=2))).finished] == [3]


def test_a_repeated_or_belated_report_is_learned_once() -> None:
    service = LengthService(MemoryStore())
    for number in (1, 1, 2, 1, 2):
        service.exchange(report(number, finished(number)))
    assert service.status()["learned"] == 2


def test_a_new_ingress_gets_the_whole_model() -> None:
    service = LengthService(MemoryStore())
    service.exchange(report(1, *[finished(70)] * 50))
    told = news(service.exchange(report(1, source="b", heard=None)))
    assert told.model is not None
    model = OutputLength.from_document(told.model)
    assert model.predict("t", 10, kind="m/chat")[1] == pytest.approx(70)
    assert told.finished == ()


def test_who_was_away_for_long_hears_of_the_newest() -> None:
    service = LengthService(MemoryStore())
    for number in range(4):
        service.exchange(report(number, *[finished(1000 * number + index) for index in range(LOG // 2)]))
    service.check()
    told = news(service.exchange(report(1, source="b", heard=1)))
    assert [one.output_tokens for one in told.finished] == list(range(3000 + LOG // 2 - MAX_NEWS, 3000 + LOG // 2))
    assert told.newest == 4 * (LOG // 2)


def test_what_was_learned_is_there_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    service = LengthService(SqliteStore(path))
    service.exchange(report(1, *[finished(70)] * 50))
    assert service.save()
    assert not service.save(), "nothing new"
    again = LengthService(SqliteStore(path))
    again.check()
    assert again.status()["learned"] == 50
    again.exchange(report(1, *[finished(70)] * 50))
    assert again.status()["learned"] == 50, "the report from before the kill was learned"
    first, second = (news(one.exchange(report(1, source="new", heard=None))).model for one in (service, again))
    assert first == second


def test_an_ingress_that_remembers_more_than_the_store_hears_of_all_that_is_new() -> None:
    service = LengthService(MemoryStore())
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
    store = MemoryStore()
    before = LengthService(store)
    before.exchange(report(1, finished()))
    before.save()
    damaged = change if not isinstance(change, dict) else store.documents[NAME] | change
    service = LengthService(MemoryStore(damaged))
    assert caplog.text.count("are left out, and learned anew") == 1
    assert service.status()["learned"] == 0
    service.exchange(report(2, finished()))
    assert service.status()["learned"] == 1
    assert service.save()


@pytest.mark.parametrize("field", ["schema", "newest", "numbers", "model"])
def test_a_record_without_a_field_is_said_and_learned_anew(field: str, caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore()
    LengthService(store).save()
    service = LengthService(store)
    service.exchange(report(1, finished()))
    service.save()
    del store.documents[NAME][field]
    assert LengthService(store).status()["learned"] == 0
    assert field in caplog.text


def test_a_store_that_cannot_be_written_costs_nothing_but_the_restart(caplog: pytest.LogCaptureFixture) -> None:
    class FullStore(MemoryStore):
        def save(self, collection: str, name: str, document: Any) -> None:
            raise OSError("no space")

    service = LengthService(FullStore())
    service.exchange(report(1, finished()))
    assert not service.save()
    assert "are not stored: no space" in caplog.text
    assert service.status()["learned"] == 1


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
    service = LengthService(MemoryStore())
    with pytest.raises(ValueError):  # noqa: PT011  # msgspec's own sentences
        service.exchange(data)
    assert service.status()["learned"] == 0


def test_ingresses_that_come_and_go_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(length_service, "MAX_SOURCES", 5)
    service = LengthService(MemoryStore())
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
    service = LengthService(MemoryStore())
    assert service.status() == {"learned": 0, "judged": 0, "cut": 0}
    service.exchange(report(1, finished()))
    assert service.status() == {
        "learned": 1, "judged": 1, "cut": 0, "coverage": 1.0, "loss_tokens": 1.0, "loss_ratio": 0.5
    }  # fmt: skip

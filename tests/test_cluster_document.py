"""Goal: a record that is not exactly what was written is never taken for a document, whatever it is.

Method: random documents there and back; every kind of damage to a record, pickles among them.
"""

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import document
from cluster.document import DamageLog, from_record, to_record, to_text

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@given(JSON)
def test_a_document_comes_back_from_its_record_which_is_json(value: object) -> None:
    record = to_record(value)
    assert json.loads(from_record(record)) == value
    read = json.loads(record)
    assert read.keys() == {"schema", "sha256", "document"}
    assert read["document"] == value


@given(JSON, st.data())
def test_a_record_of_which_anything_is_changed_is_none(value: object, data: st.DataObject) -> None:
    record = bytearray(to_record(value))
    place = data.draw(st.integers(0, len(record) - 1))
    record[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ValueError, match=r"no record of ours|schema|checksum"):
        from_record(bytes(record))


@given(st.binary(max_size=300))
def test_junk_is_no_record(junk: bytes) -> None:
    with pytest.raises(ValueError, match="no record of ours"):
        from_record(junk)


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (pickle.dumps({"a": 1}), "no record of ours"),
        (b'{"schema":2,' + to_record(1).split(b",", 1)[1], "it has schema 2, and this version reads 1"),
        (to_record(1)[:-2], "no record of ours"),
        (to_record(1) + b" ", "no record of ours"),
        (to_record([1]).replace(b"[1]", b"[2]"), "its checksum is wrong"),
        (to_record([1]).replace(b"[1]", b"[1] "), "its checksum is wrong"),
        (b"[" * 100_000, "no record of ours"),
        (b"", "no record of ours"),
    ],
)
def test_what_is_wrong_is_said(record: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        from_record(record)


def test_what_is_no_json_or_too_large_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_text(float("nan"))
    monkeypatch.setattr(document, "MAX_DOCUMENT_BYTES", 10)
    assert to_text("a" * 8)
    with pytest.raises(OSError, match="too large"):
        to_text("a" * 9)


def test_damage_is_said_once_until_the_record_is_whole_again(caplog: pytest.LogCaptureFixture) -> None:
    log = DamageLog("a store")
    for _ in range(3):
        log.damaged("tenants/a\nb", "it is none")
    assert caplog.messages == [r"'tenants/a\nb' in a store is damaged and left out: it is none."]
    log.whole("tenants/a\nb")
    log.damaged("tenants/a\nb", "it is none")
    assert len(caplog.messages) == 2

"""Goal: what one end encodes the other end reads back, and anything else is a `ValueError`, however malformed.

Method: round trips over generated values; junk bytes, junk JSON and near misses of both schemas.
"""

import json
from typing import Any, get_type_hints

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_service.charges import Account, Served
from cost_service.samples import CopySample, LinkSample, PrefillSample
from cost_service.service_messages import AccountReport, AutoscalingStats, Known, Share
from replicas.config import PreemptionPolicy
from replicas.fair_queue import Admission
from replicas.messages import (
    MAX_MESSAGE_BYTES,
    CostSamples,
    EngineTotals,
    ServiceReport,
    SetCosts,
    SetPolicy,
    SetShares,
    decode_to_engine,
    decode_to_server,
    encode,
)

COUNT = st.integers(0, 2**63 - 1)
SECONDS = st.floats(allow_nan=False, allow_infinity=False)
BACKLOG = dict[str, int]
VALUES = {
    str: st.text(max_size=40),
    float: SECONDS,
    bool: st.booleans(),
    int: COUNT,
    BACKLOG: st.dictionaries(st.text(max_size=6), COUNT, max_size=4),
}
TOTALS = st.builds(
    EngineTotals,
    **{name: VALUES[kind] for name, kind in get_type_hints(EngineTotals).items()},
)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=10,
)
TOTALS_FIELDS: dict[str, Any] = {
    name: {str: "x", float: 1.5, bool: True, int: 1, BACKLOG: {"a": 3}}[kind]
    for name, kind in get_type_hints(EngineTotals).items()
}


@given(TOTALS)
def test_totals_come_back_as_they_were_sent(totals: EngineTotals) -> None:
    assert decode_to_server(encode(totals)) == totals


def test_routers_are_told_of_room_and_of_who_waits() -> None:
    fields = TOTALS_FIELDS | {"num_kv_blocks": 100, "num_free_kv_blocks": 7, "num_waiting_tokens": 3, "sequence": 5}
    load = EngineTotals(**fields).load(0.25)
    assert (load.num_blocks, load.num_free_blocks, load.block_size, load.num_waiting_tokens) == (100, 7, 1, 3)
    assert (load.backlog, load.sequence, load.age_s) == ({"a": 3}, 5, 0.25)


def test_the_autoscaler_is_told_of_room_seats_waiting_work_and_preemptions() -> None:
    fields = TOTALS_FIELDS | {
        "num_kv_blocks": 100,
        "num_free_kv_blocks": 7,
        "queued_s": 2.5,
        "swaps": 3,
        "recomputes": 4,
    }
    stats = EngineTotals(**fields).autoscaling(0.25)
    assert (stats.num_blocks, stats.num_free_blocks, stats.max_num_seqs) == (100, 7, 1)
    assert (stats.queued_s, stats.preemptions, stats.age_s) == (2.5, 7, 0.25)
    assert AutoscalingStats.from_numbers(stats.to_numbers()) == stats


@pytest.mark.parametrize("policy", PreemptionPolicy)
def test_every_policy_of_the_settings_can_be_sent(policy: PreemptionPolicy) -> None:
    message = SetPolicy(preemption=policy.value)
    assert decode_to_engine(encode(message)) == message


@pytest.mark.parametrize("admission", Admission)
def test_a_policy_may_be_of_admission_alone(admission: Admission) -> None:
    message = SetPolicy(admission=admission)
    assert decode_to_engine(encode(message)) == message
    assert json.loads(encode(message)) == {"type": "set_policy", "admission": admission.value}


def test_service_and_shares_come_back_as_they_were_sent() -> None:
    line = AccountReport(served=Served(5, 1, 7, 9), num_waiting=1, num_running=2, reserved=3.5)
    report = ServiceReport(epoch="e", sequence=4, accounts=[(Account("a", "u"), line)], known={"a": 1.5})
    assert decode_to_server(encode(report)) == report
    known = Known(counter=2.0, included=1.0)
    shares = SetShares(shares=[Share(tenant="a", known=known, weight=2.0, waits=True, users={"u": known})], answered=4)
    assert decode_to_engine(encode(shares)) == shares


def test_samples_come_back_as_they_were_sent_and_costs_too() -> None:
    samples = CostSamples(
        costs="{}",
        samples=[
            PrefillSample(num_tokens=3, attention=9.0, num_decodes=2, seconds=-1e-4),
            CopySample(direction="out", num_blocks=4, seconds=0.5),
            LinkSample(direction="in", num_blocks=4, shared=0.5, seconds=0.25),
        ],
    )
    assert decode_to_server(encode(samples)) == samples
    assert decode_to_engine(encode(SetCosts(snapshot="{}"))) == SetCosts(snapshot="{}")


def test_messages_are_json_with_a_type_so_that_they_can_be_read_in_a_log() -> None:
    assert json.loads(encode(SetPolicy(preemption="swap"))) == {"type": "set_policy", "preemption": "swap"}
    assert json.loads(encode(EngineTotals(**TOTALS_FIELDS)))["type"] == "totals"


def test_a_message_too_large_to_send_is_a_bug_of_the_sender() -> None:
    with pytest.raises(AssertionError, match="EngineTotals of"):
        encode(EngineTotals(**TOTALS_FIELDS | {"epoch": "x" * MAX_MESSAGE_BYTES}))


def test_a_message_too_large_to_receive_is_refused_before_it_is_parsed() -> None:
    padded = encode(SetPolicy(preemption="swap")) + b" " * MAX_MESSAGE_BYTES
    with pytest.raises(ValueError, match="too large"):
        decode_to_engine(padded)
    with pytest.raises(ValueError, match="too large"):
        decode_to_server(encode(EngineTotals(**TOTALS_FIELDS)) + b" " * MAX_MESSAGE_BYTES)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00\xff\xfe",
        b"{",
        b"null",
        b"[]",
        b'"swap"',
        b"{}",
        b'{"type":"set_policy","admission":"lifo"}',
        b'{"type":"set_shares","shares":[{"tenant":"a"}],"answered":1}',
        b'{"type":"set_policy","preemption":"stock"}',
        b'{"type":"set_policy","preemption":"swap","extra":1}',
        b'{"type":"other","preemption":"swap"}',
        b'{"preemption":"swap"} trailing',
        b"[" * 100_000,
        b'{"type":"set_policy","preemption":' + b"[" * 100_000,
        b'{"unknown":' + b'{"a":' * 100_000,
    ],
    ids=lambda data: repr(data[:36]),
)
def test_what_is_no_message_to_an_engine_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        decode_to_engine(data)


def test_an_engine_does_not_accept_totals_nor_a_server_a_policy() -> None:
    with pytest.raises(ValueError, match="totals"):
        decode_to_engine(encode(EngineTotals(**TOTALS_FIELDS)))
    with pytest.raises(ValueError, match="set_policy"):
        decode_to_server(encode(SetPolicy(preemption="swap")))


@pytest.mark.parametrize("field", EngineTotals.__struct_fields__)
def test_totals_without_one_of_their_fields_or_with_one_of_a_wrong_type_are_refused(field: str) -> None:
    missing = {"type": "totals"} | {name: value for name, value in TOTALS_FIELDS.items() if name != field}
    with pytest.raises(ValueError, match=field):
        decode_to_server(json.dumps(missing).encode())
    with pytest.raises(ValueError, match=field):
        decode_to_server(json.dumps({"type": "totals"} | TOTALS_FIELDS | {field: [1]}).encode())


@given(st.binary(max_size=200) | JSON_VALUES.map(msgspec.json.encode))
def test_junk_is_a_value_error_and_nothing_else(data: bytes) -> None:
    for decode in (decode_to_engine, decode_to_server):
        with pytest.raises(ValueError):  # noqa: PT011
            decode(data)

"""Goal: a cost snapshot arrives as it was sent, or not at all.

Method: round trips, and one flaw at a time in text and values.
"""

import json
from typing import Any

import pytest

from cost_service.analytic import analytic_snapshot
from cost_service.hardware import HARDWARE
from cost_service.model_shape import ModelShape
from cost_service.snapshot import CostSnapshot

VALUES: dict[str, Any] = {
    "version": 3,
    "model": "m",
    "hardware": "H100",
    "parallelism": 2,
    "block_size": 16,
    "recompute_fixed_s": 1e-3,
    "ridge_tokens": 148.0,
    "token_s": 2e-5,
    "attention_s": 1e-9,
    "swap_fixed_s": 5e-3,
    "out_block_s": 0.0,
    "in_block_s": 0.0,
    "link_latency_s": 1e-5,
    "link_out_block_s": 4e-5,
    "link_in_block_s": 3e-5,
    "link_shared_ratio": 0.5,
    "recompute_knots_s": (1e-4, -2e-4, 0.0),
    "out_knots_s": (),
    "in_knots_s": (5.0,),
}
LLAMA_8B = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "vocab_size": 128256,
}  # fmt: skip


def test_a_snapshot_comes_back_from_json_as_it_was() -> None:
    snapshot = CostSnapshot(**VALUES)
    assert CostSnapshot.from_json(snapshot.to_json()) == snapshot


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema": 1}', '{"snapshot": []}', "null"])
def test_another_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be the JSON object that the cost service writes"):
        CostSnapshot.from_json(text)


@pytest.mark.parametrize(
    ("knots", "message"),
    [
        (3, "recompute_knots_s of a cost snapshot must be a list of at most 64 numbers"),
        ([0.0] * 65, "a list of at most 64"),
        ([True], "recompute_knots_s of a cost snapshot must hold finite numbers"),
        (["1"], "finite numbers"),
        ([float("nan")], "finite numbers"),
    ],
)
def test_knots_that_are_none_are_refused(knots: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CostSnapshot(**VALUES | {"recompute_knots_s": knots})


def test_a_changed_value_is_noticed_by_the_checksum() -> None:
    text = CostSnapshot(**VALUES).to_json().replace("5e-05", "5e-06").replace("0.005", "0.006")
    with pytest.raises(ValueError, match="checksum"):
        CostSnapshot.from_json(text)


def test_another_schema_is_refused() -> None:
    record = json.loads(CostSnapshot(**VALUES).to_json()) | {"schema": 1}
    with pytest.raises(ValueError, match="must have schema 3"):
        CostSnapshot.from_json(json.dumps(record))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("version", -1), ("version", True), ("version", 1.5), ("parallelism", 0), ("block_size", 0), ("token_s", -1e-9),
        ("token_s", float("nan")), ("link_in_block_s", float("inf")), ("attention_s", "1"), ("swap_fixed_s", None),
        ("ridge_tokens", True), ("model", None),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} of a cost snapshot must be"):
        CostSnapshot(**VALUES | {name: value})


def test_a_snapshot_is_for_one_kind_of_replica() -> None:
    snapshot = CostSnapshot(**VALUES)
    assert snapshot.fits(model="m", hardware="H100", parallelism=2, block_size=16)
    assert not snapshot.fits(model="m", hardware="A100", parallelism=2, block_size=16)
    assert not snapshot.fits(model="m", hardware="H100", parallelism=2, block_size=32)


def test_the_analytic_costs_of_llama_8b_on_h100_are_those_of_the_literature() -> None:
    costs = analytic_snapshot(
        ModelShape.from_config(LLAMA_8B), HARDWARE["H100"], model="llama", parallelism=1, block_size=16,
        block_bytes=16 * 131072,
    )  # fmt: skip
    assert costs.token_s == pytest.approx(25e-6, rel=0.2)  # at half of the peak 30 us, at what profiles reach 20 us
    assert costs.attention_s * 2 * 8192 == pytest.approx(0.53e-9 * 8192 * 2, rel=0.3)  # 0.53 ns per token and token
    assert costs.link_out_block_s / 16 == pytest.approx(2.62e-6, rel=0.01)  # seconds per token on the link, at 50 GB/s
    assert 100 < costs.ridge_tokens < 300

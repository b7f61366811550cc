"""Goal: an engine starts whatever it is told about costs, says in its log what it does not believe, and prices safely.

Method: real vLLM configurations and our scheduler, without a model.
"""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cost_service.snapshot import CostSnapshot
from replicas.vllm_block_copy import CopySpeeds
from replicas.vllm_costs import with_copies
from tests.scheduler_runs import build_scheduler
from tests.test_engine_policies import COSTS

pytestmark = pytest.mark.engine

DAMAGED = COSTS.to_json().replace("0.0001", "0.0002", 1)
SPEEDS = CopySpeeds(fixed_s=1.0, out_block_s=2.0, in_block_s=3.0)


def costs_told(model: Path, **settings: Any) -> CostSnapshot:
    costs: CostSnapshot = build_scheduler(model, num_blocks=24, asynchronous=False, settings=settings).preemptor.costs
    return costs


def test_the_snapshot_that_is_told_is_used_under_the_engines_own_name(tiny_model: Path) -> None:
    costs = costs_told(tiny_model, cost_snapshot=replace(COSTS, model="as it was calibrated").to_json())
    assert costs == replace(COSTS, model=costs_told(tiny_model).model)


@pytest.mark.parametrize(
    ("snapshot", "why"),
    [
        ("{", "must be the JSON object that the cost service writes"),
        (DAMAGED, "it is damaged, fetch it again"),
        (json.dumps({"schema": 0, "snapshot": {}}), "upgrade cost service and replicas together"),
        (replace(COSTS, block_size=16).to_json(), "blocks of 16 tokens and the engine has 32"),
    ],
    ids=["no JSON", "damaged", "another schema", "other blocks"],
)
def test_a_snapshot_that_is_wrong_is_said_and_the_analytic_costs_are_used(
    tiny_model: Path, caplog: pytest.LogCaptureFixture, snapshot: str, why: str
) -> None:
    with caplog.at_level(logging.WARNING, logger="replicas.vllm_costs"):
        costs = costs_told(tiny_model, cost_snapshot=snapshot)
    assert why in caplog.text
    assert costs == costs_told(tiny_model)
    assert (costs.version, costs.block_size) == (0, 32)


def test_the_speed_of_a_throttled_link_is_part_of_the_costs(tiny_model: Path) -> None:
    costs = costs_told(tiny_model, throttled_link_bytes_per_s=1e6, throttled_link_latency_s=0.5)
    assert costs.link_latency_s == 0.5
    assert costs.link_out_block_s == costs.link_in_block_s == pytest.approx(2 * 32 * 2 * 32 * 4 / 1e6)


def test_measured_copies_take_the_place_of_analytic_ones_and_not_of_learned_ones() -> None:
    analytic = with_copies(replace(COSTS, version=0), SPEEDS)
    assert (analytic.swap_fixed_s, analytic.out_block_s, analytic.in_block_s) == (1.0, 2.0, 3.0)
    assert with_copies(COSTS, SPEEDS) == COSTS

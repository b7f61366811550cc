"""Goal: settings of replicas that cannot be are refused with a sentence that names field and mend, others are kept.

Method: as tests/test_cluster_config.py, whose refusals these are.
"""

from typing import Any

import pytest

from cluster.config import AppArgs
from global_scheduler.autoscaling import AutoscalerSettings
from tests.test_cluster_config import MIB, refusal


def test_the_number_of_replicas_is_fixed_unless_bounds_are_given() -> None:
    fixed = AppArgs.from_mapping({"replicas": {"kv_cache_bytes": 64 * MIB, "num_replicas": 3}}).replicas
    assert (fixed.autoscaling, fixed.first_replicas, fixed.most_replicas) == (None, 3, 3)
    bounds = {"min_replicas": 2, "max_replicas": 6, "target_queued_s": 4}
    scaled = AppArgs.from_mapping({"replicas": {"kv_cache_bytes": 64 * MIB, "autoscaling": bounds}}).replicas
    assert scaled.autoscaling is not None
    assert (scaled.first_replicas, scaled.most_replicas) == (2, 6)
    assert scaled.autoscaling.settings() == AutoscalerSettings(min_replicas=2, max_replicas=6, target_queued_s=4.0)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "Setting replicas.autoscaling.max_replicas is missing: add it."),
        ({"max_replicas": 2, "steps": 1}, "Unknown setting replicas.autoscaling.steps: remove it or correct its name."),
        (
            {"min_replicas": 3, "max_replicas": 2},
            "Setting replicas.autoscaling: min_replicas must not be above max_replicas: it is 3, above 2.",
        ),
        (
            {"max_replicas": 2, "target_kv_use": 80},
            "Setting replicas.autoscaling: target_kv_use must be above 0 and at most 1: it is 80.0.",
        ),
    ],
)
def test_aims_that_cannot_be_are_refused_by_name(values: dict[str, Any], said: str) -> None:
    assert refusal(autoscaling=values) == said


def test_a_cpu_replica_needs_the_size_of_its_cache_and_a_gpu_replica_does_not() -> None:
    assert "kv_cache_bytes must be set on CPU" in refusal(kv_cache_bytes=None)
    assert AppArgs.from_mapping({"replicas": {"accelerator": "gpu"}}).replicas.kv_cache_bytes is None


def test_a_cpu_replica_is_not_spread_over_devices() -> None:
    assert "tensor_parallel_size must be 1 on CPU: set it to 1" in refusal(tensor_parallel_size=2)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_replicas", "2"),
        ("num_replicas", 2.0),
        ("num_replicas", True),
        ("num_replicas", 0),
        ("num_replicas", None),
        ("num_cpus", float("nan")),
        ("num_cpus", float("inf")),
        ("num_cpus", 0),
        ("max_model_len", "8k"),
        ("kv_cache_bytes", 512),
        ("kv_cache_bytes", "512MiB"),
        ("accelerator", "tpu"),
        ("gpu_type", 4),
        ("engine_kwargs", ["enforce_eager"]),
    ],
)
def test_a_value_of_a_wrong_type_or_size_is_named(field: str, value: Any) -> None:
    assert f"Setting replicas.{field} must be " in refusal(**{field: value})


@pytest.mark.parametrize(
    "name",
    [
        "model", "served_model_name", "scheduler_cls", "kv_transfer_config", "tensor_parallel_size", "max_model_len",
        "max_num_seqs", "kv_cache_memory_bytes", "distributed_executor_backend", "async_scheduling",
    ],
)  # fmt: skip
def test_engine_arguments_that_the_product_sets_are_refused(name: str) -> None:
    assert f"engine_kwargs.{name} is set by the product: remove it there" in refusal(engine_kwargs={name: 1})


@pytest.mark.parametrize("name", ["enable_chunked_prefill", "max_num_batched_tokens"])
def test_prefills_in_pieces_are_refused_on_cpu_alone(name: str) -> None:
    assert f"engine_kwargs.{name} must be left out on CPU" in refusal(engine_kwargs={name: 1})
    assert AppArgs.from_mapping({"replicas": {"accelerator": "gpu", "engine_kwargs": {name: 1}}})


def test_other_engine_arguments_are_kept_as_they_are() -> None:
    kwargs = {"block_size": 32, "enforce_eager": True}
    args = AppArgs.from_mapping({"replicas": {"kv_cache_bytes": 64 * MIB, "engine_kwargs": kwargs}})
    assert args.replicas.engine_kwargs == kwargs

"""Goal: settings are what they say, and a bad one is a `ValueError` that names the key and the mend.

Method: sentences per key, and junk from hypothesis that must never raise anything else.
"""

import contextlib
import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicas.config import PreemptionPolicy, SwapConfig, parse_policy


def test_without_settings_an_engine_swaps_into_one_gibibyte() -> None:
    assert SwapConfig.from_mapping({}) == SwapConfig(preemption=PreemptionPolicy.SWAP, host_pool_bytes=2**30)


@pytest.mark.parametrize("policy", PreemptionPolicy)
def test_plain_values_become_typed_ones(policy: PreemptionPolicy) -> None:
    config = SwapConfig.from_mapping({"preemption": policy.value, "host_pool_bytes": 4096})
    assert config == SwapConfig(preemption=policy, host_pool_bytes=4096)
    assert isinstance(config.preemption, PreemptionPolicy)


def test_zero_bytes_are_allowed_and_turn_swapping_off() -> None:
    assert SwapConfig.from_mapping({"host_pool_bytes": 0}).host_pool_bytes == 0


def test_an_unknown_key_is_named_beside_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'host_pool'.*host_pool_bytes.*preemption"):
        SwapConfig.from_mapping({"host_pool": 1})


@pytest.mark.parametrize("value", [True, 1.5, "1GiB", None, [1]])
def test_a_size_that_is_no_whole_number_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="host_pool_bytes must be a whole number"):
        SwapConfig.from_mapping({"host_pool_bytes": value})


def test_a_negative_size_is_refused_with_the_mend() -> None:
    with pytest.raises(ValueError, match="0 turns swapping off"):
        SwapConfig.from_mapping({"host_pool_bytes": -1})


@pytest.mark.parametrize("name", ["stock", "SWAP", "", None, 1, ["swap"], {}])
def test_an_unknown_policy_is_answered_with_the_known_ones(name: object) -> None:
    with pytest.raises(ValueError, match=r"preemption must be one of \['recompute', 'swap', 'adaptive'\]"):
        parse_policy(name)
    with pytest.raises(ValueError, match="preemption must be one of"):
        SwapConfig.from_mapping({"preemption": name})


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SwapConfig().host_pool_bytes = 1  # type: ignore[misc]


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(["preemption", "host_pool_bytes"]) | st.text(max_size=5), JUNK, max_size=3))
def test_junk_settings_give_a_config_or_a_value_error_and_nothing_else(mapping: dict[str, Any]) -> None:
    config = SwapConfig()
    with contextlib.suppress(ValueError):
        config = SwapConfig.from_mapping(mapping)
    assert config.host_pool_bytes >= 0
    assert config.preemption in PreemptionPolicy


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_tenant_fraction", 0),
        ("max_tenant_fraction", 1.1),
        ("throttled_link_bytes_per_s", 0),
        ("throttled_link_bytes_per_s", float("inf")),
        ("throttled_link_latency_s", -1),
        ("throttled_link_latency_s", float("nan")),
    ],
)
def test_a_setting_of_pool_or_link_out_of_range_is_named(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{key} must be"):
        SwapConfig.from_mapping({key: value})

"""Goal: what the settings say of numbers, places and ends of replicas is what Serve is told.

Method: the options of the deployment that Ray makes of our configuration; nothing is started.
"""

from typing import Any

import pytest

from cluster.config import AppArgs

pytestmark = pytest.mark.engine  # imports Ray and vLLM

MIB = 1 << 20


def deployment_of(**replicas: Any) -> dict[str, Any]:
    """Serve's options of the replicas' deployment."""
    from cluster.app import make_llm_config

    settings = AppArgs.from_mapping({"replicas": {"kv_cache_bytes": 64 * MIB} | replicas})
    config = make_llm_config(settings, None)
    options: dict[str, Any] = config.deployment_config
    return options


def test_a_fixed_number_is_fixed() -> None:
    options = deployment_of(num_replicas=3)
    assert options["num_replicas"] == 3
    assert "autoscaling_config" not in options


def test_scaled_replicas_have_bounds_our_policy_and_none_of_rays_aims() -> None:
    from ray.llm._internal.serve.core.server.builder import DEFAULT_DEPLOYMENT_OPTIONS
    from ray.serve.config import AutoscalingConfig

    from cluster.ray_internals import maybe_apply_llm_deployment_config_defaults

    options = deployment_of(autoscaling={"min_replicas": 2, "max_replicas": 8, "target_kv_use": 0.7})
    assert "num_replicas" not in options
    merged = maybe_apply_llm_deployment_config_defaults(DEFAULT_DEPLOYMENT_OPTIONS, options)
    config = AutoscalingConfig(**merged["autoscaling_config"])
    assert (config.min_replicas, config.max_replicas, config.initial_replicas) == (2, 8, None)
    assert (config.upscale_delay_s, config.downscale_delay_s) == (0.0, 0.0), "the policy's own delays are all"
    assert config.policy.policy_function == "global_scheduler.serve_autoscaling.KvAutoscaler"
    assert config.policy.policy_kwargs["target_kv_use"] == 0.7
    policy = config.policy.get_policy()
    assert policy(**config.policy.policy_kwargs)._settings.max_replicas == 8, "Serve can make it from what it was sent"


def test_what_replicas_are_scaled_by_reaches_the_controller_and_comes_back_to_status() -> None:
    from ray.serve._private.config import DeploymentConfig, ReplicaConfig
    from ray.serve._private.deployment_info import DeploymentInfo
    from ray.serve.config import AutoscalingConfig
    from ray.serve.schema import _deployment_info_to_schema

    options = deployment_of(autoscaling={"max_replicas": 3, "target_queued_s": 7.0})["autoscaling_config"]
    sent = DeploymentConfig(autoscaling_config=AutoscalingConfig(**options)).to_proto_bytes()
    received = DeploymentConfig.from_proto_bytes(sent)
    assert received.autoscaling_config is not None
    policy = received.autoscaling_config.policy
    assert policy.get_policy()(**policy.policy_kwargs)._settings.target_queued_s == 7.0
    info = DeploymentInfo(
        deployment_config=received,
        replica_config=ReplicaConfig.create(lambda: None),
        start_time_ms=0,
        deployer_job_id="",
    )
    shown = _deployment_info_to_schema("d", info).model_dump(exclude_unset=True)
    assert shown["autoscaling_config"]["policy"]["policy_kwargs"] == options["policy"]["policy_kwargs"]


def test_a_replica_that_goes_has_time_for_what_it_has_and_the_ingress_a_little_more() -> None:
    assert deployment_of()["graceful_shutdown_timeout_s"] == 600.0
    assert deployment_of(drain_timeout_s=30)["graceful_shutdown_timeout_s"] == 30.0
    assert deployment_of(max_surge_percent=50)["max_surge_percent"] == 50


def test_replicas_take_of_their_node_what_the_settings_name() -> None:
    from ray.llm._internal.serve.core.server.llm_server import _merge_replica_actor_and_child_actor_bundles

    assert "resources" not in deployment_of()["ray_actor_options"]
    resources = deployment_of(resources={"replica_slot": 1.0})["ray_actor_options"]["resources"]
    first = _merge_replica_actor_and_child_actor_bundles([{"CPU": 0.4}], {"CPU": 0.4, **resources})[0]
    assert first == {"CPU": 0.8, "replica_slot": 1.0}, "the replica's placement group takes it"

"""Goal: an upgrade of Ray that moves something we rely on fails here, with the name of our file that uses it.

Method: names, signatures and defaults of Ray's Serve LLM layer, read from the installed package; no cluster is started.
"""

import inspect
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.engine


def parameters(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def test_the_pair_is_the_one_that_was_tested() -> None:
    import ray
    import vllm

    pair = (ray.__version__, vllm.__version__.partition("+")[0])
    assert pair == ("2.60.0", "0.29.0"), (
        f"{pair}: run all engine and ray tests, then update this line and pyproject.toml"
    )


def test_every_internal_name_is_there() -> None:
    import cluster.ray_internals
    import replicas.ray_internals

    for module in (cluster.ray_internals, replicas.ray_internals):
        for name in module.__all__:
            assert hasattr(module, name), f"{module.__name__}: {name} moved"


def test_serves_client_tells_details_to_commands() -> None:
    from ray.serve._private.client import ServeControllerClient
    from ray.serve.context import _get_global_client

    assert callable(_get_global_client), "cluster/running.py"
    assert parameters(ServeControllerClient.get_serve_details) == [], "cluster/running.py"


def test_the_builder_takes_an_own_fastapi_app_and_endpoints() -> None:
    from ray.serve.llm import build_llm_deployment
    from ray.serve.llm.ingress import make_fastapi_ingress

    assert parameters(make_fastapi_ingress) == ["cls", "endpoint_map", "app"], "cluster/app.py"
    assert parameters(build_llm_deployment)[0] == "llm_config", "cluster/app.py"


def test_the_ingress_has_what_ours_calls() -> None:
    from ray.serve.llm.ingress import OpenAiIngress

    assert parameters(OpenAiIngress._get_response) == ["body", "call_method", "raw_request"], "cluster/ingress.py"
    assert parameters(OpenAiIngress.__init__)[:2] == ["llm_deployments", "model_cards"], "cluster/app.py"
    assert "self._model_cards" in inspect.getsource(OpenAiIngress.__init__), "cluster/ingress.py"
    assert parameters(OpenAiIngress.models) == [], "cluster/ingress.py"


def test_the_server_has_what_ours_overrides() -> None:
    from ray.serve.llm import LLMServer

    for name in ("start", "check_health", "record_routing_stats"):
        assert inspect.iscoroutinefunction(getattr(LLMServer, name)), f"replicas/serve_server.py: {name}"
        assert parameters(getattr(LLMServer, name)) == [], f"replicas/serve_server.py: {name}"
    assert "_default_engine_cls" in inspect.getsource(LLMServer._get_default_engine_class), "replicas/serve_server.py"


def test_the_engine_prepares_its_configuration_where_ours_changes_it() -> None:
    from replicas.ray_internals import VLLMEngine

    assert parameters(VLLMEngine._prepare_engine_config) == ["callback_ctx"], "replicas/serve_engine.py"
    source = inspect.getsource(VLLMEngine._start_async_llm_engine)
    assert "Executor.get_class(vllm_engine_config)" in source, (
        "replicas/serve_engine.py: the executor is chosen elsewhere"
    )


def test_a_cpu_engine_of_ours_gets_one_process() -> None:
    from vllm.v1.executor.abstract import Executor
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    assert 'distributed_executor_backend == "uni"' in inspect.getsource(Executor.get_class), "replicas/serve_engine.py"
    assert issubclass(UniProcExecutor, Executor)


def test_a_handle_can_answer_over_grpc_and_the_ingress_caches_its_handles() -> None:
    from ray.serve.handle import DeploymentHandle
    from ray.serve.llm.ingress import OpenAiIngress

    assert "_by_reference" in parameters(DeploymentHandle.options), "cluster/ingress.py"
    assert parameters(OpenAiIngress._get_configured_serve_handle) == ["model_id"], "cluster/ingress.py"
    assert "self._configured_serve_handles" in inspect.getsource(OpenAiIngress.__init__), "cluster/ingress.py"
    assert "self._get_configured_serve_handle(" in inspect.getsource(OpenAiIngress._get_response), "cluster/ingress.py"


def test_what_serve_reads_from_the_environment_still_has_these_names() -> None:
    from ray.serve._private import constants

    for name in (
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD",
        "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP",
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE",
        "RAY_SERVE_PROXY_USE_GRPC",
    ):
        assert hasattr(constants, name), f"cluster/app.py, cluster/serve.py: {name}"


def test_a_replica_knows_its_name() -> None:
    from ray.serve._private.common import ReplicaID
    from ray.serve.context import ReplicaContext

    assert "replica_id" in ReplicaContext.__dataclass_fields__, "replicas/serve_server.py"
    assert "unique_id" in ReplicaID.__dataclass_fields__, "replicas/serve_server.py"


def test_a_handle_reaches_all_replicas() -> None:
    from ray.serve.handle import DeploymentHandle

    assert parameters(DeploymentHandle.broadcast)[0] == "method_name", "cluster/status.py"


def test_an_application_is_deployed_without_waiting() -> None:
    from ray import serve

    assert "wait_for_applications_running" in parameters(serve.run_many), "cluster/serve.py"
    assert parameters(serve.RunTarget.__init__)[:3] == ["target", "name", "route_prefix"], "cluster/serve.py"


def test_stream_batching_can_be_turned_off() -> None:
    from ray.serve.llm import LLMServer

    assert "stream_batching_interval_ms" in inspect.getsource(LLMServer._get_batch_interval_ms), "cluster/app.py"


def test_the_head_node_alone_has_the_resource_that_keeps_actors_there() -> None:
    from ray._common.constants import HEAD_NODE_RESOURCE_NAME

    from cost_service.named_actor import HEAD

    assert set(HEAD) == {HEAD_NODE_RESOURCE_NAME}


def test_a_router_of_ours_is_asked_and_told_as_serve_router_expects() -> None:
    from ray.serve.request_router import PendingRequest, RequestRouter

    where = "global_scheduler/serve_router.py"
    assert inspect.iscoroutinefunction(RequestRouter.choose_replicas), where
    assert parameters(RequestRouter.choose_replicas) == ["candidate_replicas", "pending_request"], where
    assert parameters(RequestRouter.update_replicas) == ["replicas"], where
    assert parameters(RequestRouter.on_replica_actor_died) == ["replica_id"], where
    assert parameters(RequestRouter.on_request_completed) == ["replica_id", "internal_request_id"], where
    assert parameters(RequestRouter.initialize_state) == ["kwargs"], where
    assert {"args", "metadata", "future", "routing_context"} <= set(PendingRequest.__dataclass_fields__), where
    assert "internal_request_id" in PendingRequest.__dataclass_fields__["metadata"].type.__dataclass_fields__, where
    assert "should_backoff" in PendingRequest.__dataclass_fields__["routing_context"].type.__dataclass_fields__, where


def test_a_router_may_name_one_replica_first_and_the_others_behind() -> None:
    from ray.serve.request_router import RequestRouter

    where = "global_scheduler/serve_router.py"
    source = inspect.getsource(RequestRouter._choose_replicas_with_backoff)
    assert "for replicas in chosen_replicas:" in source, where
    assert "routing_context.should_backoff" in source, where
    assert "pending_request.future.set_result(replica)" in inspect.getsource(
        RequestRouter._fulfill_next_pending_request
    ), where


def test_routers_see_the_statistics_of_replicas_and_ray_asks_for_them_as_often_as_we_say() -> None:
    from ray.serve.config import RequestRouterConfig
    from ray.serve.request_router import ReplicaID, RunningReplica

    assert isinstance(RunningReplica.routing_stats, property), "global_scheduler/serve_router.py"
    assert isinstance(RunningReplica.replica_id, property), "global_scheduler/serve_router.py"
    assert "unique_id" in ReplicaID.__dataclass_fields__, "global_scheduler/serve_router.py"
    for name in ("request_router_class", "request_routing_stats_period_s", "request_routing_stats_timeout_s"):
        assert name in RequestRouterConfig.model_fields, f"cluster/app.py: {name}"


def test_an_ingress_calls_a_replica_with_the_body_first() -> None:
    from ray.serve.llm.ingress import OpenAiIngress

    source = "".join(inspect.getsource(OpenAiIngress._get_response).split())
    assert "getattr(model_handle,call_method).remote(body,raw_request_info)" in source, (
        "global_scheduler/serve_router.py"
    )


def test_an_autoscaling_policy_is_asked_and_made_as_serve_autoscaling_expects() -> None:
    from ray.serve._private import autoscaling_state
    from ray.serve.autoscaling_policy import _apply_delay_logic
    from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

    where = "global_scheduler/serve_autoscaling.py"
    names = {"running_replicas", "current_num_replicas", "target_num_replicas", "policy_state", "deployment_name"}
    assert names <= set(parameters(AutoscalingContext.__init__)), where
    assert hasattr(AutoscalingContext, "raw_metrics"), where
    assert "raw(**policy.policy_kwargs)" in inspect.getsource(autoscaling_state._resolve_policy_callable), where
    assert {"policy_function", "policy_kwargs"} <= set(AutoscalingPolicy.model_fields), "cluster/app.py"
    needed = {
        "min_replicas", "max_replicas", "upscale_delay_s", "downscale_delay_s", "metrics_interval_s",
        "look_back_period_s", "policy",
    }  # fmt: skip
    assert needed <= set(AutoscalingConfig.model_fields), "cluster/app.py"
    without = AutoscalingConfig(max_replicas=9, upscale_delay_s=0.0, downscale_delay_s=0.0)
    for wanted in (3, 7):
        assert _apply_delay_logic(wanted, 5, without, {})[0] == wanted, f"{where}: Serve waits by itself"


def test_serve_keeps_a_series_of_each_number_that_a_replica_tells_its_autoscaler() -> None:
    from ray.serve._private import replica
    from ray.serve._private.common import TimeStampedValue

    where = "replicas/serve_server.py"
    assert '"record_autoscaling_stats"' in inspect.getsource(replica), where
    assert "isinstance(value, (int, float))" in inspect.getsource(replica), where
    assert {"timestamp", "value"} <= set(TimeStampedValue.__dataclass_fields__), "global_scheduler/serve_autoscaling.py"


def test_the_controller_says_how_many_replicas_are_wanted_and_what_they_are_scaled_by() -> None:
    from ray.serve._private.client import ServeControllerClient
    from ray.serve.schema import DeploymentDetails, DeploymentSchema

    assert parameters(ServeControllerClient.get_serve_details) == [], "cluster/running.py"
    names = {"target_num_replicas", "deployment_config", "replicas"}
    assert names <= set(DeploymentDetails.model_fields), "cluster/running.py"
    assert "autoscaling_config" in DeploymentSchema.model_fields, "cluster/running.py"


def test_old_replicas_drain_and_new_ones_start_before_them_as_we_say() -> None:
    from ray import serve
    from ray.serve._private import replica

    assert {"max_surge_percent", "graceful_shutdown_timeout_s"} <= set(parameters(serve.deployment)), "cluster/app.py"
    source = inspect.getsource(replica)
    assert "await self._drain_ongoing_requests(" in source, "cluster/app.py: who is told to stop no longer finishes"
    assert "if num_ongoing_requests > 0 or" in source, "cluster/app.py: who is told to stop no longer finishes"


def test_resources_of_a_replicas_actor_are_in_the_first_bundle_of_its_placement_group() -> None:
    from ray.llm._internal.serve.core.server import llm_server

    source = inspect.getsource(llm_server.LLMServer.get_deployment_options)
    assert '**ray_actor_options.get("resources", {})' in source, "cluster/app.py: resources are not in the first bundle"


def test_metrics_are_recorded_and_forgotten_as_ours_expect() -> None:
    from ray._private.authentication.authentication_constants import AUTHENTICATION_TOKEN_COOKIE_NAME
    from ray._private.telemetry.open_telemetry_metric_recorder import OpenTelemetryMetricRecorder
    from ray.util.metrics import Counter

    assert parameters(Counter._record) == ["value", "tags"], "cost_service/serve_metrics.py: zeros"
    with pytest.raises(ValueError, match="must be >0"):
        Counter("contract").inc(0)
    assert OpenTelemetryMetricRecorder._resolve_gauge_ttl_seconds(None) >= 2.0, (
        "cost_service/serve_metrics.py: REFRESH_S"
    )
    assert AUTHENTICATION_TOKEN_COOKIE_NAME == "ray-authentication-token", "tests/test_ray_monitoring.py"

"""The Serve application: `import_path: cluster.app:build`, settings under `args` (see `cluster.config.AppArgs`).

Rule: this is the composition root. It turns settings into Ray's own configuration values and adds nothing else.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.llm import LLMConfig, build_llm_deployment
from ray.serve.llm.ingress import make_fastapi_ingress

from cluster import keys, models
from cluster.config import GPU_ENVIRONMENT, INGRESS_NAME, SCHEDULERS, AppArgs
from cluster.http_app import make_app
from cluster.ingress import ENDPOINTS, AdaptiveIngress
from cluster.ray_internals import (
    maybe_apply_llm_deployment_config_defaults,
    to_model_metadata,
)
from cluster.replica_settings import ReplicaArgs
from cluster.request_checks import RequestLimits
from cluster.stores import check_store
from cost_service.service_messages import ROUTING_STATS_PERIOD_S
from replicas.features import refused_feature

HEALTH_CHECK_TIMEOUT_S = 60
"""A replica that compiles or prefills a long prompt on few cores answers late; Ray's 10 s would restart it."""

DRAIN_MARGIN_S = 30.0
"""That an ingress has beyond its replicas, to pass on what they finish last."""

AUTOSCALING_INTERVAL_S, AUTOSCALING_WINDOW_S = 2.0, 30.0
"""Between two reports of a replica to Serve's autoscaler, and how long Serve keeps them."""

SERVE_ENVIRONMENT = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "100",
}
"""Of ingress and replicas. Every token crosses both, by default from thread to thread three times each; all code there is
asynchronous."""

CPU_BATCHED_TOKENS = 4096
"""Tokens of one CPU step at least: several prompts fit one step."""


def build(args: dict[str, Any]) -> Application:
    """Build the application: one LLM deployment and the ingress in front of it.

    Raises:
        ValueError: A setting is unknown or wrong, the model is missing, or it needs a feature that is refused.
    """
    settings = AppArgs.from_mapping(args)
    check_store(settings.state)
    folder = models.require(settings.model.source, settings.state.path)
    hf_config = models.read_config(folder) if folder else {}
    if refusal := refused_feature(settings.replicas.engine_kwargs, hf_config):
        raise ValueError(refusal)
    llm_config = make_llm_config(settings, folder)
    model_id = settings.model.id
    ingress = settings.ingress
    limits = RequestLimits(
        max_body_bytes=ingress.max_body_bytes,
        max_header_bytes=ingress.max_header_bytes,
        max_json_depth=ingress.max_json_depth,
    )
    options = maybe_apply_llm_deployment_config_defaults(
        AdaptiveIngress.get_deployment_options([llm_config]),
        {
            "name": INGRESS_NAME,
            "num_replicas": ingress.num_replicas,
            "max_replicas_per_node": ingress.max_replicas_per_node,
            "max_ongoing_requests": ingress.max_ongoing_requests,
            "max_surge_percent": ingress.max_surge_percent,
            "graceful_shutdown_timeout_s": settings.replicas.drain_timeout_s + DRAIN_MARGIN_S,
            "ray_actor_options": {"num_cpus": ingress.num_cpus, "runtime_env": {"env_vars": SERVE_ENVIRONMENT}},
        },
    )
    ingress_class = make_fastapi_ingress(AdaptiveIngress, endpoint_map=ENDPOINTS, app=make_app(limits))
    return serve.deployment(ingress_class, **options).bind(
        llm_deployments={model_id: build_llm_deployment(llm_config)},
        model_cards={model_id: to_model_metadata(model_id, llm_config)},
        tenant_by_key_hash=keys.load_or_create(settings.state.path).to_mapping(),
        num_ingresses=ingress.num_replicas,
        max_model_len=settings.replicas.max_model_len,
        limits=limits,
        state=settings.state.resolved(),
    )


def make_llm_config(settings: AppArgs, folder: Path | None) -> LLMConfig:
    """Return Ray's configuration of the LLM deployment.

    Args:
        folder: The model's folder on this host; None leaves a hub id to vLLM.
    """
    replicas = settings.replicas
    deployment: dict[str, Any] = {
        **how_many(replicas),
        "max_ongoing_requests": replicas.max_ongoing_requests,
        "max_surge_percent": replicas.max_surge_percent,
        "graceful_shutdown_timeout_s": replicas.drain_timeout_s,
        "health_check_timeout_s": HEALTH_CHECK_TIMEOUT_S,
        "request_router_config": RequestRouterConfig(
            request_router_class="global_scheduler.serve_router.PlacementRouter",
            request_routing_stats_period_s=ROUTING_STATS_PERIOD_S,
            request_routing_stats_timeout_s=HEALTH_CHECK_TIMEOUT_S,
        ),
    }
    values: dict[str, Any] = {
        "model_loading_config": {
            "model_id": settings.model.id,
            "model_source": str(folder) if folder else settings.model.source,
        },
        "engine_kwargs": make_engine_kwargs(settings),
        # 50 ms by default: every token would wait for company.
        "experimental_configs": {"stream_batching_interval_ms": 0},
        "server_cls": "replicas.serve_server.AdaptiveLLMServer",
    }
    env_vars = SERVE_ENVIRONMENT | {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    if replicas.accelerator == "cpu":
        # The replica's actor and its engine each book half: Ray adds the actor's share to the first bundle.
        deployment["ray_actor_options"] = {"num_cpus": replicas.num_cpus / 2}
        values["accelerator_config"] = {"kind": "cpu"}
        values["placement_group_config"] = {"bundles": [{"CPU": replicas.num_cpus / 2}]}
        # Without `nobind` every replica of a host binds the same cores.
        env_vars |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(replicas.cpu_threads)}
    else:
        deployment["ray_actor_options"] = {"num_cpus": replicas.num_cpus}
        values["accelerator_type"] = replicas.gpu_type
        env_vars |= GPU_ENVIRONMENT
    if replicas.resources:
        deployment["ray_actor_options"]["resources"] = dict(replicas.resources)
    return LLMConfig(**values, deployment_config=deployment, runtime_env={"env_vars": env_vars})


def how_many(replicas: ReplicaArgs) -> dict[str, Any]:
    """Return Serve's settings of the number of replicas.

    Without `target_ongoing_requests`: Ray's default for LLMs is 1e9, and our policy does not read it. Without
    `initial_replicas`: every deployment of a changed config would begin with so many again.
    """
    if replicas.autoscaling is None:
        return {"num_replicas": replicas.num_replicas}
    settings = replicas.autoscaling.settings()
    return {
        "autoscaling_config": {
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "upscale_delay_s": 0.0,
            "downscale_delay_s": 0.0,
            "metrics_interval_s": AUTOSCALING_INTERVAL_S,
            "look_back_period_s": AUTOSCALING_WINDOW_S,
            "policy": {
                "policy_function": "global_scheduler.serve_autoscaling.KvAutoscaler",
                "policy_kwargs": asdict(settings),
            },
        }
    }


def make_engine_kwargs(settings: AppArgs) -> dict[str, Any]:
    """Return vLLM's engine arguments, our scheduler and connector among them."""
    replicas, preemption = settings.replicas, settings.preemption
    kwargs: dict[str, Any] = {
        **replicas.engine_kwargs,
        "tensor_parallel_size": replicas.tensor_parallel_size,
        "max_model_len": replicas.max_model_len,
        "max_num_seqs": replicas.max_num_seqs,
    }
    if replicas.accelerator == "cpu":
        # vLLM 0.29 on CPU: a prefill in pieces of a request with a seed ends the engine, for everybody (its runner moves
        # the random generator's offset back, which CPU generators do not have: v1/worker/gpu_model_runner.py).
        kwargs["enable_chunked_prefill"] = False
        kwargs["max_num_batched_tokens"] = max(replicas.max_model_len, CPU_BATCHED_TOKENS)
    if replicas.kv_cache_bytes is not None:
        kwargs["kv_cache_memory_bytes"] = replicas.kv_cache_bytes
    if settings.uses_own_scheduler:
        kwargs["scheduler_cls"] = SCHEDULERS[replicas.accelerator]
    if preemption.policy != "stock":
        kwargs["kv_transfer_config"] = {
            "kv_connector": "SwapConnector",
            "kv_connector_module_path": "replicas.vllm_swap",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": settings.connector_settings(),
        }
    return kwargs

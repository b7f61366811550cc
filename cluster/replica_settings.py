"""Settings of the replicas: `args.replicas` of a Serve config file (`cluster.config`)."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from global_scheduler.autoscaling import AutoscalerSettings
from replicas.features import refused_feature

_AIMS = AutoscalerSettings()


class Settings(BaseModel):
    """Frozen values of exact types; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class AutoscalingArgs(Settings):
    """How many replicas there are to be, by the load (`global_scheduler.autoscaling`)."""

    min_replicas: int = Field(default=_AIMS.min_replicas, ge=1, le=1000)
    """It begins with so many."""

    max_replicas: int = Field(ge=1, le=1000)
    target_kv_use: float = _AIMS.target_kv_use
    """Share of a replica's KV blocks, or of its `max_num_seqs`, that is to be in use."""

    target_queued_s: float = _AIMS.target_queued_s
    """Predicted seconds of work that may wait at a replica."""

    max_preemptions_per_s: float = _AIMS.max_preemptions_per_s
    """Of a replica; more often, one more is started whatever else is aimed at."""

    max_step_up: int = _AIMS.max_step_up
    max_step_down: int = _AIMS.max_step_down
    up_delay_s: float = _AIMS.up_delay_s
    """So long more must be asked for."""

    down_delay_s: float = _AIMS.down_delay_s
    up_cooldown_s: float = _AIMS.up_cooldown_s
    """After a change, until the number may rise again."""

    down_cooldown_s: float = _AIMS.down_cooldown_s
    down_margin: float = _AIMS.down_margin
    """Part of the targets that must be free beyond them before replicas are given up."""

    max_report_age_s: float = _AIMS.max_report_age_s
    """A replica at work that has said nothing for so long keeps the number from falling."""

    @model_validator(mode="after")
    def _relations(self) -> Self:
        self.settings()
        return self

    def settings(self) -> AutoscalerSettings:
        """What the policy is made with."""
        return AutoscalerSettings(**self.model_dump())


class ReplicaArgs(Settings):
    """The vLLM replicas. Sizes are per replica."""

    num_replicas: int = Field(default=2, ge=1, le=1000)
    """Not read with `autoscaling`."""

    autoscaling: AutoscalingArgs | None = None
    """None: there are always `num_replicas`."""

    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Further resources that one replica takes of its node, by the names that nodes were started with. A node that has 1 of
    `replica_slot` gets one replica of those that take 1: so they are spread."""

    drain_timeout_s: float = Field(default=600.0, ge=0)
    """A replica that is scaled away, or replaced, gets no new requests and has so long to finish those it has; what is
    unfinished then fails. Longer than the longest request together with its wait."""

    max_surge_percent: int = Field(default=0, ge=0, le=100)
    """Replicas, as a part of all, that start before old ones end when a changed config is deployed. 0: the old ones end
    first, for there is no room for more."""

    accelerator: Literal["cpu", "gpu"] = "cpu"
    gpu_type: str | None = None
    """Ray's accelerator type, such as `H100`; None takes any GPU."""

    num_cpus: float = Field(default=0.8, gt=0)
    """Logical CPUs that Ray books for one replica with its engine."""

    cpu_threads: int = Field(default=1, ge=1)
    """OpenMP threads of one CPU engine."""

    tensor_parallel_size: int = Field(default=1, ge=1)
    max_model_len: int = Field(default=2048, ge=64)
    """Longest prompt plus output, in tokens."""

    max_num_seqs: int = Field(default=64, ge=1)
    """Requests that run in one step."""

    max_ongoing_requests: int = Field(default=1024, ge=1)
    """Requests that one replica accepts, waiting ones included. What all refuse waits at the ingress, in no fair order."""

    kv_cache_bytes: int | None = Field(default=None, ge=1 << 20)
    """Engine memory for KV blocks. None: what vLLM finds free (GPU only; CPU replicas must share the host's memory)."""

    engine_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Further vLLM engine arguments, passed on as they are."""

    @model_validator(mode="after")
    def _relations(self) -> Self:
        if self.accelerator == "cpu" and self.kv_cache_bytes is None:
            raise ValueError(
                "kv_cache_bytes must be set on CPU: replicas of one host cannot each take what they find free"
            )
        if self.accelerator == "cpu" and self.tensor_parallel_size > 1:
            raise ValueError("tensor_parallel_size must be 1 on CPU: set it to 1 or use GPUs")
        on_cpu = {"enable_chunked_prefill", "max_num_batched_tokens"} & set(self.engine_kwargs)
        if self.accelerator == "cpu" and on_cpu:
            raise ValueError(f"engine_kwargs.{min(on_cpu)} must be left out on CPU: prefills stay in one piece there")
        owned = {
            "model", "served_model_name", "scheduler_cls", "kv_transfer_config", "tensor_parallel_size", "max_model_len",
            "max_num_seqs", "kv_cache_memory_bytes", "distributed_executor_backend", "async_scheduling",
        } & set(self.engine_kwargs)  # fmt: skip
        if owned:
            raise ValueError(f"engine_kwargs.{min(owned)} is set by the product: remove it there")
        if refusal := refused_feature(self.engine_kwargs, {}):
            raise ValueError(refusal)
        return self

    @property
    def first_replicas(self) -> int:
        """At the beginning."""
        return self.num_replicas if self.autoscaling is None else self.autoscaling.min_replicas

    @property
    def most_replicas(self) -> int:
        """At any time."""
        return self.num_replicas if self.autoscaling is None else self.autoscaling.max_replicas

"""Ray's vLLM engine: it refuses models that must not be served, and has its worker inside its own process on CPU.

Why the refusal, which was made before: of a hub id nobody knows the `config.json` until vLLM has fetched it.

Why one process: Ray gives a CPU engine vLLM's multiprocessing executor. With one worker that is a second process to import
everything again (20 s of each start) and an engine process that spins on a whole core while it waits for its worker, on
hosts whose few cores the model itself needs. vLLM's single-process executor does the same work in one. vLLM turns it down
on CPU only because it cannot set OpenMP's environment in time; here the replica's environment has it from the start.
"""

from typing import Any

from replicas.features import refused_model
from replicas.ray_internals import VLLMEngine


class AdaptiveVLLMEngine(VLLMEngine):
    """The engine of `AdaptiveLLMServer`."""

    def _prepare_engine_config(self, callback_ctx: Any) -> tuple[Any, Any, Any]:
        engine_args, frontend_args, vllm_config = super()._prepare_engine_config(callback_ctx)
        check_model(vllm_config.model_config)
        if vllm_config.device_config.device_type == "cpu":
            assert vllm_config.parallel_config.world_size == 1, "CPU replicas have one worker"
            vllm_config.parallel_config.distributed_executor_backend = "uni"
        return engine_args, frontend_args, vllm_config


def check_model(model_config: Any) -> None:
    """Refuse what vLLM says that the model is (its `ModelConfig`).

    Raises:
        ValueError: One sentence with the mend.
    """
    refusal = refused_model(
        multimodal=model_config.is_multimodal_model,
        hybrid=model_config.is_hybrid or model_config.has_inner_state or model_config.get_sliding_window() is not None,
        encoder_decoder=model_config.is_encoder_decoder,
    )
    if refusal:
        raise ValueError(refusal)

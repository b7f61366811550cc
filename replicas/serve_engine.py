"""Ray's vLLM engine, with the worker inside the engine's process on CPU.

Why: Ray gives a CPU engine vLLM's multiprocessing executor. With one worker that is a second process to import everything
again (20 s of each start) and an engine process that spins on a whole core while it waits for its worker, on hosts whose
few cores the model itself needs. vLLM's single-process executor does the same work in one. vLLM turns it down on CPU only
because it cannot set OpenMP's environment in time; here the replica's environment has it from the start.
"""

from typing import Any

from replicas.ray_internals import VLLMEngine


class AdaptiveVLLMEngine(VLLMEngine):
    """The engine of `AdaptiveLLMServer`."""

    def _prepare_engine_config(self, callback_ctx: Any) -> tuple[Any, Any, Any]:
        engine_args, frontend_args, vllm_config = super()._prepare_engine_config(callback_ctx)
        if vllm_config.device_config.device_type == "cpu":
            assert vllm_config.parallel_config.world_size == 1, "CPU replicas have one worker"
            vllm_config.parallel_config.distributed_executor_backend = "uni"
        return engine_args, frontend_args, vllm_config

"""The cost snapshot that an engine starts with: the configured one where it fits this engine, else the analytic one (shell).

Rule: a snapshot that is damaged or was made for another engine is said in the log and not used; the engine starts anyway.
"""

import logging
from dataclasses import replace
from typing import Any

from cost_service.analytic import analytic_snapshot
from cost_service.hardware import CPU, UNKNOWN, Hardware, known_hardware
from cost_service.model_shape import SEVEN_BILLION, ModelShape
from cost_service.snapshot import CostSnapshot
from replicas.config import SwapConfig
from replicas.vllm_block_copy import CopySpeeds, bytes_per_block
from replicas.vllm_internals import current_platform

logger = logging.getLogger(__name__)


def costs_of(vllm_config: Any, kv_cache_config: Any, config: SwapConfig | None) -> CostSnapshot:
    """Return the costs of this engine's preemptions.

    Args:
        config: None without a connector: nothing is swapped then.
    """
    block_bytes = bytes_per_block(kv_cache_config)
    costs = _configured(vllm_config, config) or _analytic(vllm_config, block_bytes)
    if config is not None and config.throttled_link_bytes_per_s is not None and costs.version == 0:
        # The throttle's own speed: only a learned snapshot knows better.
        costs = replace(
            costs,
            link_latency_s=config.throttled_link_latency_s,
            link_out_block_s=block_bytes / config.throttled_link_bytes_per_s,
            link_in_block_s=block_bytes / config.throttled_link_bytes_per_s,
            link_shared_ratio=config.throttled_link_shared_ratio,
        )
    return costs


def with_copies(costs: CostSnapshot, speeds: CopySpeeds) -> CostSnapshot:
    """Analytic costs with copies as the workers have measured them; learned costs know better and stay as they are."""
    if costs.version > 0:
        return costs
    return replace(costs, swap_fixed_s=speeds.fixed_s, out_block_s=speeds.out_block_s, in_block_s=speeds.in_block_s)


def newer_costs(costs: CostSnapshot, text: str) -> CostSnapshot | None:
    """Read a snapshot that has arrived for an engine with these costs; None, said in the log, where it is not for it."""
    try:
        newer = CostSnapshot.from_json(text)
    except ValueError as error:
        logger.warning("%s Going on with version %d.", error, costs.version)
        return None
    if not newer.fits(
        model=costs.model, hardware=costs.hardware, parallelism=costs.parallelism, block_size=costs.block_size
    ):
        logger.warning("A cost snapshot for %s on %s is not for this engine: going on.", newer.model, newer.hardware)
        return None
    return newer if newer.version > costs.version else None


def _configured(vllm_config: Any, config: SwapConfig | None) -> CostSnapshot | None:
    if config is None or config.cost_snapshot is None:
        return None
    try:
        costs = CostSnapshot.from_json(config.cost_snapshot)
    except ValueError as error:
        logger.warning("%s Starting with analytic costs.", error)
        return None
    block_size = vllm_config.cache_config.block_size
    if costs.block_size != block_size:
        logger.warning(
            "The cost snapshot is for blocks of %d tokens and the engine has %d: calibrate again. Starting with analytic "
            "costs.", costs.block_size, block_size,
        )  # fmt: skip
        return None
    # Costs are exchanged with others of the engine's own name, whatever the model was called when they were measured.
    return replace(costs, model=str(vllm_config.model_config.served_model_name))


def _analytic(vllm_config: Any, block_bytes: int) -> CostSnapshot:
    model = vllm_config.model_config
    try:
        shape = ModelShape.from_config(model.hf_text_config.to_dict())
    except ValueError as error:
        logger.warning("%s Starting with the costs of a model of seven billion weights.", error)
        shape = SEVEN_BILLION
    return analytic_snapshot(
        shape,
        hardware_of_this_host(),
        model=str(model.served_model_name),
        parallelism=vllm_config.parallel_config.tensor_parallel_size,
        block_size=vllm_config.cache_config.block_size,
        block_bytes=block_bytes,
        weight_bytes=model.dtype.itemsize,
    )


def hardware_of_this_host() -> Hardware:
    """Rates of the device that vLLM runs on; those of the slowest known GPU, said in the log, for one that is not known."""
    if current_platform.is_cpu():
        return CPU
    name = current_platform.get_device_name()
    if (known := known_hardware(name)) is not None:
        return known
    logger.warning("%s has no datasheet here: starting with the costs of the slowest known GPU, and learning.", name)
    return replace(UNKNOWN, name=name)

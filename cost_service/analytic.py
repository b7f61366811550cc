"""A cost snapshot from a model's shape and a machine's rates alone: what an engine starts with before anything is measured.

Source of the formulas: a token passes every active weight once (2 FLOPs each); causal attention over n new tokens behind r
cached ones takes 2 * layers * heads * (d_qk + d_v) / 2 * ((n + r)^2 - r^2) FLOPs; below the ridge
`flops_per_s / bytes_per_s * bytes_per_weight / 2` a step's time is that of reading the weights.
"""

from cost_service.hardware import Hardware
from cost_service.model_shape import ModelShape
from cost_service.snapshot import CostSnapshot


def analytic_snapshot(
    shape: ModelShape,
    hardware: Hardware,
    *,
    model: str,
    parallelism: int,
    block_size: int,
    block_bytes: int,
    weight_bytes: int = 2,
) -> CostSnapshot:
    """Return version 0 of a replica's costs.

    Args:
        block_bytes: Bytes of one KV block on one rank.
        weight_bytes: Bytes per weight.
    """
    flops_per_s, attention_flops_per_s = (
        rate * parallelism for rate in (hardware.flops_per_s, hardware.attention_flops_per_s)
    )
    block_s = block_bytes / hardware.copy_bytes_per_s
    return CostSnapshot(
        version=0,
        model=model,
        hardware=hardware.name,
        parallelism=parallelism,
        block_size=block_size,
        recompute_fixed_s=hardware.prefill_fixed_s,
        ridge_tokens=hardware.flops_per_s / hardware.bytes_per_s * weight_bytes / 2,
        token_s=2 * shape.active_weights / flops_per_s,
        attention_s=2 * shape.attention_width / attention_flops_per_s,
        swap_fixed_s=hardware.copy_fixed_s,
        out_block_s=block_s if hardware.copies_stall else 0.0,
        in_block_s=block_s if hardware.copies_stall else 0.0,
        link_latency_s=0.0,
        link_out_block_s=0.0 if hardware.copies_stall else block_s,
        link_in_block_s=0.0 if hardware.copies_stall else block_s,
    )

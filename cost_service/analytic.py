"""A cost snapshot from a model's shape and a machine's rates alone: what an engine starts with before anything is measured.

Source of the formulas: a token passes every active weight once (2 FLOPs each); causal attention over n new tokens behind r
cached ones takes 2 * layers * heads * (d_qk + d_v) / 2 * ((n + r)^2 - r^2) FLOPs; below the ridge
`flops_per_s / bytes_per_s * bytes_per_weight / 2` a step's time is that of reading the weights.
"""

from dataclasses import dataclass

from cost_service.model_shape import ModelShape
from cost_service.snapshot import CostSnapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Rates that one rank really reaches."""

    name: str
    flops_per_s: float
    bytes_per_s: float
    """Device memory."""

    prefill_fixed_s: float
    """What a prefill adds to a step of decodes whatever its size (on GPUs the step leaves its captured graph)."""

    copy_bytes_per_s: float
    """Between device and host memory, one direction, in pieces of a KV block."""

    copy_fixed_s: float
    """To hand one batch of copies over."""

    copies_stall: bool
    """Whether the engine waits for its copies (CPU), or they run beside it (GPU)."""


HARDWARE = {
    hardware.name: hardware
    for hardware in (
        # One thread of a server core without matrix units; its memory copy is what another core leaves.
        Hardware(
            name="cpu",
            flops_per_s=3e10,
            bytes_per_s=1e10,
            prefill_fixed_s=2e-3,
            copy_bytes_per_s=4e9,
            copy_fixed_s=2e-4,
            copies_stall=True,
        ),
        # Half of the datasheet's dense bf16 rate; PCIe as measured with blocks of 0.5 to 2 MB.
        Hardware(
            name="A100",
            flops_per_s=156e12,
            bytes_per_s=1.5e12,
            prefill_fixed_s=2e-3,
            copy_bytes_per_s=24e9,
            copy_fixed_s=5e-3,
            copies_stall=False,
        ),
        Hardware(
            name="H100",
            flops_per_s=495e12,
            bytes_per_s=2.7e12,
            prefill_fixed_s=2e-3,
            copy_bytes_per_s=50e9,
            copy_fixed_s=5e-3,
            copies_stall=False,
        ),
        Hardware(
            name="H200",
            flops_per_s=495e12,
            bytes_per_s=4.0e12,
            prefill_fixed_s=2e-3,
            copy_bytes_per_s=50e9,
            copy_fixed_s=5e-3,
            copies_stall=False,
        ),
    )
}


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
    flops_per_s = hardware.flops_per_s * parallelism
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
        attention_s=2 * shape.attention_width / flops_per_s,
        swap_fixed_s=hardware.copy_fixed_s,
        out_block_s=block_s if hardware.copies_stall else 0.0,
        in_block_s=block_s if hardware.copies_stall else 0.0,
        link_latency_s=0.0,
        link_out_block_s=0.0 if hardware.copies_stall else block_s,
        link_in_block_s=0.0 if hardware.copies_stall else block_s,
    )

"""What the replicas of a simulation are, from options: timed by a datasheet, a profile or a calibration."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.bench_arm import OFFLOAD, STOCK
from cluster.bench_command import named_as_options
from cluster.bench_model import LLAMA_8B
from cluster.pool_fraction import HELP
from cluster.simulated_replica import ReplicaKind
from cluster.simulated_step import SimulatedSettings
from cluster.simulated_time import StepTimes
from cost_service.analytic import analytic_snapshot
from cost_service.calibration import CONFIG, fitted_step, is_calibration, learned_snapshot
from cost_service.engine_step import EngineStep
from cost_service.fit import snapshot_of
from cost_service.hardware import HARDWARE, Hardware
from cost_service.kv_memory import kv_layout
from cost_service.model_shape import ModelShape, read_config
from cost_service.profiled_step import ProfiledStep
from cost_service.profiles import load_profiles
from cost_service.snapshot import CostSnapshot
from cost_service.step_time import MeasuredModel, StepTime
from replicas.config import PreemptionPolicy
from replicas.throttled_link import LinkSettings

POLICIES = (STOCK, OFFLOAD, *(one.value for one in PreemptionPolicy if one is not PreemptionPolicy.RANDOM))
"""What `--policy` may name: `random` is for calibrations alone."""

MODELS = {"llama-3.1-8b": LLAMA_8B}
KV_SHARE = 0.9
"""Of device memory, what weights, activations and KV cache take together (vLLM's `gpu_memory_utilization`)."""
ACTIVATION_GIB = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """A model on a device, with what its steps and preemptions take."""

    shape: ModelShape
    times: StepTimes
    costs: CostSnapshot
    said: str
    """Where the times come from."""


def add_kind_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that say what a replica is."""
    add = parser.add_argument
    add("--hardware", choices=sorted(HARDWARE), default="H100", help="device of a replica (default: H100)")
    add("--model", default="llama-3.1-8b", help=f"{', '.join(MODELS)}, or a config.json (default: llama-3.1-8b)")
    add(
        "--profile", type=Path, metavar="DIR",
        help="profiles of this model on this device, or a calibration, instead of the datasheet",
    )  # fmt: skip
    add("--block-size", type=int, default=16, help="tokens per KV block (default: 16)")
    add("--max-num-seqs", type=int, default=256, help="requests that run at once on a replica (default: 256)")
    add("--max-num-batched-tokens", type=int, default=8192, help="tokens of a step (default: 8192)")
    add("--no-prefix-caching", action="store_true", help="without vLLM's prefix cache")
    pool = parser.add_mutually_exclusive_group()
    pool.add_argument("--pool-blocks", type=int, help="KV blocks of a replica (default: what the device has room for)")
    pool.add_argument("--pool-fraction", type=float, help=HELP)
    add("--host-gib", type=float, default=64.0, help="host memory for KV blocks, per replica (default: 64)")
    add(
        "--offload-prompt-only", action="store_true",
        help="policy offload keeps no generated tokens, as by vLLM's default (default: it keeps them)",
    )  # fmt: skip
    add("--replicas-per-host", type=int, default=1, help="replicas that share a link to host memory (default: 1)")


@named_as_options("block_size")
def timed(options: argparse.Namespace) -> Timed:
    """What steps and preemptions of the model on the device take.

    Raises:
        ValueError: The model or the profile cannot be read, or they do not belong together.
    """
    hardware, folder = HARDWARE[options.hardware], options.profile
    if folder is not None:
        print(f"Reading {folder} and fitting step times, which may take a minute ...", file=sys.stderr, flush=True)
    if folder is not None and is_calibration(folder):
        costs = learned_snapshot(folder)
        if costs.block_size != options.block_size:
            raise ValueError(f"--block-size must be {costs.block_size}, with which {folder} was calibrated.")
        shape = ModelShape.from_config(read_config(folder / CONFIG), source=str(folder / CONFIG))
        return Timed(
            shape=shape, times=fitted_step(folder), costs=costs, said="step times and costs as a calibration measured"
        )
    if folder is not None:
        return _profiled(options, folder, hardware)
    config = MODELS.get(options.model) or read_config(Path(options.model))
    shape = ModelShape.from_config(config, source=options.model)
    costs = analytic_snapshot(
        shape, hardware, model=Path(options.model).name, parallelism=1, block_size=options.block_size,
        block_bytes=kv_layout(shape, block_size=options.block_size).block_bytes,
    )  # fmt: skip
    return Timed(
        shape=shape, times=EngineStep.cold(shape, hardware), costs=costs,
        said="step times from a datasheet, and copies at its rates: nothing here was measured",
    )  # fmt: skip


def _profiled(options: argparse.Namespace, folder: Path, hardware: Hardware) -> Timed:
    models = [MeasuredModel.of(profile) for profile in load_profiles(folder)]
    same = [one for one in models if one.profile.hardware == hardware.name]
    if same and not any(one.attention for one in same):
        raise ValueError(
            f"{folder} has no attention.csv of {hardware.name}, and step times need one: name the folder above it, "
            f"{folder.absolute().parent.name}, where another model's may be, or one with it."
        )
    wanted = Path(options.model).name.removesuffix(".json").lower()
    for one in same:
        if wanted in one.name.lower() and one.profile.parallelism == 1:
            times = StepTime(hardware)
            times.fit(same)
            return Timed(
                shape=one.shape, times=ProfiledStep(one.shape, times),
                costs=snapshot_of(one, times, block_size=options.block_size),
                said=f"step times from profiles of operators{_carried(one, same)}, and copies at a datasheet's rates",
            )  # fmt: skip
    known = ", ".join(sorted({one.name for one in models if one.profile.parallelism == 1}))
    raise ValueError(f"{folder} has no profile of {options.model} on {hardware.name}: it has {known}.")


def _carried(one: MeasuredModel, same: Sequence[MeasuredModel]) -> str:
    """What of a model's step times was not measured with it; where they come from, for people."""
    if one.profile.attention is not None:
        return ""
    others = sorted({other.name for other in same if other.profile.attention is not None})
    return f" (attention, of prefills and decodes, is carried over from {', '.join(others)} by what it reads and walks over)"


@named_as_options(
    "block_size", "max_num_seqs", "max_num_batched_tokens", "replicas_per_host", num_blocks="--pool-blocks"
)
def kind_of(options: argparse.Namespace, one: Timed, *, policy: str) -> ReplicaKind:
    """The replicas that the options describe.

    Raises:
        ValueError: An option is wrong, or the device has no room for the model.
    """
    if policy not in POLICIES:
        raise ValueError(f"--policy has no {policy!r}: use some of {', '.join(POLICIES)}.")
    hardware = HARDWARE[options.hardware]
    block_bytes = kv_layout(one.shape, block_size=options.block_size).block_bytes
    if not options.host_gib >= 0:
        raise ValueError(f"--host-gib must not be negative: it is {options.host_gib}.")
    settings = SimulatedSettings(
        num_blocks=options.pool_blocks if options.pool_blocks is not None else _num_blocks(one.shape, hardware, block_bytes),
        block_size=options.block_size, max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        enable_prefix_caching=not options.no_prefix_caching,
    )  # fmt: skip
    return ReplicaKind(
        settings=settings, times=one.times, costs=one.costs, block_bytes=block_bytes, policy=policy,
        host_bytes=int(options.host_gib * (1 << 30)), link=_link(hardware), replicas_per_host=options.replicas_per_host,
        offload_prompt_only=options.offload_prompt_only,
    )  # fmt: skip


def _link(hardware: Hardware) -> LinkSettings | None:
    return None if hardware.copies_stall else LinkSettings(bytes_per_s=hardware.copy_bytes_per_s)


def _num_blocks(shape: ModelShape, hardware: Hardware, block_bytes: int) -> int:
    """KV blocks that a device has room for beside the weights, at two bytes each."""
    weights = 2 * (shape.active_weights + shape.hidden_size * shape.vocab_size)
    free = (KV_SHARE * hardware.memory_gib - ACTIVATION_GIB) * (1 << 30) - weights
    if free < 2 * block_bytes:
        raise ValueError(
            f"The model's weights take {weights / (1 << 30):.0f} GiB: name --pool-blocks for such a replica."
        )
    return int(free / block_bytes)

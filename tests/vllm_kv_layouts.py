"""What vLLM itself allocates for published models: its own model classes are built without memory and asked.

Goal: nothing of a config, a spec or a grouping is typed again here, so that a test against this is one against vLLM.
Method: a process of its own (`python -m tests.vllm_kv_layouts`; vLLM's process groups are global) builds every model on the
meta device, for several ranks by telling the one rank's group that it has more, and prints JSON.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.model_configs import CONFIGS

ROOT = Path(__file__).parents[1]

WIDE = {"smollm2-135m": 3, "qwen2.5-7b": 4, "gpt2": 4, "gpt-oss-20b": 2, "falcon-7b": 1}
"""Ranks over which these models divide, where 16 do not."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model on one engine."""

    name: str
    parallelism: int = 1
    dtype: str = "bfloat16"
    cache_dtype: str = "auto"
    block_size: int = 128
    hybrid: bool = True

    @property
    def element_bytes(self) -> int:
        """Bytes of an element of the cache."""
        return 1 if self.cache_dtype == "fp8" else {"bfloat16": 2, "float32": 4}[self.dtype]

    def __str__(self) -> str:
        one_group = "" if self.hybrid else "-one-group"
        return f"{self.name}-tp{self.parallelism}-{self.dtype}-{self.cache_dtype}-{self.block_size}{one_group}"


CASES = [
    case
    for name in CONFIGS
    for case in (
        Case(name=name),
        Case(name=name, hybrid=False),
        Case(name=name, cache_dtype="fp8", block_size=64),
        Case(name=name, dtype="float32", block_size=32),
        Case(name=name, parallelism=WIDE.get(name, 16), block_size=16),
    )
    # vLLM's Falcon does not hand the cache's settings to its attention layers, and so has no fp8 cache.
    if not (name.startswith("falcon") and case.cache_dtype == "fp8")
]


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """What vLLM does for a case."""

    block_size: int
    """As the engine's configuration has settled it."""

    kernel_block_size: int
    block_bytes: int
    groups: list[list[int]]
    """Layers, window (0: none) and tokens per block of every group."""


def allocations() -> dict[str, Allocation]:
    """Ask vLLM about all cases, by their names."""
    process = subprocess.run(
        [sys.executable, "-m", "tests.vllm_kv_layouts"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=500,
        env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-4000:]
    return {name: Allocation(**fields) for name, fields in json.loads(process.stdout.splitlines()[-1]).items()}


def engine_config(case: Case) -> Any:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
    from vllm.engine.arg_utils import EngineArgs

    fields = CONFIGS[case.name].get("text_config", CONFIGS[case.name])
    config = AutoConfig.for_model(**fields)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return EngineArgs(
            model=folder, skip_tokenizer_init=True, load_format="dummy", max_model_len=1024, enforce_eager=True,
            dtype=case.dtype, kv_cache_dtype=case.cache_dtype, block_size=case.block_size,
            disable_hybrid_kv_cache_manager=not case.hybrid,
        ).create_engine_config()  # fmt: skip


def allocation(case: Case) -> Allocation:
    """Build the model of a case, and let vLLM divide 64 GiB among its layers."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed.parallel_state import get_tp_group
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.v1.core.kv_cache_utils import get_kv_cache_configs

    config = engine_config(case)
    get_tp_group().world_size = case.parallelism
    with set_current_vllm_config(config):
        with torch.device("meta"):
            initialize_model(config)
        context = config.compilation_config.static_forward_context
        layers: dict[str, Any] = {name: one for name, one in context.items() if isinstance(one, AttentionLayerBase)}
        specs = {name: layer.get_kv_cache_spec(config) for name, layer in layers.items()}
        backends = {layer.get_attn_backend() for layer in layers.values()}
        (backend,) = backends
        config.cache_config.kv_cache_layout = "LBHNC"  # the engine core settles it from what workers report
        (cache,) = get_kv_cache_configs(config, [specs], [64 << 30])
    (kernel_size,) = backend.get_supported_kernel_block_sizes()
    (pool_bytes,) = {tensor.size for tensor in cache.kv_cache_tensors}  # each names the whole pool, not its share
    assert pool_bytes % cache.num_blocks == 0
    return Allocation(
        block_size=config.cache_config.block_size,
        kernel_block_size=getattr(kernel_size, "base", kernel_size),
        block_bytes=pool_bytes // cache.num_blocks,
        groups=sorted(
            [len(group.layer_names), window_of(group.kv_cache_spec), group.kv_cache_spec.block_size]
            for group in cache.kv_cache_groups
        ),
    )


def window_of(spec: Any) -> int:
    """Window by which blocks are dropped: full attention may name one, and keeps its blocks nevertheless."""
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    return int(spec.sliding_window) if isinstance(spec, SlidingWindowSpec) else 0


def main() -> None:
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment

    with tempfile.TemporaryDirectory() as folder:
        # Of a model with experts, so that vLLM makes their group too.
        with set_current_vllm_config(engine_config(Case(name="mixtral-8x7b"))):
            init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
        print(json.dumps({str(case): asdict(allocation(case)) for case in CASES}))


if __name__ == "__main__":
    main()

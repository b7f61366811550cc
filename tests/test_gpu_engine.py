"""Goal: on a GPU, with the asynchronous scheduler, swapped and recomputed requests deliver the tokens of a calm run.

Method: as tests/test_engine_exactness.py, with the engine's own attention for the GPU. Triton multiplies float32 in TF32
unless told otherwise: then about one request in ten gets other tokens when its batch is another one.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.config import GPU_ENVIRONMENT
from tests.engine_runs import AMPLE_BLOCKS, GREEDY, Run, run_engine

os.environ.update({"TRITON_F32_DEFAULT": "ieee"} | GPU_ENVIRONMENT)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: no CUDA device is present"),
]

SCARCE: dict[str, Any] = {"num_blocks": 24, "async_scheduling": True}
ASYNCHRONOUS: dict[str, Any] = {"scheduler_cls": "replicas.vllm_scheduler.AdaptiveAsyncScheduler"}


@pytest.fixture(scope="module")
def calm(tiny_model: Path) -> Run:
    return run_engine(tiny_model, "stock", GREEDY, num_blocks=AMPLE_BLOCKS)


def same_tokens(run: Run, calm: Run) -> int:
    return sum(mine == theirs for mine, theirs in zip(run.tokens, calm.tokens, strict=True))


@pytest.mark.parametrize("policy", ["swap", "random", "adaptive", "recompute"])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_every_token_is_the_same(tiny_model: Path, calm: Run, policy: str, prefix_caching: bool) -> None:
    run = run_engine(tiny_model, policy, GREEDY, enable_prefix_caching=prefix_caching, **SCARCE, **ASYNCHRONOUS)
    print(
        f"{policy}: {same_tokens(run, calm)} of {len(GREEDY)} the same, {run.swaps} swaps, {run.recomputes} recomputes"
    )
    assert same_tokens(run, calm) == len(GREEDY)
    assert run.swaps + run.recomputes >= 20
    if policy == "swap":
        assert run.recomputes == 0


def test_memory_pressure_alone_changes_no_token(tiny_model: Path, calm: Run) -> None:
    assert same_tokens(run_engine(tiny_model, "stock", GREEDY, **SCARCE), calm) == len(GREEDY)

"""Goal: on a GPU, with the asynchronous scheduler, swapped and recomputed requests deliver the tokens of a calm run.

Method: as tests/test_engine_exactness.py, with the engine's own attention for the GPU.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine_runs import AMPLE_BLOCKS, GREEDY, run_engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: no CUDA device is present"),
]

ASYNCHRONOUS: dict[str, Any] = {
    "scheduler_cls": "replicas.vllm_scheduler.AdaptiveAsyncScheduler", "async_scheduling": True, "block_size": 32,
}  # fmt: skip


@pytest.mark.parametrize("policy", ["swap", "random", "adaptive", "recompute"])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_every_token_is_the_same(tiny_model: Path, policy: str, prefix_caching: bool) -> None:
    calm = run_engine(tiny_model, "stock", GREEDY, num_blocks=AMPLE_BLOCKS)
    run = run_engine(tiny_model, policy, GREEDY, num_blocks=24, enable_prefix_caching=prefix_caching, **ASYNCHRONOUS)
    same = sum(mine == theirs for mine, theirs in zip(run.tokens, calm.tokens, strict=True))
    assert same == len(GREEDY)
    assert run.swaps + run.recomputes >= 20
    if policy == "swap":
        assert run.recomputes == 0

"""Fixtures and builders only. Environment for engines is set here, before any test module can import vLLM."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.shared_data import FOLDER

if TYPE_CHECKING:
    from tests.engine_runs import Base

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # engine, scheduler and worker in the test's own process
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

TINY_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of public traces and profiles; with `tests.shared_data.needs_data`."""
    return FOLDER


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config of a random four-layer Llama; weights are made by `load_format="dummy"`."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    (folder / "config.json").write_text(json.dumps(TINY_LLAMA))
    return folder


@pytest.fixture(scope="session")
def base(tiny_model: Path) -> "Base":
    """What every job of the engine tests delivers when nothing is ever preempted."""
    from tests.engine_runs import base_run

    return base_run(tiny_model)

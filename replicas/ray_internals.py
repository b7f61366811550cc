"""The only place in this folder that imports internals of Ray's LLM layer. Checked by tests/test_contracts_ray.py.

Rule: names only, no logic. Apart from `vllm_internals`, so that an engine's process never loads Ray.
"""

from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine

__all__ = ["VLLMEngine"]

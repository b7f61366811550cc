"""The only place in this folder that imports internals of Ray's and vLLM's. Checked by tests/test_contracts_ray.py.

Rule: names only, no logic. After an upgrade of the pair, `make contracts` says what moved.
"""

from ray.llm._internal.common.dict_utils import maybe_apply_llm_deployment_config_defaults
from ray.llm._internal.serve.core.configs.openai_api_models import (
    ChatCompletionRequest,
    CompletionRequest,
    ErrorInfo,
    ErrorResponse,
    to_model_metadata,
)

__all__ = [
    "ChatCompletionRequest",
    "CompletionRequest",
    "ErrorInfo",
    "ErrorResponse",
    "maybe_apply_llm_deployment_config_defaults",
    "to_model_metadata",
]

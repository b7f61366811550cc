"""Goal: one YAML file holds all settings, and each mistake in it is one sentence that names the field and the mend.

Method: the smallest right file, one mistake at a time, and junk from hypothesis that must never raise anything else.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cluster.config import AppArgs, ServeFile, default_home, load
from cost_service.snapshot import CostSnapshot
from replicas.config import SwapConfig
from tests.test_cost_service_learner import TRUTH

MIB = 1 << 20


def sentence(call: Callable[..., object], *args: Any) -> str:
    """What the `ValueError` of a call says; it must be one sentence on one line."""
    with pytest.raises(ValueError, match=r"^[^\n]+[.?]$") as caught:
        call(*args)
    assert type(caught.value) is ValueError, "a library's own error would be many lines"
    return str(caught.value)


def refusal(section: str = "replicas", **values: Any) -> str:
    """What the settings say to values in one section beside right ones."""
    args: dict[str, Any] = {"replicas": {"kv_cache_bytes": 64 * MIB}}
    return sentence(AppArgs.from_mapping, {**args, section: {**args.get(section, {}), **values}})


def document(**application: Any) -> dict[str, Any]:
    args = {"replicas": {"kv_cache_bytes": 64 * MIB}}
    return {"applications": [{"import_path": "cluster.app:build", "args": args, **application}]}


def file_of(folder: Path, content: Any) -> Path:
    path = folder / "serve.yaml"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


# Settings


def test_the_size_of_the_cache_is_all_that_must_be_said() -> None:
    args = AppArgs.from_mapping({"replicas": {"kv_cache_bytes": 64 * MIB}})
    assert args.replicas.num_replicas == 2
    assert args.model.id == args.model.source == "smollm2-135m-instruct"
    assert args.preemption.policy == "adaptive"


def test_vllms_own_scheduler_tells_nothing_to_scale_by() -> None:
    args = {"replicas": {"kv_cache_bytes": 64 * MIB, "autoscaling": {"max_replicas": 2}}}
    assert "replicas.autoscaling needs our scheduler" in sentence(
        AppArgs.from_mapping, args | {"preemption": {"policy": "stock"}}
    )
    AppArgs.from_mapping(args | {"preemption": {"policy": "stock"}, "fairness": {"admission": "fair"}})


def test_settings_are_frozen() -> None:
    args = AppArgs.from_mapping({"replicas": {"kv_cache_bytes": 64 * MIB}})
    with pytest.raises(ValidationError, match="frozen"):
        args.replicas.num_replicas = 3
    with pytest.raises(ValidationError, match="frozen"):
        args.replicas = args.replicas


def test_an_unknown_key_is_named_with_its_section() -> None:
    assert refusal(num_replica=2) == "Unknown setting replicas.num_replica: did you mean num_replicas?"
    assert "Unknown setting preemption.mode:" in refusal("preemption", mode="swap")
    assert "Unknown setting replica:" in sentence(
        AppArgs.from_mapping, {"replicas": {"accelerator": "gpu"}, "replica": 1}
    )


def test_a_missing_section_is_named() -> None:
    assert sentence(AppArgs.from_mapping, {}) == "Setting replicas is missing: add it."


@pytest.mark.parametrize("section", ["replicas", "preemption", "ingress", "state", "model"])
def test_a_section_that_is_no_mapping_is_named(section: str) -> None:
    args = {"replicas": {"kv_cache_bytes": 64 * MIB}, section: "swap"}
    assert sentence(AppArgs.from_mapping, args).startswith(f"Setting {section} must be a mapping")


def test_a_key_that_is_no_text_is_named_on_one_line() -> None:
    assert "Setting 1: " in sentence(AppArgs.from_mapping, {1: 2, "replicas": {"accelerator": "gpu"}})
    assert "a b" in sentence(AppArgs.from_mapping, {"a\nb": 2, "replicas": {"accelerator": "gpu"}})


@pytest.mark.parametrize("name", ["a model", "", "/model", "ü", "x" * 129])
def test_a_model_name_that_clients_could_not_send_is_refused(name: str) -> None:
    assert "Setting model.id must " in refusal("model", id=name)


# The folder of keys and models


def test_the_folder_is_the_configured_one_else_the_environments_else_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    args = {"replicas": {"accelerator": "gpu"}}
    monkeypatch.setenv("ADAPTIVELLM_HOME", "/srv/home")
    assert AppArgs.from_mapping({**args, "state": {"directory": "/srv/state"}}).state.path == Path("/srv/state")
    assert AppArgs.from_mapping(args).state.path == Path("/srv/home")
    monkeypatch.setenv("ADAPTIVELLM_HOME", "")
    assert default_home() == Path("~/.adaptivellm").expanduser()


# Files


def settings_with(costs_file: Path) -> dict[str, Any]:
    args = AppArgs.from_mapping(
        {"replicas": {"kv_cache_bytes": 64 * MIB}, "preemption": {"policy": "swap", "costs_file": str(costs_file)}}
    )
    return args.connector_settings()


def test_costs_that_were_fitted_go_to_the_engine(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({"snapshots": {"m": json.loads(TRUTH.to_json())}}))
    settings = settings_with(path)
    assert CostSnapshot.from_json(settings["cost_snapshot"]) == TRUTH
    assert settings["preemption"] == "swap"
    assert "costs_file" not in settings


def admission_of(**args: Any) -> tuple[str, dict[str, Any]]:
    settings = AppArgs.from_mapping({"replicas": {"kv_cache_bytes": 64 * MIB}, **args})
    return settings.admission, settings.connector_settings()


def test_admission_is_fair_unless_something_else_is_said() -> None:
    admission, settings = admission_of()
    assert (admission, settings["admission"], settings["service"]) == ("fair", "fair", "tokens")
    admission, settings = admission_of(fairness={"admission": "first-come", "service": "seconds"})
    assert (admission, settings["admission"], settings["service"]) == ("first-come", "first-come", "seconds")
    SwapConfig.from_mapping(settings)


def test_stock_is_vllms_own_order_unless_fair_is_said() -> None:
    assert admission_of(preemption={"policy": "stock"})[0] == "first-come"
    assert admission_of(preemption={"policy": "stock"}, fairness={"admission": "fair"})[0] == "fair"
    args = {"replicas": {"accelerator": "gpu"}, "preemption": {"policy": "stock"}, "fairness": {"service": "seconds"}}
    said = sentence(AppArgs.from_mapping, args)
    assert "fairness.service must be tokens with preemption.policy stock: leave it out." in said


@pytest.mark.parametrize("policy", ["stock", "recompute"])
@pytest.mark.parametrize("admission", ["fair", "first-come"])
def test_vllms_own_scheduler_serves_stock_with_first_come_alone(policy: str, admission: str) -> None:
    from cluster.app import make_engine_kwargs  # loads Ray

    kwargs = make_engine_kwargs(
        AppArgs.from_mapping(
            {"replicas": {"kv_cache_bytes": 64 * MIB}, "preemption": {"policy": policy},
             "fairness": {"admission": admission}}
        )
    )  # fmt: skip
    assert ("scheduler_cls" in kwargs) == ((policy, admission) != ("stock", "first-come"))
    assert ("kv_transfer_config" in kwargs) == (policy != "stock")


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "cannot be read"), ("{", "the costs of one model"), ('{"snapshots": {}}', "the costs of one model"),
     ('{"snapshots": {"a": {}, "b": {}}}', "the costs of one model"),
     ('{"snapshots": {"a": {}}}', "must be the JSON object")],
)  # fmt: skip
def test_a_file_of_costs_that_is_none_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "costs.json"
    if text is not None:
        path.write_text(text)
    assert message in sentence(settings_with, path)


def test_a_file_gives_its_settings_and_its_address(tmp_path: Path) -> None:
    content = {"http_options": {"host": "127.0.0.2", "port": 9000}, **document(name="llm", route_prefix="/llm")}
    file = load(file_of(tmp_path, content))
    assert (file.host, file.port, file.name, file.route_prefix) == ("127.0.0.2", 9000, "llm", "/llm")
    assert file.args.replicas.kv_cache_bytes == 64 * MIB


def test_without_an_address_only_this_machine_can_connect(tmp_path: Path) -> None:
    file = load(file_of(tmp_path, document()))
    assert (file.host, file.port) == ("127.0.0.1", 8000)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    assert f"Config file {missing} does not exist: give --config" in sentence(load, missing)
    assert "does not exist" in sentence(load, tmp_path), "a folder"


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> str:
        raise PermissionError(13, "Permission denied")

    path = file_of(tmp_path, document())
    monkeypatch.setattr(Path, "read_text", refuse)
    assert f"{path} cannot be read (Permission denied): correct its permissions" in sentence(load, path)


@pytest.mark.parametrize(
    "content", ["a: [1", "a: b: c", "\t- x", "a: !!python/name:os.system", "d: 2026-13-45", b"\xff\xfe\xfd"]
)
def test_a_file_that_is_not_yaml_is_named(tmp_path: Path, content: Any) -> None:
    path = file_of(tmp_path, content)
    said = sentence(load, path)
    assert said.startswith(f"Config file {path} is not valid YAML")
    assert said.endswith(": compare it with manifests/serve_local.yaml.")
    assert "(line 1: " in said or isinstance(content, bytes)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "- 1",
        "text",
        {"applications": None},
        {"applications": []},
        {"applications": [1]},
        {"applications": {"args": {}}},
        {"applications": document()["applications"] * 2},
    ],
)
def test_a_file_has_exactly_one_application(tmp_path: Path, content: Any) -> None:
    assert "must have exactly one entry under applications" in sentence(load, file_of(tmp_path, content))


@pytest.mark.parametrize("path", [None, "", "cluster.app", "somebody.elses:build", 1])
def test_the_application_is_ours(tmp_path: Path, path: Any) -> None:
    content = file_of(tmp_path, document(import_path=path))
    assert sentence(load, content) == "applications[0].import_path must be cluster.app:build."


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ({**document(), "htp_options": {}}, "htp_options"),
        ({**document(), "http_options": {"prot": 1}}, "http_options.prot"),
        ({**document(), "http_options": {"ssl_keyfile": "key.pem"}}, "http_options.ssl_keyfile"),
        (document(deployment=[]), "applications[0].deployment"),
        (document(args={"replicas": {"accelerator": "gpu", "gpus": 1}}), "applications[0].args.replicas.gpus"),
    ],
)
def test_what_would_be_ignored_is_refused_by_name(tmp_path: Path, content: Any, field: str) -> None:
    said = sentence(load, file_of(tmp_path, content))
    assert said.startswith((f"Unknown setting {field}: remove it", f"Unknown setting {field}: did you mean"))


REPLICAS = "AdaptiveLLMServer:smollm2-135m-instruct"


def test_a_number_of_replicas_beside_the_settings_is_the_one_that_counts(tmp_path: Path) -> None:
    content = document(deployments=[{"name": REPLICAS, "num_replicas": 4}])
    assert load(file_of(tmp_path, content)).args.replicas.num_replicas == 4
    assert load(file_of(tmp_path, document(deployments=[]))).args.replicas.num_replicas == 2


@pytest.mark.parametrize(
    ("deployments", "said"),
    [
        (
            [{"name": "AdaptiveLLMServer", "num_replicas": 4}],
            f"applications[0].deployments[0].name must be {REPLICAS}:",
        ),
        (
            [{"name": "AdaptiveIngress", "num_replicas": 4}],
            "deployments[0].name is AdaptiveIngress, by whose number caps are shared: use args.ingress.num_replicas.",
        ),
        ([{"name": REPLICAS, "num_replica": 4}], "deployments[0].num_replica: did you mean num_replicas?"),
        ([{"name": REPLICAS, "num_replicas": 0}], "deployments[0].num_replicas must be at least 1, not 0."),
        ([{"name": REPLICAS}], "deployments[0].num_replicas is missing: add it."),
        ([{"name": REPLICAS, "num_replicas": 1}] * 2, "deployments[1].name stands twice: remove one."),
        ([4], "deployments[0] must be a mapping"),
        ({"name": REPLICAS}, "deployments must be a list"),
    ],
)
def test_a_deployment_that_serve_would_not_find_or_take_is_refused(tmp_path: Path, deployments: Any, said: str) -> None:
    assert said in sentence(load, file_of(tmp_path, document(deployments=deployments)))


def test_a_fixed_number_of_replicas_and_one_by_load_are_not_given_together(tmp_path: Path) -> None:
    args = {"replicas": {"accelerator": "gpu", "autoscaling": {"max_replicas": 3}}}
    content = document(args=args, deployments=[{"name": REPLICAS, "num_replicas": 4}])
    assert "has no meaning with args.replicas.autoscaling" in sentence(load, file_of(tmp_path, content))


def test_the_names_of_deployments_are_those_that_are_built(tmp_path: Path) -> None:
    from ray.llm._internal.serve.core.server.builder import _get_deployment_name

    from cluster.app import make_llm_config  # loads Ray
    from replicas.serve_server import AdaptiveLLMServer

    args = {"replicas": {"accelerator": "gpu"}, "model": {"id": "meta-llama/Llama-3.1-8B", "source": "a/b"}}
    built = f"{AdaptiveLLMServer.__name__}:{_get_deployment_name(make_llm_config(AppArgs.from_mapping(args), None))}"
    load(file_of(tmp_path, document(args=args, deployments=[{"name": built, "num_replicas": 1}])))


@pytest.mark.parametrize("prefix", ["api", "", "/api/", "/{x}"])
def test_a_route_that_serve_would_refuse_is_refused_here(tmp_path: Path, prefix: str) -> None:
    assert "applications[0].route_prefix: it must begin with /" in sentence(
        load, file_of(tmp_path, document(route_prefix=prefix))
    )


def test_where_proxies_run_is_one_of_serves_words(tmp_path: Path) -> None:
    content = {**document(), "proxy_location": "EveryNod"}
    said = "Setting proxy_location must be 'Disabled', 'HeadOnly' or 'EveryNode'."
    assert sentence(load, file_of(tmp_path, content)) == said
    load(file_of(tmp_path, {**document(), "proxy_location": "HeadOnly"}))


@pytest.mark.parametrize("value", [{}, {"method": "ngram"}])
def test_what_engines_are_refused_for_is_refused_with_the_settings(tmp_path: Path, value: Any) -> None:
    args = {"replicas": {"accelerator": "gpu", "engine_kwargs": {"speculative_config": value}}}
    assert "Speculative decoding is not supported: remove speculative_config" in sentence(
        load, file_of(tmp_path, document(args=args))
    )


def test_a_name_that_stands_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    path = file_of(tmp_path, "proxy_location: HeadOnly\nhttp_options:\n  port: 1\n  host: h\n  port: 2\n")
    assert "(port stands in line 3 and again in line 5): remove one." in sentence(load, path)


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ({**document(), "http_options": [8000]}, "http_options"),
        ({**document(), "http_options": "host"}, "http_options"),
        ({**document(), "http_options": {"port": "8000"}}, "port"),
        ({**document(), "http_options": {"port": 0}}, "port"),
        ({**document(), "http_options": {"port": 65536}}, "port"),
        ({**document(), "http_options": {"host": ""}}, "host"),
        ({**document(), "http_options": {"host": None}}, "host"),
        (document(name=1), "name"),
        (document(args=[1]), "applications[0].args"),
        (document(args=None), "replicas"),
    ],
)
def test_a_bad_value_around_the_settings_is_named(tmp_path: Path, content: Any, field: str) -> None:
    assert field in sentence(load, file_of(tmp_path, content))


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3),
    max_leaves=5,
)
SECTIONS = st.sampled_from([*AppArgs.model_fields])
FIELDS = st.sampled_from(
    ["id", "source", "num_replicas", "num_cpus", "engine_kwargs", "policy", "directory", "host_pool_bytes"]
)


def outcome(call: Callable[..., object], *args: Any) -> object:
    """The result, or the sentence instead of it."""
    try:
        return call(*args)
    except ValueError:
        return sentence(call, *args)


@given(st.dictionaries(SECTIONS | st.text(max_size=3), JUNK | st.dictionaries(FIELDS, JUNK, max_size=2), max_size=4))
def test_junk_settings_give_settings_or_one_sentence(mapping: dict[str, Any]) -> None:
    mapping.setdefault("replicas", {"accelerator": "gpu"})
    assert isinstance(outcome(AppArgs.from_mapping, mapping), AppArgs | str)


@given(content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_a_junk_file_gives_settings_or_one_sentence(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = file_of(tmp_path_factory.getbasetemp(), content)
    assert isinstance(outcome(load, path), ServeFile | str)

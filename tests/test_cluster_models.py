"""Goal: a model's name leads to its folder, is refused with the mend, or goes to the hub; nothing is fetched twice.

Method: folders in a temporary home; the two ways of fetching are replaced by ones that write a file or refuse.
"""

import json
import re
import stat
from pathlib import Path
from typing import Any

import pytest

from cluster import models
from cluster.config import DEFAULT_MODEL


def folder_of_model(path: Path, config: Any = None) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"model_type": "llama"} if config is None else config))
    return path


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever fetches fails the test."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("fetched")

    monkeypatch.setattr(models, "_fetch_from_hub", refuse)
    monkeypatch.setattr(models, "_convert_from_wheel", refuse)


# Which folder


def test_the_default_model_is_in_the_home_folder(tmp_path: Path) -> None:
    assert models.local_folder(DEFAULT_MODEL, tmp_path) == tmp_path / "models" / DEFAULT_MODEL


@pytest.mark.parametrize("source", ["meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen2.5-0.5B", "a/b", "0x/m_1.2-x"])
def test_a_hub_id_has_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert models.local_folder(source, tmp_path) is None
    assert models.require(source, tmp_path) is None


def test_a_folder_that_looks_like_a_hub_id_is_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of_model(tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert models.require("owner/name", tmp_path) == folder


@pytest.mark.parametrize("source", ["/nonexistent", "./models/mine", "../mine", "mine", "a/b/c", "a b/c"])
def test_everything_else_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert models.local_folder(source, tmp_path) == Path(source).absolute()


def test_a_tilde_is_the_users_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of_model(tmp_path / "mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models.require("~/mine", Path("/elsewhere")) == folder


# Refusals


def test_a_missing_folder_is_named_with_the_mend(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^Model folder /nonexistent has no config\.json: give a folder [^\n]+ or a hub id\.$"
    ):
        models.require("/nonexistent", tmp_path)


def test_a_folder_without_a_config_is_refused_by_both(tmp_path: Path, said: list[str], no_network: None) -> None:
    (tmp_path / "weights.safetensors").touch()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        models.require(str(tmp_path), tmp_path)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        models.prepare(str(tmp_path), tmp_path, said.append)


def test_the_default_model_must_be_prepared_before_it_is_deployed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not prepared in .*: run `make model`"):
        models.require(DEFAULT_MODEL, tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"llama"'])
def test_a_damaged_config_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(
        ValueError, match=rf"^{re.escape(str(tmp_path))}/config\.json is not a JSON object: fetch the model again\.$"
    ):
        models.read_config(tmp_path)


# Preparing


def test_a_prepared_model_is_there_at_once_and_in_silence(tmp_path: Path, said: list[str], no_network: None) -> None:
    folder = folder_of_model(tmp_path / "models" / DEFAULT_MODEL)
    assert models.prepare(DEFAULT_MODEL, tmp_path, said.append) == folder
    assert said == []


def test_other_models_are_never_fetched_here(tmp_path: Path, said: list[str], no_network: None) -> None:
    assert models.prepare("owner/name", tmp_path, said.append) is None
    folder = folder_of_model(tmp_path / "mine")
    assert models.prepare(str(folder), tmp_path, said.append) == folder
    assert said == []


def from_hub(target: Path, _: models.Say) -> bool:
    folder_of_model(target, {"from": "hub"})
    return True


def no_hub(target: Path, _: models.Say) -> bool:
    return False


def from_wheel(scratch: Path, target: Path, _: models.Say) -> None:
    folder_of_model(target, {"from": "wheel"})


def no_wheel(scratch: Path, target: Path, _: models.Say) -> None:
    target.mkdir()
    (target / "model.safetensors").touch()
    raise ValueError("The default model cannot be fetched.")


@pytest.mark.parametrize(("hub", "origin"), [(from_hub, "hub"), (no_hub, "wheel")])
def test_the_hub_is_asked_first_and_the_wheel_is_the_way_without_it(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch, hub: Any, origin: str
) -> None:
    monkeypatch.setattr(models, "_fetch_from_hub", hub)
    monkeypatch.setattr(models, "_convert_from_wheel", from_wheel)
    home = tmp_path / "home"
    folder = models.prepare(DEFAULT_MODEL, home, said.append)
    assert folder is not None
    assert models.read_config(folder) == {"from": origin}
    assert [each.name for each in folder.parent.iterdir()] == [DEFAULT_MODEL], "something was left behind"
    assert stat.S_IMODE(home.stat().st_mode) == 0o700, "keys will lie there"


def test_a_failed_preparation_leaves_nothing_that_looks_like_a_model(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_fetch_from_hub", no_hub)
    monkeypatch.setattr(models, "_convert_from_wheel", no_wheel)
    with pytest.raises(ValueError, match="cannot be fetched"):
        models.prepare(DEFAULT_MODEL, tmp_path, said.append)
    assert list((tmp_path / "models").iterdir()) == []


def test_the_size_of_the_weights_is_that_of_all_their_files(tmp_path: Path) -> None:
    folder = folder_of_model(tmp_path / "mine")
    for number in (1, 2):
        (folder / f"model-0000{number}-of-00002.safetensors").write_bytes(bytes(1000 * number))
    (folder / "pytorch_model.bin").write_bytes(bytes(5000))
    assert models.weight_bytes(folder) == 3000

"""Goal: on any host where the wheel is installed, engine processes find our scheduler, connector and plugin by name.

Method: build the wheel, install it into an empty folder, and look from a process that knows neither this repository nor its
environment's editable install of it.
"""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("cluster", "replicas", "global_scheduler", "cost_service")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scratch = tmp_path_factory.mktemp("wheel")
    source = scratch / "source"
    source.mkdir()
    for folder in FOLDERS:
        target = source / folder
        target.mkdir()
        for path in (ROOT / folder).glob("*.py"):
            (target / path.name).write_text(path.read_text())
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_text((ROOT / name).read_text())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(scratch), str(source)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (built,) = scratch.glob("*.whl")
    return built


def test_the_wheel_holds_our_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.partition("/")[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(FOLDERS)


def test_a_host_with_only_the_wheel_finds_everything(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    program = f"""
import importlib.metadata, importlib.util, sys
sys.path[:] = [{str(site)!r}] + [path for path in sys.path if path]
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "") + repr(finder)]
for name in ("cluster.app", "replicas.vllm_scheduler", "replicas.vllm_swap", "replicas.serve_server"):
    origin = importlib.util.find_spec(name).origin
    assert origin.startswith({str(site)!r}), origin
(entry,) = {{e.value for e in importlib.metadata.entry_points(group="vllm.general_plugins", name="adaptivellm")}}
assert entry == "replicas.vllm_plugin:register", entry
importlib.import_module("replicas.vllm_plugin").register()
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=elsewhere, timeout=60)

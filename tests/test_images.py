"""Goal: the environment of an image is whole: what the Dockerfile copies and runs gives nodes our packages and Ray.

Method: no image is built; the Dockerfile's sources are copied into an empty folder, and its command for CPU nodes is run.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.bootstrap import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def test_what_the_dockerfile_runs_makes_an_environment_that_serves_without_tools_for_developers(tmp_path: Path) -> None:
    text = (ROOT / "manifests/docker/Dockerfile").read_text()
    for line in re.findall(r"^COPY --chown=\S+ (.+)$", text, re.MULTILINE):
        *sources, _ = line.split()
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, tmp_path / source, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, tmp_path / source)
    (command,) = re.findall(r"^RUN python (cluster/bootstrap.py --image cpu)$", text, re.MULTILINE)
    subprocess.run([sys.executable, *command.split()], cwd=tmp_path, check=True, timeout=1200)
    # As the image does afterwards: what is installed is all that is left.
    for folder in ("cluster", "replicas", "global_scheduler", "cost_service"):
        shutil.rmtree(tmp_path / folder)
    python = tmp_path / ".venv/bin/python"
    code = """
import importlib.util, importlib.metadata
from pathlib import Path
ours = ("cluster.app", "replicas.vllm_scheduler", "global_scheduler.serve_router", "cost_service.cost_actor")
for name in (*ours, "ray", "vllm"):
    origin = importlib.util.find_spec(name).origin
    assert "site-packages" in origin, origin
(entry,) = {e.value for e in importlib.metadata.entry_points(group="vllm.general_plugins", name="adaptivellm")}
assert importlib.util.find_spec("pytest") is None
"""
    subprocess.run([python, "-c", code], cwd=tmp_path / "manifests", check=True, timeout=120)
    for words in (["ray", "--version"], ["python", "-m", "cluster", "check", "serve_local.yaml"]):
        program = tmp_path / ".venv/bin" / words[0]
        done = subprocess.run(
            [program, *words[1:]], cwd=tmp_path / "manifests", capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr

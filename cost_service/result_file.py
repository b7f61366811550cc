"""The file that `--json` names: whether it can be written, and how it is.

Rules:
- It is checked before any work, so that nothing is done whose result has no place.
- `-` is standard output, where a command says so.
"""

import json
import os
from pathlib import Path

STANDARD_OUTPUT = "-"


def check_json_file(path: Path | None) -> None:
    """Refuse a result file that cannot be written.

    Raises:
        ValueError: It is a folder, or in none that exists, or may not be written.
    """
    if path is None or str(path) == STANDARD_OUTPUT:
        return
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"--json {path} must be a file in a folder that exists: make the folder or name another file.")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise ValueError(f"--json {path} may not be written: name another file.")


def write_json(result: object, path: Path) -> None:
    """Write a result.

    Raises:
        OSError: It cannot be written.
    """
    text = json.dumps(result, indent=2)
    if str(path) == STANDARD_OUTPUT:
        print(text)
    else:
        path.write_text(text + "\n")

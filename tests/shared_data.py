"""Public traces and profiles, which are not part of the repository: where they are looked for; without them tests skip."""

import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("ADAPTIVELLM_DATA", Path(__file__).parents[2] / "shared" / "data"))

needs_data = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="the public data is not here: set ADAPTIVELLM_DATA to its folder"
)

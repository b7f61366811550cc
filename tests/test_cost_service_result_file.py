"""Goal: a result has its place before anything is done for it, and what is written can be read back."""

import json
from pathlib import Path

import pytest

from cost_service.result_file import check_json_file, write_json


def test_a_file_in_a_folder_that_exists_is_fine(tmp_path: Path) -> None:
    check_json_file(tmp_path / "new.json")
    check_json_file(None)
    check_json_file(Path("-"))


def test_a_file_without_a_folder_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none" / "a.json", tmp_path):
        with pytest.raises(ValueError, match="must be a file in a folder that exists"):
            check_json_file(path)


def test_what_is_written_can_be_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json({"a": [1, None]}, tmp_path / "a.json")
    write_json({"a": [1, None]}, Path("-"))
    assert json.loads((tmp_path / "a.json").read_text()) == json.loads(capsys.readouterr().out) == {"a": [1, None]}

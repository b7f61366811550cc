"""Goal: a benchmark that was stopped goes on where it was, and never with the parts of another one."""

from pathlib import Path

import pytest

from cluster.bench_progress import Progress

PLAN = {"policies": ["stock", "swap"], "seed": 1}


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    path, calls = tmp_path / "parts", list[str]()

    def work(name: str) -> dict[str, float]:
        calls.append(name)
        return {"seconds": 1.5}

    first = Progress(path, PLAN)
    assert first.part("a", lambda: work("a")) == {"seconds": 1.5}
    again = Progress(path, PLAN)
    assert again.has("a")
    assert not again.has("b")
    assert again.part("a", lambda: work("a")) == {"seconds": 1.5}
    again.part("b", lambda: work("b"))
    assert calls == ["a", "b"]
    assert Progress(path, PLAN).num_parts == 2


def test_a_part_that_was_cut_off_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / "parts"
    Progress(path, PLAN).part("a", lambda: 1)
    path.write_text(path.read_text() + '{"b": [1, 2')
    cut = Progress(path, PLAN)
    assert (cut.has("a"), cut.has("b")) == (True, False)
    cut.part("b", lambda: 2)
    assert Progress(path, PLAN).part("b", lambda: 3) == 2


@pytest.mark.parametrize("content", ["no json\n", '{"plan": "another"}\n'])
def test_parts_of_another_benchmark_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "parts"
    path.write_text(content)
    with pytest.raises(ValueError, match="parts of another benchmark: remove it"):
        Progress(path, PLAN)


def test_a_finished_benchmark_leaves_no_parts(tmp_path: Path) -> None:
    path = tmp_path / "parts"
    progress = Progress(path, PLAN)
    progress.part("a", lambda: 1)
    progress.remove()
    assert not path.exists()


def test_without_a_file_parts_are_kept_in_memory() -> None:
    progress = Progress(None, PLAN)
    assert [progress.part("a", lambda: 1), progress.part("a", lambda: 2)] == [1, 1]
    progress.remove()

"""Goal: a decision log says everything that a decision hung on, so that the same policies decide the same again.

Method: random choices of every policy through a preemptor that logs, replayed; lines changed, lost and broken.
"""

import json
import random
import stat
from pathlib import Path

import pytest

from cluster.__main__ import main
from replicas import decision_log
from replicas.config import PreemptionPolicy
from replicas.decision_log import DecisionLog, replay
from replicas.guard import GuardSettings
from replicas.preemptor import Preemptor
from tests.test_replicas_preemption import COSTS, candidate, pressure


def logged(folder: Path, *, num_choices: int = 200, seed: int = 0) -> Path:
    """The log of choices by every policy, half of them of vLLM's own victims."""
    rng = random.Random(seed)
    log = DecisionLog(folder, "engine")
    preemptor = Preemptor(PreemptionPolicy.ADAPTIVE, COSTS, guard=GuardSettings(), record=log.write)
    for number in range(num_choices):
        preemptor.follow(rng.choice(list(PreemptionPolicy)))
        running = [
            candidate(
                f"r{index}", rng.randint(1, 600), num_host_blocks=rng.randint(0, 3), service=rng.random(),
                num_preemptions=rng.randint(0, 4), num_remaining_tokens=rng.randint(1, 100), tenant=rng.choice("ab"),
            )
            for index in range(rng.randint(2, 20))
        ]  # fmt: skip
        around = pressure(num_needed_blocks=rng.randint(1, 40), out_queue_s=rng.random(), resume_wait_s=rng.random())
        if number % 2:
            preemptor.choose(running, around)
        else:
            preemptor.decide(running[-1], around)
    log.close()
    return log.path


def test_every_decision_is_reproduced(tmp_path: Path) -> None:
    path = logged(tmp_path)
    result = replay(path.read_bytes().splitlines())
    assert (result.num_choices, result.differing_lines) == (200, [])
    assert result.num_decisions > 200


def test_a_decision_that_the_policy_would_not_take_is_found_by_its_line(tmp_path: Path) -> None:
    lines = logged(tmp_path).read_bytes().splitlines()
    entry = json.loads(lines[7])
    (first, *_) = entry["decisions"]
    first["action"] = "recompute" if first["action"] == "swap" else "swap"
    lines[7] = json.dumps(entry).encode()
    assert replay(lines).differing_lines == [8]


def test_costs_are_written_once_and_again_when_they_change(tmp_path: Path) -> None:
    lines = logged(tmp_path).read_bytes().splitlines()
    assert [json.loads(line)["type"] for line in lines] == ["costs"] + ["choice"] * 200


def test_the_log_is_its_owners_alone_and_never_overwrites_another(tmp_path: Path) -> None:
    path = logged(tmp_path / "new" / "folder", num_choices=2)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    with pytest.raises(ValueError, match="decision_log_folder must be a folder that can be written to: File exists"):
        DecisionLog(path.parent, "engine")


def test_a_full_log_counts_what_it_does_not_take_and_stays_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decision_log, "MAX_BYTES", 2000)
    log = DecisionLog(tmp_path, "engine")
    preemptor = Preemptor(PreemptionPolicy.SWAP, COSTS, record=log.write)
    for _ in range(50):
        preemptor.decide(candidate("a", 100), pressure())
    log.close()
    result = replay(log.path.read_bytes().splitlines())
    assert result.num_choices + log.num_dropped == 50
    assert min(result.num_choices, log.num_dropped) > 0


def test_the_command_says_how_many_were_reproduced_and_refuses_what_is_no_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = logged(tmp_path, num_choices=20)
    assert main(["replay", str(path)]) == 0
    assert "in 20 choices, 0 differ." in capsys.readouterr().out
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join(lines[1:]))
    assert main(["replay", str(path)]) == 2
    assert "the beginning of the log is missing" in capsys.readouterr().err
    path.write_bytes(b"\n".join([*lines[:5], lines[5][:40]]))
    assert main(["replay", str(path)]) == 2
    assert "Line 6 must be one of a decision log" in capsys.readouterr().err
    assert main(["replay", str(tmp_path / "none")]) == 2
    entry = json.loads(lines[3])
    entry["decisions"][0]["num_blocks"] += 1
    path.write_bytes(b"\n".join([*lines[:3], json.dumps(entry).encode()]))
    assert main(["replay", str(path)]) == 1

"""Goal: what is learned from profiles predicts what it was not fitted on, and the commands say how well.

Method: profiles made from known physics with noise; the public profiles where they are at hand; the commands as a user runs
them.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cost_service.__main__ import main
from cost_service.attention_time import AttentionShape, AttentionTime, AttentionWork
from cost_service.operator_time import OperatorTime, fit_roofline
from cost_service.operators import MATMUL, Batch, Operator
from cost_service.profiles import load_profiles
from cost_service.residual import Residual
from cost_service.snapshot import CostSnapshot
from cost_service.step_time import MeasuredModel, StepTime
from tests.model_configs import CONFIGS
from tests.shared_data import needs_data


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cost_service", *arguments], capture_output=True, text=True, timeout=300, check=False
    )  # fmt: skip


def made_up_profile(folder: Path, name: str, *, seed: int = 0, ranks: int = 1) -> Path:
    """A profile of a GPU of 100 blocks at once, 1 TB/s and 100 TFLOP/s, with two percent of noise."""
    from cost_service.model_shape import ModelShape
    from cost_service.operators import dense_operators

    rng = np.random.default_rng(seed)
    target = folder / "MADEUP1" / name / f"tp{ranks}"
    target.mkdir(parents=True)
    (target.parent / "config.json").write_text(json.dumps(CONFIGS[name]))
    shape = ModelShape.from_config(CONFIGS[name])
    lines = ["layer,tokens,time_us"]
    for one in dense_operators(shape, parallelism=ranks):
        if one.family == "collective":
            continue
        for tokens in (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048):
            work = max(one.row_flops * tokens / 1e14, one.bytes_moved(np.array([tokens]))[0] / 1e12)
            lines.append(f"{one.name},{tokens},{1e6 * (3e-6 + work) * np.exp(0.02 * rng.standard_normal()):.4f}")
    (target / "dense.csv").write_text("\n".join(lines) + "\n")
    lines = ["prefill_chunk,kv_prefill,n_decode,kv_decode,time_us"]
    for chunk in (0, 16, 128, 512, 2048):
        for cached in (0, 512, 4096, 16384) if chunk else (0,):
            for decodes in (0, 1, 8, 64):
                for context in (64, 512, 4096, 16384) if decodes else (0,):
                    if chunk or decodes:
                        heads = 32 if chunk else CONFIGS[name]["num_key_value_heads"]
                        walked = heads * (-(-chunk // 64) * (cached + chunk / 2) + decodes * context)
                        kv_bytes = (cached + chunk + decodes * context) * CONFIGS[name]["num_key_value_heads"] * 512
                        seconds = 4e-6 + max(2e-8 * max(cached + chunk, context, walked / 100), kv_bytes / 1e12)
                        lines.append(f"{chunk},{cached},{decodes},{context},{1e6 * seconds:.4f}")
    (target / "attention.csv").write_text("\n".join(lines) + "\n")
    return target.parent


def test_a_roofline_is_found_again() -> None:
    flops, moved = np.geomspace(1e9, 1e13, 60), np.geomspace(1e8, 1e9, 60)
    found = fit_roofline(flops, moved, 5e-6 + np.maximum(flops / 2e14, moved / 2e12))
    assert found.flops_per_s == pytest.approx(2e14, rel=0.1)
    assert found.bytes_per_s == pytest.approx(2e12, rel=0.15)
    assert found.launch_s == pytest.approx(5e-6, rel=0.3)


def test_an_operator_of_another_shape_takes_the_roofline_of_its_family() -> None:
    def matmul(name: str, width: float) -> Operator:
        return Operator(
            name=name, family=MATMUL, calls=1, row_flops=2 * width**2, row_bytes=4 * width, weight_bytes=2 * width**2
        )

    rows = np.array([1.0, 8.0, 64.0, 256.0, 1024.0, 4096.0])

    def seconds(one: Operator) -> np.ndarray:
        return 4e-6 + np.maximum(one.flops(rows) / 2e14, one.bytes_moved(rows) / 2e12)

    known = [matmul("qkv_proj", 2048.0), matmul("o_proj", 4096.0), matmul("down_proj", 8192.0)]
    times = OperatorTime()
    times.fit([(one, rows, seconds(one)) for one in known])
    other = matmul("router", 5000.0)
    assert times.predict(other, rows).seconds == pytest.approx(seconds(other), rel=0.25)


def test_attention_beyond_the_fitted_contexts_follows_the_physics_and_is_less_sure() -> None:
    shape = AttentionShape(num_heads=32, num_kv_heads=8, head_size=128)

    def decodes(contexts: np.ndarray) -> AttentionWork:
        zero = np.zeros(len(contexts))
        return AttentionWork.of_grid(
            prefill_tokens=zero, cached_tokens=zero, num_decodes=zero + 16, decode_tokens=contexts
        )

    def seconds(contexts: np.ndarray) -> np.ndarray:
        return 5e-6 + 16 * contexts * 4096 / 1e12

    near, far = np.geomspace(64, 4096, 60), np.array([16384.0, 65536.0])
    times = AttentionTime()
    times.fit([(shape, decodes(near), seconds(near))])
    estimate = times.predict(shape, decodes(far))
    assert estimate.seconds == pytest.approx(seconds(far), rel=0.15)
    widths = estimate.high_s / estimate.low_s
    assert widths[1] > widths[0] > (lambda e: e.high_s / e.low_s)(times.predict(shape, decodes(near[-1:])))[0]


def test_a_batch_is_the_work_of_its_requests() -> None:
    batch = AttentionWork.of_batch([(100, 50), (64, 0)], [10, 300])
    assert batch.num_decodes.tolist() == [2.0]
    assert batch.decode_walked.tolist() == [310.0]
    assert batch.decode_longest.tolist() == [300.0]
    assert batch.prefill_longest.tolist() == [150.0]
    assert batch.prefill_kv_tokens.tolist() == [214.0]
    assert AttentionWork.of_batch([], [7]).prefill_longest.tolist() == [0.0]


def test_intervals_hold_nine_of_ten_rows_that_were_not_fitted() -> None:
    rng = np.random.default_rng(0)
    features = rng.uniform(0, 5, (900, 2))
    seconds = np.exp(0.1 * rng.standard_normal(900) + 0.3 * (features[:, 0] > 2))
    residual = Residual()
    residual.fit(features[:600], np.ones(600), seconds[:600])
    estimate = residual.estimate(features[600:], np.ones(300))
    inside = (estimate.low_s <= seconds[600:]) & (seconds[600:] <= estimate.high_s)
    assert 0.82 < inside.mean() < 0.97


@pytest.mark.parametrize("seconds", [np.zeros(0), np.array([1.0, np.nan]), np.array([1.0, 0.0])])
def test_nothing_is_learned_from_times_that_are_none(seconds: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"calibrate first|finite and above 0"):
        Residual().fit(np.ones((len(seconds), 1)), np.ones(len(seconds)), seconds)


def test_a_model_that_was_never_measured_is_predicted_from_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fitted = made_up_profile(tmp_path, "llama-3.1-8b")
    judged = made_up_profile(tmp_path, "llama-2-7b", seed=1)
    result, picture = tmp_path / "result.json", tmp_path / "picture.svg"
    arguments = [
        "evaluate",
        "--profile",
        str(judged),
        "--fit-on",
        str(fitted),
        "--json",
        str(result),
        "--plot",
        str(picture),
    ]
    assert main(arguments) == 0
    figures = json.loads(result.read_text())["figures"]
    assert set(figures) == {"dense_transfer", "attention_transfer", "step_time"}
    assert figures["step_time"]["mean_error"] < 0.15
    assert figures["step_time"]["reached"] is True
    assert "step_time" in capsys.readouterr().out
    assert picture.read_text().lstrip().startswith("<?xml")


def test_steps_of_a_batch_grow_with_it(tmp_path: Path) -> None:
    models = [MeasuredModel.of(profile) for profile in load_profiles(made_up_profile(tmp_path, "llama-3.1-8b"))]
    times = StepTime()
    times.fit(models)
    shape = models[0].shape
    batches = (
        Batch(decodes=(1000,) * 16), Batch(decodes=(1000,) * 64), Batch(prefills=((512, 0),), decodes=(1000,) * 64),
        Batch(prefills=((2048, 0),), decodes=(1000,) * 64), Batch(prefills=((2048, 8192),), decodes=(1000,) * 64),
    )  # fmt: skip
    seconds = [times.predict(shape, batch).seconds[0] for batch in batches]
    assert seconds == sorted(seconds)
    split, whole = times.predict(shape, batches[0], parallelism=8), times.predict(shape, batches[0])
    assert split.seconds[0] < whole.seconds[0]


def test_fit_writes_snapshots_that_engines_read(tmp_path: Path) -> None:
    folder = made_up_profile(tmp_path, "llama-3.1-8b")
    result = tmp_path / "snapshots.json"
    assert main(["fit", "--profile", str(folder), "--json", str(result)]) == 0
    (document,) = json.loads(result.read_text())["snapshots"].values()
    snapshot = CostSnapshot.from_json(json.dumps(document))
    assert snapshot.version == 1
    assert snapshot.token_s == pytest.approx(2 * 7.5e9 / 1e14, rel=0.5)  # 100 TFLOP/s


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "--profile", "/nowhere"], "/nowhere is no folder"),
        (["evaluate", "--profile", ".", "--fit-on", ".", "--holdout", "tokens > 3"], "has no profile|--holdout splits"),
        (["fit", "--profile", "/nowhere"], "is no folder"),
        (["evaluate", "--profile", ".", "--plot", "/nowhere/a.svg"], "--plot"),
        (["fit", "--datasheet", "H100", "--model-config", "/nowhere/a.json"], "/nowhere/a.json"),
    ],
)
def test_a_wrong_option_is_one_sentence_and_status_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.match(f"Error: .*({message}).*\n$", printed.err)


def test_a_holdout_that_leaves_nothing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made_up_profile(tmp_path, "llama-3.1-8b")
    for expression in ("tokens > 99999", "context >= 0", "heads > 3"):
        assert main(["evaluate", "--profile", str(folder), "--holdout", expression]) == 2
        assert "holds out no row, or all" in capsys.readouterr().err
    assert main(["evaluate", "--profile", str(folder), "--holdout", "tokens == 64"]) == 0
    assert "dense_holdout" in capsys.readouterr().out


@needs_data
def test_the_public_profiles_are_predicted_as_well_as_is_asked(data: Path, tmp_path: Path) -> None:
    profiles = data / "vllm_profiles" / "RTXPRO6000"
    judged, fitted = ["--profile", str(profiles / "Qwen")], ["--fit-on", str(profiles / "meta-llama")]
    for name, arguments in (("split", judged), ("transfer", judged + fitted)):
        answer = command("evaluate", *arguments, "--json", str(tmp_path / name))
        assert answer.returncode == 0, answer.stderr
    reports = [json.loads((tmp_path / name).read_text())["figures"] for name in ("split", "transfer")]
    figures = reports[0] | reports[1]
    asked = {name: one["reached"] for name, one in figures.items() if "asked" in one}
    assert asked == dict.fromkeys(
        ["attention_random", "attention_long_context", "dense_every_third", "step_time"], True
    )
    assert figures["attention_uneven"]["mean_error"] < 0.1
    assert figures["attention_random"]["interval_coverage"] > 0.8

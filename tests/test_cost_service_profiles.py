"""Goal: profiles are read from the layouts that profilers write, and what is wrong in one is named with file and line.

Method: small tables written by the tests; the public profiles where they are at hand.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from cost_service.profiles import load_profiles
from tests.model_configs import CONFIGS
from tests.shared_data import needs_data

GRID = "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us"
DENSE = "layer,tokens,time_us\nqkv_proj,1,10.0\nqkv_proj,4,12.0\nqkv_proj,1,14.0\nlayernorm,1,2.0\nnew_op,1,3.0\n"
ATTENTION = f"{GRID}\n16,64,0,0,8.0\n0,0,4,128,9.0\n16,0,2,32,10.0\n"


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(tmp_path / "RTX4090" / "llama", config__json=json.dumps(CONFIGS["llama-2-7b"]))


def test_a_vllm_profile_is_read_with_repetitions_as_medians(model: Path) -> None:
    folder = write(
        model / "bf16" / "tp2",
        dense__csv=DENSE,
        attention__csv=ATTENTION,
        per_sequence__csv="layer,sequences,time_us\nlm_head,2,70\n",
    )
    (profile,) = load_profiles(folder)
    assert (profile.hardware, profile.model, profile.parallelism) == ("RTX4090", "llama", 2)
    tokens, seconds = profile.operators["qkv_proj"]
    assert tokens.tolist() == [1.0, 4.0]
    assert seconds == pytest.approx([12e-6, 12e-6])
    assert profile.operators["lm_head"][1] == pytest.approx([70e-6])
    rows = profile.attention
    assert rows is not None
    assert rows.seconds == pytest.approx([8e-6, 9e-6, 10e-6])
    assert rows.context.tolist() == [64.0, 128.0, 32.0]


def test_operators_that_no_model_has_are_left_out_and_said(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    (profile,) = load_profiles(write(model / "tp1", dense__csv=DENSE))
    assert "new_op" not in profile.operators
    assert "they are left out: new_op" in caplog.text


def test_decodes_of_uneven_length_are_read_beside_the_even_ones(model: Path) -> None:
    header = "regime,n,nb,ratio,skew,pc,kp,kvs,kv_big,kv_mean,t_mean_us,t_max_us,t_skew_us,alpha"
    skew = f"{header}\nmixed,4,1,0.25,4,16,0,128,512,224,5,9,8,0.7\n"
    write(model, meta__yaml="measurement_iterations: 2\nhardware: RTX5090\n")
    (profile,) = load_profiles(write(model / "tp1", attention__csv=ATTENTION, skew__csv=skew))
    assert profile.hardware == "RTX5090"
    rows = profile.uneven
    assert rows is not None
    assert (rows.decode_tokens[-1], rows.longest_decode[-1], rows.num_decodes[-1]) == (224.0, 512.0, 4.0)
    assert rows.seconds[-1] == pytest.approx(4e-6)  # a sum over both iterations


def test_older_profiles_have_parts_that_add_up_and_tokens_of_whole_batches(model: Path) -> None:
    layers = "layer_name,input,kv_cache,tp_size,latency(ns)\n" + "".join(
        f"{name},{n},0,4,{ns}\n"
        for n in (1, 2)
        for name, ns in (
            ("q_proj", 3000),
            ("k_proj", 1000),
            ("v_proj", 1000),
            ("input_layernorm", 10),
            ("post_layernorm", 30),
        )
    )
    header = (
        "time_stats.attn_prefill.median,time_stats.attn_decode.median,num_tensor_parallel_workers,batch_size,"
        "prefill_chunk_size,kv_cache_size,is_prefill"
    )
    attention = f"{header}\n0.005,,4,1,32,96,True\n,0.009,4,8,0,4096,False\n,0.002,4,64,0,32,False\n"
    (profile,) = load_profiles(write(model / "old", layers__csv=layers, attention__csv=attention))
    assert profile.parallelism == 4
    assert profile.operators["qkv_proj"][1] == pytest.approx([5e-6, 5e-6])
    assert profile.operators["layernorm"][1] == pytest.approx([20e-9, 20e-9])  # the same kernel at two places
    rows = profile.attention
    assert rows is not None
    assert rows.decode_tokens.tolist() == [0.0, 512.0]  # 4,096 tokens of 8 requests; 32 of 64 are none at all
    assert rows.seconds == pytest.approx([5e-6, 9e-6])


def test_a_vidur_profile_has_every_width(tmp_path: Path) -> None:
    header = "time_stats.emb.median,time_stats.mlp_up_proj.median,num_tokens,num_tensor_parallel_workers"
    table = f"{header}\n0.1,2.0,8,1\n0.1,1.0,8,2\n"
    folder = write(tmp_path / "A100_Llama", mlp__csv=table, config__json=json.dumps(CONFIGS["llama-2-7b"]))
    one, two = load_profiles(folder)
    assert (one.hardware, one.parallelism, two.parallelism) == ("A100", 1, 2)
    assert two.operators["gate_up_proj"][1] == pytest.approx([1e-3])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no profile: it needs a dense.csv"),
        ({"dense__csv": "layer,tokens\nqkv_proj,1\n"}, "dense.csv has no column 'time_us'"),
        ({"dense__csv": "layer,tokens,time_us\nqkv_proj,1,fast\n"}, "time_us in line 2 of .*dense.csv must be a number"),
        ({"dense__csv": "layer,tokens,time_us\nqkv_proj,1,1.0\nqkv_proj,-2,1.0\n"}, "tokens in line 3 of"),
        ({"dense__csv": "layer,tokens,time_us\nqkv_proj,1\n"}, "time_us in line 2 of"),
        ({"dense__csv": "layer,tokens,time_us\nqkv_proj,1,0\n"}, "The times of qkv_proj in .* must be above 0"),
        ({"attention__csv": "prefill_chunk,kv_prefill,n_decode,time_us\n1,1,1,1\n"}, "has no column 'kv_decode'"),
        ({"attention__csv": f"{GRID}\n1,1,1,nan,1\n"}, "kv_decode in line 2"),
        ({"attention__csv": f"{GRID}\n"}, "times in .*attention.csv must be above 0"),
        ({"layers__csv": "layer_name,input,tp_size,latency(ns)\no_proj,1,1,5\no_proj,1,2,5\n"}, "must hold one tp_size"),
        ({"mlp__csv": "time_stats.emb.median,num_tokens\n1,1\n"}, "mlp.csv has no column 'num_tensor_parallel_workers'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(model: Path, files: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_profiles(write(model / "tp1", **files))


def test_a_folder_that_is_none_and_a_model_without_config_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no folder: give the folder of a profile"):
        load_profiles(tmp_path / "nowhere")
    folder = write(tmp_path / "deep" / "er" / "and" / "deeper", dense__csv=DENSE)
    with pytest.raises(ValueError, match=r"has no config\.json of its model"):
        load_profiles(folder)
    broken = write(tmp_path / "other", config__json="{")
    with pytest.raises(ValueError, match=r"config\.json must be JSON"):
        load_profiles(folder, model_config=broken / "config.json")


@needs_data
def test_every_public_profile_is_read(data: Path) -> None:
    profiles = [profile for name in ("vllm_profiles", "vidur") for profile in load_profiles(data / name)]
    assert {profile.hardware for profile in profiles} == {"RTXPRO6000", "H100", "A100"}
    assert sum(profile.attention is not None for profile in profiles) == 5
    for profile in profiles:
        for operator, (tokens, seconds) in profile.operators.items():
            assert np.all(np.diff(tokens) > 0), operator
            assert len(tokens) == len(seconds)

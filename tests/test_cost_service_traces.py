"""Goal: traces of every source are read alike, and what is wrong in one is named with file, line and field.

Method: small files written by the tests; the public traces where they are at hand.
"""

import time
from collections import Counter
from pathlib import Path

import pytest

from cost_service.traces import BadLineError, TraceRequest, load_trace, read_trace
from tests.shared_data import needs_data

CSV = "arrival_s,tenant,prompt_tokens,output_tokens\n"
MOONCAKE = '{"timestamp": 0, "input_length": %s, "output_length": %s, "hash_ids": %s}'

FILES = {
    "azure": ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n"
              "2023-11-16 18:15:46.0000000,10,20\n2023-11-16 18:15:50.5000000,30,40\n"),
    "mooncake": ("m.jsonl", '{"timestamp": 500, "input_length": 10, "output_length": 20, "hash_ids": [1]}\n'
                 '{"timestamp": 5000, "input_length": 30, "output_length": 40}\n'),
    "servegen": ("s.csv", "arrival_s,client,input_tokens,output_tokens\n1.0,7,10,20\n5.5,8,30,40\n"),
    "vtc": ("v.csv", "req_id,client,prompt_len,output_len,req_time_s\n0,7,10,20,0.0\n1,8,30,40,4.5\n"),
    "csv": ("c.csv", "arrival_s,tenant,prompt_tokens,output_tokens\n0,7,10,20\n4.5,8,30,40\n"),
}  # fmt: skip


@pytest.mark.parametrize("given", ["file", "folder"])
@pytest.mark.parametrize("source", FILES)
def test_every_source_gives_the_same_requests_in_order(source: str, given: str, tmp_path: Path) -> None:
    name, text = FILES[source]
    (tmp_path / name).write_text(text)
    (tmp_path / "README.md").write_text("not a trace")
    requests = load_trace(f"{source}:{tmp_path / name if given == 'file' else tmp_path}")
    hashes = (1,) if source == "mooncake" else ()
    tenants = ("", "") if source in ("azure", "mooncake") else ("7", "8")
    assert requests == [
        TraceRequest(arrival_s=0.0, tenant=tenants[0], prompt_tokens=10, output_tokens=20, prefix_hashes=hashes),
        TraceRequest(arrival_s=4.5, tenant=tenants[1], prompt_tokens=30, output_tokens=40),
    ]


@pytest.mark.parametrize(
    ("source", "text", "message"),
    [
        ("csv", "arrival_s,tenant,prompt_tokens\n1,a,2\n", "Line 1 of .* has no output_tokens"),
        ("csv", "arrival_s,prompt_tokens,output_tokens\n1,2,3\n", "Line 1 of .* has no tenant"),
        ("csv", "arrival_s,tenant,prompt_tokens,output_tokens\n1,a,2,3\n2,a,-2,3\n", "prompt_tokens in line 3 of"),
        ("csv", "arrival_s,tenant,prompt_tokens,output_tokens\nsoon,a,2,3\n", "arrival_s in line 2 of"),
        ("csv", "arrival_s,tenant,prompt_tokens,output_tokens\nnan,a,2,3\n", "arrival_s in line 2 of"),
        ("csv", "arrival_s,tenant,prompt_tokens,output_tokens\n", "has no request"),
        ("azure", "TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,2\n", "TIMESTAMP in line 2 of"),
        ("csv", CSV + "1,a,2\n", "Line 2 of .* has no output_tokens"),
        ("csv", CSV + "1,a,2,3,4\n", "Line 2 of .* has more values"),
        ("csv", CSV + "1,,2,3\n", "tenant in line 2 of .* must not be empty"),
        ("csv", CSV + "1,a,2.5,3\n", "prompt_tokens in line 2 of .* must be a whole number"),
        ("csv", CSV + "1,a,inf,3\n", "prompt_tokens in line 2 of"),
        ("csv", CSV + "1,a,2,1e300\n", "output_tokens in line 2 of .* must be at most 16777216"),
        ("csv", CSV + "1,a,2,0\n", "output_tokens in line 2 of .* must be above 0"),
        ("csv", CSV + "1,a,0,2\n", "prompt_tokens in line 2 of .* must be above 0"),
        ("csv", CSV + "5,a,1,2\n4,a,1,2\n", "arrival_s in line 3 of .* is earlier than above: sort it"),
        ("csv", CSV + "-1,a,1,2\n", "arrival_s in line 2 of .* must be a number and not negative"),
        (
            "csv",
            CSV.replace("tenant", "tenant,user") + "1,a,b,2,3\n",
            "Line 1 of .* unknown 'user': known are arrival_s",
        ),
        ("csv", "", "Line 1 of .* has no arrival_s"),
        ("mooncake", MOONCAKE % ("true", 2, []), "input_length in line 1 of"),
        ("mooncake", MOONCAKE % (1, 2, [-1]), "hash_ids in line 1 of .* must be a list of whole numbers"),
        ("mooncake", MOONCAKE % (1, 2, 3), "hash_ids in line 1 of"),
        ("mooncake", "[" * 100_000, "Line 1 of .* must be a JSON object"),
        ("mooncake", "{\n", "Line 1 of .* must be a JSON object"),
        ("mooncake", "[1]\n", "must be a JSON object"),
    ],
)
def test_what_is_wrong_is_named(source: str, text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / ("t.jsonl" if source == "mooncake" else "t.csv")
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_trace(f"{source}:{path}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nosuch:x", "must be SOURCE:PATH with a source of azure"),
        ("csv", "must be SOURCE:PATH"),
        ("csv:", "must be SOURCE:PATH"),
        ("csv:/nowhere/at/all", "is neither file nor folder"),
        ("csv:.", "has 0 traces of that kind"),
    ],
)
def test_a_source_that_is_none_is_refused(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_trace(source)


@needs_data
def test_every_public_trace_is_read(data: Path) -> None:
    num = {
        "azure:azure_llm_2023": 19366, "mooncake:mooncake": 12031, "vtc:vtc_arena": 1500,
        "servegen:servegen/sampled_deepseek-r1_1h_4rps.csv": 16610,
    }  # fmt: skip
    for source, count in num.items():
        name, _, path = source.partition(":")
        requests = load_trace(f"{name}:{data / path}")
        assert len(requests) == count
        assert requests[0].arrival_s == 0.0
        assert all(bool(request.prefix_hashes) == (name == "mooncake") for request in requests)


BAD_LINES = {
    "2,a,soon,3": "value", "2,a,2.5,3": "value", "2,,2,3": "value", "2,a,-2,3": "negative", "-2,a,2,3": "negative",
    "2,a,2,0": "zero length", "0,a,2,3": "order", "2,a,2": "columns", "2,a,2,3,4": "columns",
}  # fmt: skip


def test_wrong_lines_can_be_left_out_and_are_counted_by_reason(tmp_path: Path) -> None:
    good = ["1,a,2,3", "3,b,4,5"]
    path = tmp_path / "t.csv"
    path.write_text(CSV + "\n".join([good[0], *BAD_LINES, good[1]]) + "\n")
    dropped = Counter[str]()
    requests = list(read_trace(f"csv:{path}", dropped))
    assert [(one.arrival_s, one.tenant, one.line) for one in requests] == [(0.0, "a", 2), (2.0, "b", 12)]
    assert dropped == Counter(BAD_LINES.values())


@pytest.mark.parametrize("line", BAD_LINES)
def test_each_of_them_stops_who_does_not_leave_it_out(line: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(CSV + f"1,a,2,3\n{line}\n")
    with pytest.raises(BadLineError, match=r"ine 3 of .*t\.csv") as error:
        load_trace(f"csv:{path}")
    assert error.value.reason == BAD_LINES[line]


def test_wrong_lines_of_json_can_be_left_out_too(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    lines = ["{", "[1]", MOONCAKE % (1, 2, [-1]), MOONCAKE % (0, 2, []), MOONCAKE % (1, 2, [7])]
    path.write_text("\n".join(lines) + "\n")
    dropped = Counter[str]()
    (request,) = read_trace(f"mooncake:{path}", dropped)
    assert (request.prefix_hashes, request.line) == ((7,), 5)
    assert dropped == {"columns": 2, "value": 1, "zero length": 1}


def test_a_missing_column_is_not_left_out_but_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("arrival_s,tenant\n1,a\n")
    with pytest.raises(ValueError, match=r"Line 1 of .* has no prompt_tokens"):
        list(read_trace(f"csv:{path}", Counter()))


def test_a_trace_of_wrong_lines_alone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(CSV + "1,a,0,1\n")
    with pytest.raises(ValueError, match="has no request"):
        list(read_trace(f"csv:{path}", Counter()))


def test_a_trace_is_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(CSV + "1,a,2,3\nthis is wrong\n")
    requests = read_trace(f"csv:{path}")
    assert next(requests).prompt_tokens == 2
    with pytest.raises(ValueError, match="Line 3"):
        next(requests)


def test_a_folder_of_several_traces_is_not_guessed_from(tmp_path: Path) -> None:
    for name in ("one.csv", "two.csv"):
        (tmp_path / name).write_text(CSV + "0,a,1,1\n")
    (tmp_path / "other.csv").write_text("policy," + CSV + "FCFS,0,a,1,1\n")
    with pytest.raises(ValueError, match=r"has 2 traces of that kind, one\.csv, two\.csv: give the file"):
        load_trace(f"csv:{tmp_path}")


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"t\.csv is no text"):
        load_trace(f"csv:{tmp_path / 't.csv'}")


def test_an_instant_without_a_zone_is_not_local_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In New York the hour from 1 to 2 came twice that night."""
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        path = tmp_path / "a.csv"
        path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-05 00:30:00,1,1\n2023-11-05 02:30:00,1,1\n")
        assert load_trace(f"azure:{path}")[1].arrival_s == 7200.0
    finally:
        monkeypatch.undo()
        time.tzset()

"""Goal: what a user does with `make serve` works, and nothing a client sends makes it fail.

Method: one real cluster for the file, started by the command itself on free ports (two replicas of the default model), used
over HTTP, by the openai client and by `python -m cluster status`; the last tests kill a replica and press Ctrl-C.
"""

import concurrent.futures
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from cluster.config import default_home
from cluster.state import SqliteStore
from cost_service.metrics import COST_ERROR, METRICS
from tests.cluster_runs import HELLO, MODEL, Running, environment, free_port, metrics_port, serving

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


@pytest.fixture(name="told_file", scope="module")
def _told_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("serve") / "serve.json"
    path.write_text("of an earlier start")
    return path


@pytest.fixture(scope="module")
def running(told_file: Path) -> Iterator[Running]:
    """The service, started where another Ray cluster is said to be at hand: it must not matter."""
    with serving({"RAY_ADDRESS": f"127.0.0.1:{free_port()}"}, "--json", str(told_file)) as service:
        yield service


def test_a_script_reads_how_to_reach_it_and_no_key(running: Running, told_file: Path) -> None:
    told = json.loads(told_file.read_text())
    assert told["url"] == running.url + "/v1"
    assert told["dashboard"] == running.dashboard
    assert (told["model"], told["replicas"], told["pid"]) == (MODEL, 2, running.process.pid)
    assert Path(told["api_key_file"]).read_text().strip() == running.key
    assert running.key not in told_file.read_text()


def full_status() -> dict[str, Any]:
    command = [sys.executable, "-m", "cluster", "status", "--json", "-", "--interval-s", "0.2"]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True, timeout=120)
    told: dict[str, Any] = json.loads(answer.stdout)
    return told


def status(running: Running) -> list[dict[str, Any]]:
    replicas: list[dict[str, Any]] = full_status()["replicas"]
    return replicas


def at_once(running: Running, num: int, path: str = CHAT, **body: Any) -> list[httpx.Response]:
    """Answers to so many requests that come at once: both replicas get some of eight."""
    asked = {"model": MODEL, "max_tokens": 4} | ({"messages": HELLO} if path == CHAT else {}) | body
    with concurrent.futures.ThreadPoolExecutor(num) as pool:
        return list(pool.map(lambda _: running.post(path, asked), range(num)))


def assert_openai_error(answer: httpx.Response, status_code: int, param: str | None) -> None:
    assert answer.status_code == status_code, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    for internal in ("Traceback", "ray.", "vllm.", "VLLM", "pydantic", "/site-packages/"):
        assert internal not in answer.text


def test_models_are_listed(running: Running) -> None:
    answer = httpx.get(running.url + "/v1/models", headers={"authorization": f"Bearer {running.key}"})
    assert [card["id"] for card in answer.json()["data"]] == [MODEL]
    one = httpx.get(f"{running.url}/v1/models/{MODEL}", headers={"authorization": f"Bearer {running.key}"})
    assert one.json()["id"] == MODEL


def test_a_chat_is_answered_with_usage(running: Running) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    answer = running.post(CHAT, {"model": MODEL, "messages": question, "max_tokens": 16, "temperature": 0})
    assert answer.status_code == 200, answer.text
    assert "Paris" in answer.json()["choices"][0]["message"]["content"]
    usage = answer.json()["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_the_openai_client_streams_a_chat(running: Running) -> None:
    client = openai.OpenAI(base_url=running.url + "/v1", api_key=running.key)
    stream = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=12, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens <= 12
    assert len(chunks) > 4, "tokens must not wait for company"


def test_completions_answer_streamed_and_not(running: Running) -> None:
    body = {"model": MODEL, "prompt": "One, two, three,", "max_tokens": 8, "temperature": 0}
    whole = running.post(COMPLETIONS, body).json()
    assert whole["usage"]["completion_tokens"] <= 8
    streamed = running.post(COMPLETIONS, body | {"stream": True}).text
    events = [line.removeprefix("data: ") for line in streamed.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]) == whole["choices"][0]["text"]


@pytest.mark.parametrize("authorization", ["", "Bearer", "Bearer wrong", "Basic abc", "Bearer \xff"])
def test_a_wrong_key_gets_401(running: Running, authorization: str) -> None:
    headers = [(b"authorization", authorization.encode("latin-1"))] if authorization else []
    answer = httpx.post(running.url + CHAT, headers=headers, json={"model": MODEL, "messages": HELLO})
    assert_openai_error(answer, 401, None)
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("name", "content", "status_code"),
    [
        ("malformed", b'{"model": ', 400),
        ("empty", b"", 400),
        ("a list", b"[]", 400),
        ("deep nesting", b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
        ("invalid UTF-8", b'{"model": "\xff\xfe"}', 400),
        ("NaN", b'{"temperature": NaN}', 400),
        ("too long", b'{"messages": "' + b"x" * (1 << 20) + b'"}', 413),
    ],
)
def test_a_bad_body_gets_4xx(running: Running, name: str, content: bytes, status_code: int) -> None:
    assert_openai_error(running.post(CHAT, content=content), status_code, None)


@pytest.mark.parametrize(
    ("change", "status_code", "param"),
    [
        ({"model": "unknown"}, 404, "model"),
        ({"model": None}, 400, "model"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"max_tokens": "many"}, 400, "max_tokens"),
        ({"max_tokens": 10**30}, 400, "max_tokens"),
        ({"n": 0}, 400, "n"),
        ({"n": 100000}, 400, "n"),
        ({"temperature": 9}, 400, "temperature"),
        ({"messages": []}, 400, "messages"),
        ({"prompt_logprobs": 1}, 400, "prompt_logprobs"),
        ({"allowed_token_ids": [1]}, 400, "allowed_token_ids"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"chat_template": "{{ 1 }}"}, 400, "chat_template"),
        ({"chat_template_kwargs": {"a": 1}}, 400, "chat_template_kwargs"),
        ({"use_beam_search": True}, 400, "use_beam_search"),
        ({"kv_transfer_params": {"a": 1}}, 400, "kv_transfer_params"),
        ({"cache_salt": "x"}, 400, "cache_salt"),
        ({"priority": -5}, 400, "priority"),
        ({"vllm_xargs": {"a": 1}}, 400, "vllm_xargs"),
    ],
)
def test_a_bad_chat_field_is_named(
    running: Running, change: dict[str, Any], status_code: int, param: str | None
) -> None:
    answer = running.post(CHAT, {"model": MODEL, "messages": HELLO, "max_tokens": 4} | change)
    assert_openai_error(answer, status_code, param)


def test_echo_with_logprobs_is_refused(running: Running) -> None:
    body = {"model": MODEL, "prompt": "a", "echo": True, "logprobs": 1}
    assert_openai_error(running.post(COMPLETIONS, body), 400, "echo")


def test_a_prompt_longer_than_the_context_is_refused(running: Running) -> None:
    answer = running.post(COMPLETIONS, {"model": MODEL, "prompt": "word " * 5000, "max_tokens": 4})
    assert_openai_error(answer, 400, "prompt")
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    messages = [{"role": "user", "content": "word " * 5000}]
    assert_openai_error(running.post(CHAT, {"model": MODEL, "messages": messages}), 400, "messages")


def test_a_token_outside_the_vocabulary_is_refused(running: Running) -> None:
    answer = running.post(COMPLETIONS, {"model": MODEL, "prompt": [10**9], "max_tokens": 4})
    assert answer.status_code == 400, answer.text
    assert_openai_error(answer, 400, answer.json()["error"]["param"])


def test_another_content_type_gets_415(running: Running) -> None:
    assert_openai_error(running.post(CHAT, {"model": MODEL}, content_type="text/plain"), 415, None)


def test_oversized_headers_get_431(running: Running) -> None:
    answer = running.post(CHAT, {"model": MODEL, "messages": HELLO}, x_long="a" * 20_000)
    assert answer.status_code in (400, 431), answer.text  # the proxy's own limit may come first


def test_unknown_paths_and_methods_have_the_same_shape(running: Running) -> None:
    headers = {"authorization": f"Bearer {running.key}"}
    assert_openai_error(httpx.get(running.url + "/v1/nothing", headers=headers), 404, None)
    assert_openai_error(httpx.get(running.url + CHAT, headers=headers), 405, None)
    for path in ("/docs", "/openapi.json", "/invocations", "/tokenize", "/v1/embeddings"):
        assert httpx.post(running.url + path, headers=headers).status_code == 404


def test_seeds_with_long_prompts_at_once_do_not_end_an_engine(running: Running) -> None:
    def send(number: int) -> int:
        body = {"model": MODEL, "prompt": "word " * (900 + number), "max_tokens": 4, "seed": number}
        return running.post(COMPLETIONS, body).status_code

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        assert set(pool.map(send, range(12))) == {200}


def test_after_all_that_both_engines_still_answer(running: Running) -> None:
    assert {answer.status_code for answer in at_once(running, 8)} == {200}


def test_status_says_how_many_replicas_run_and_are_wanted(running: Running) -> None:
    (row,) = full_status()["scaling"]
    assert (row["running"], row["wanted"], row["others"]) == (2, 2, {})


def test_status_shows_both_replicas(running: Running) -> None:
    replicas = status(running)
    assert len(replicas) == 2
    assert sum(replica.get("output_tokens", 0) for replica in replicas) > 0
    assert {replica["preemption"] for replica in replicas if "preemption" in replica} == {"adaptive"}


def test_a_running_application_follows_another_policy(running: Running) -> None:
    before = {(replica["preemption"], replica["admission"]) for replica in status(running)}
    assert before == {("adaptive", "fair")}
    for arguments, policies in (
        (["recompute"], ("recompute", "fair")),
        (["--admission", "first-come"], ("recompute", "first-come")),
        (["adaptive", "--admission", "fair"], ("adaptive", "fair")),
    ):
        command = [sys.executable, "-m", "cluster", "policy", *arguments]
        answer = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True, timeout=120)
        names = ", ".join(name for name in arguments if name != "--admission")
        assert answer.stdout.count(f": {names}\n") == 2
        assert {answer.status_code for answer in at_once(running, 8)} == {200}  # a step of each engine
        assert {(replica["preemption"], replica["admission"]) for replica in status(running)} == {policies}


def given(running: Running, send: Callable[[], list[httpx.Response]]) -> list[int]:
    """Output tokens of each replica that it had for some requests, the most first."""
    before = {each["replica"]: each.get("output_tokens", 0) for each in status(running)}
    assert {answer.status_code for answer in send()} == {200}
    time.sleep(0.5)  # totals come every tenth of a second, and when an engine falls idle
    after = {each["replica"]: each.get("output_tokens", 0) for each in status(running)}
    return sorted((num - before[name] for name, num in after.items()), reverse=True)


def test_a_tenants_requests_at_once_are_spread_over_the_replicas(running: Running) -> None:
    body = {"prompt": "One, two, three,", "max_tokens": 32, "ignore_eos": True}
    most, least = given(running, lambda: at_once(running, 8, COMPLETIONS, **body))
    assert most + least == 8 * 32
    assert most <= 5 * 32, "one more than half, where statistics come amidst them and tell of some twice"


def test_requests_with_the_same_beginning_stay_on_one_replica(running: Running) -> None:
    first, second = (f"{time.monotonic_ns()} {number} " + "All of this is the same. " * 60 for number in range(2))

    def ask(prompt: str, num_tokens: int) -> httpx.Response:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": num_tokens, "ignore_eos": True}
        return running.post(COMPLETIONS, body)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # one each
        assert [each.status_code for each in pool.map(ask, (first, second), (16, 16))] == [200, 200]
    rounds = [(first, 8), (second, 5)] * 4
    assert given(running, lambda: [ask(*each) for each in rounds]) == [4 * 8, 4 * 5]


def costs(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "cluster", "costs", "--json", "-", *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True, timeout=120)
    told: dict[str, Any] = json.loads(answer.stdout)
    return told


def learn(running: Running, least_version: int) -> dict[str, Any]:
    """Let the replicas work until the cost service has such a version; return what it says of them."""
    deadline_s = time.monotonic() + 90

    def ask(number: int) -> httpx.Response:  # something new each time: what is in the prefix cache teaches nothing
        body = {"model": MODEL, "prompt": f"{time.monotonic_ns()} " * (1 + number), "max_tokens": 16}
        return running.post(COMPLETIONS, body)

    while True:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, range(24)))
        assert {answer.status_code for answer in answers} == {200}
        kinds = costs("--tokens", "100")["kinds"]
        if kinds and kinds[0]["version"] >= least_version:
            (kind,) = kinds
            return kind
        assert time.monotonic() < deadline_s, f"the cost service learned {kinds}"


def test_what_the_replicas_measure_becomes_the_costs_that_all_of_them_use(running: Running) -> None:
    kind = learn(running, 1)
    assert (kind["hardware"], kind["parallelism"]) == ("cpu", 1)
    assert 0 < kind["predicted_s"]["prefill"] < 10
    deadline_s = time.monotonic() + 30
    while any(replica.get("costs_version", 0) < 1 for replica in status(running)):
        assert time.monotonic() < deadline_s, "a replica goes on with the costs that it started with"
        assert {answer.status_code for answer in at_once(running, 8)} == {200}


def lengths_when(condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """What is known of output lengths, as soon as it is like that and the service is there to say so."""
    deadline_s, lengths = time.monotonic() + 60, dict[str, Any]()
    while True:
        with contextlib.suppress(subprocess.CalledProcessError):
            if condition(lengths := costs()["output_lengths"]):
                return lengths
        assert time.monotonic() < deadline_s, lengths
        time.sleep(0.5)


def test_output_lengths_are_learned_from_whole_and_streamed_answers(running: Running) -> None:
    before = costs()["output_lengths"]
    body = {"model": MODEL, "prompt": "One, two, three,", "temperature": 0}
    for changes in ({}, {"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}):
        for path, prompt in ((COMPLETIONS, body), (CHAT, body | {"messages": HELLO})):
            answer = running.post(path, prompt | changes | {"max_tokens": 5})
            assert answer.status_code == 200
            assert ('"usage":{' in answer.text) == (changes != {"stream": True}), answer.text
    lengths = lengths_when(lambda lengths: lengths["learned"] >= before["learned"] + 6)
    assert lengths["cut"] > before["cut"]
    assert 0 <= lengths["coverage"] <= 1


KILL = """
from cluster.running import connected
with connected("auto"):
    import ray
    from cost_service.named_actor import find_actor
    ray.kill(find_actor("cost_service"), no_restart=False)
"""


def test_a_killed_cost_service_comes_back_with_its_newest_costs_and_nobody_notices(running: Running) -> None:
    before = learn(running, 2)["version"]
    store = SqliteStore(default_home() / "state.sqlite")
    num_lengths = costs()["output_lengths"]["learned"]
    lengths_when(lambda _: store.load("output_lengths").get("all", {}).get("newest", 0) >= num_lengths)
    subprocess.run([sys.executable, "-c", KILL], env=environment(), check=True, timeout=120, capture_output=True)
    answer = running.post(CHAT, {"model": MODEL, "messages": HELLO, "max_tokens": 4})
    assert answer.status_code == 200
    lengths_when(lambda lengths: lengths["learned"] >= num_lengths)
    assert learn(running, before)["version"] >= before
    assert learn(running, before + 1)["version"] > before


def tenants(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "cluster", "tenants", *arguments, "--json", "-"]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True, timeout=60)
    told: dict[str, Any] = json.loads(answer.stdout)
    return told


IN_FORCE_S = 5.0
"""Within which a change of a tenant holds on every ingress."""


def status_within(limit_s: float, ask: Callable[[], httpx.Response], status_code: int) -> httpx.Response:
    """The first answer with such a status; fails if none comes in time."""
    deadline_s = time.monotonic() + limit_s
    while (answer := ask()).status_code != status_code:
        assert time.monotonic() < deadline_s, f"{answer.status_code}: {answer.text}"
        time.sleep(0.1)
    return answer


@pytest.fixture(scope="module")
def acme(running: Running) -> Running:
    """A tenant of its own; names are never free again, and the installation may be an old one."""
    made = tenants("add", f"acme-{os.getpid()}-{time.time_ns()}")
    return Running(running.url, made["key"], running.process, made["name"])


def test_an_added_key_is_accepted_and_a_revoked_one_refused_within_5_seconds(acme: Running) -> None:
    def ask() -> httpx.Response:
        return acme.post(CHAT, {"model": MODEL, "messages": HELLO, "max_tokens": 2})

    status_within(IN_FORCE_S, ask, 200)
    another = tenants("add", acme.tenant, "--another-key")
    tenants("revoke", acme.tenant, "--key", another["keys"][0]["id"])
    assert_openai_error(status_within(IN_FORCE_S, ask, 401), 401, None)
    acme.key = another["key"]
    status_within(IN_FORCE_S, ask, 200)


def test_over_a_cap_a_tenant_gets_429_with_retry_after_and_others_are_served(running: Running, acme: Running) -> None:
    def ask() -> httpx.Response:
        return acme.post(COMPLETIONS, {"model": MODEL, "prompt": "a", "max_tokens": 1})

    tenants("limit", acme.tenant, "--max-concurrent-requests", "2")
    three = {"model": MODEL, "prompt": ["a", "b", "c"], "max_tokens": 1}
    too_large = status_within(IN_FORCE_S, lambda: acme.post(COMPLETIONS, three), 400)
    assert_openai_error(too_large, 400, "prompt")
    body = {"model": MODEL, "prompt": "Count:", "max_tokens": 1900, "ignore_eos": True, "stream": True}
    headers = {"authorization": f"Bearer {acme.key}"}
    with contextlib.ExitStack() as streams:
        opened = []  # an iterator that nobody holds closes its connection
        for _ in range(2):
            request = httpx.stream("POST", acme.url + COMPLETIONS, json=body, headers=headers, timeout=60)
            answer = streams.enter_context(request)
            assert answer.status_code == 200
            opened.append(answer.iter_lines())
            next(opened[-1])
        refused = ask()
        assert_openai_error(refused, 429, None)
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        answer = running.post(COMPLETIONS, {"model": MODEL, "prompt": "a", "max_tokens": 1})
        assert answer.status_code == 200, "a tenant is held to another's cap"
    status_within(10, ask, 200)  # both clients have left: nothing of them stays


def test_the_running_application_is_measured_over_http_tenant_by_tenant_and_switched_between_policies(
    running: Running, tmp_path: Path
) -> None:
    file = tmp_path / "result.json"
    trace = (
        "synthetic:tenant=small,rate=4,requests=6,output_mean=6,weight=2/tenant=large,rate=4,requests=6,output_mean=9"
    )
    command = [
        sys.executable, "-m", "cluster", "bench", "--serve", running.url + "/v1", "--make-tenants",
        "--policy", "recompute,adaptive", "--repeats", "1", "--json", str(file),
        "--trace", trace,
    ]  # fmt: skip
    answer = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert answer.returncode == 0, answer.stderr
    told = answer.stdout + answer.stderr + file.read_text()
    assert "sk-adaptive" not in told
    assert running.key not in told
    assert running.url.removeprefix("http://") not in told
    report = json.loads(file.read_text())
    assert list(report["arms"]) == ["recompute", "adaptive"]
    assert report["settings"]["models"] == [MODEL, MODEL]
    assert report["settings"]["weights"]["small"] == 2
    for arm in report["arms"].values():
        (one,) = arm["repeats"]
        assert sorted(one["tenants"]) == ["large", "small"]
        assert (one["unfinished"], one["rejected"], one["failed"], one["preemptions"]) == (0, 0, 0, 0)
        for record in one["records"]:  # the usage that the server told is what was asked for
            assert record["delivered_tokens"] == record["output_tokens"] > 0
            assert record["arrival_s"] < record["first_token_s"] <= record["finish_s"]
        assert one["throughput_tokens_per_s"] > 0
        assert one["tenants"]["small"]["weighted_turnaround_mean"] > 0
    assert {replica["preemption"] for replica in status(running)} == {"adaptive"}, "it follows its own policy again"
    made = [tenant for tenant in tenants("list")["tenants"] if tenant["name"] in ("bench-0", "bench-1")]
    assert [all(key["revoked"] for key in tenant["keys"]) for tenant in made] == [True, True]


def usage_of(tenant: Running, num: int) -> Counter[str]:
    """Send requests, and return what was delivered."""

    def send(number: int) -> dict[str, int]:
        body = {"model": MODEL, "prompt": f"{tenant.tenant} {number} " * (1 + number % 7), "max_tokens": 5 + number % 9}
        answer = tenant.post(COMPLETIONS, body)
        assert answer.status_code == 200, answer.text
        usage: dict[str, int] = answer.json()["usage"]
        return usage

    total: Counter[str] = Counter()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for usage in pool.map(send, range(num)):
            total["prompt"] += usage["prompt_tokens"]
            total["output"] += usage["completion_tokens"]
    return total


def in_ledger(tenants: Iterable[str], expected: dict[str, Counter[str]]) -> dict[str, dict[str, Any]]:
    """What the fairness actor says of tenants, once its ledger is what was delivered; fails if that never comes."""
    deadline_s = time.monotonic() + 60
    while True:
        fairness = full_status()["fairness"]
        (pool,) = (fairness.get("pools") or {"": {"tenants": []}}).values()  # none until it has read its store
        told = {each["tenant"]: each for each in pool["tenants"]}
        held = {
            name: Counter(
                prompt=delivered["num_input_tokens"] + delivered["num_cached_tokens"],
                output=delivered["num_output_tokens"],
            )
            for name in tenants
            if name in told
            for delivered in [told[name]["delivered"]]
        }
        if held == expected:
            assert len(pool["replicas"]) == 2
            return {name: told[name] for name in tenants}
        assert time.monotonic() < deadline_s, (held, expected, fairness)


@pytest.fixture(scope="module")
def two_tenants(running: Running) -> tuple[Running, Running]:
    """Tenants of weights 3 and 1 whom every ingress knows."""

    def add(name: str, weight: str) -> Running:
        made = tenants("add", f"{name}-{os.getpid()}-{time.time_ns()}", "--weight", weight)
        tenant = Running(running.url, made["key"], running.process, made["name"])
        status_within(IN_FORCE_S, lambda: tenant.post(COMPLETIONS, {}), 400)
        return tenant

    return add("three", "3"), add("one", "1")


def test_the_ledger_holds_exactly_what_was_delivered_through_a_kill_of_the_fairness_actor(
    two_tenants: tuple[Running, Running],
) -> None:
    names = [tenant.tenant for tenant in two_tenants]
    expected = {tenant.tenant: usage_of(tenant, 24) for tenant in two_tenants}
    told = in_ledger(names, expected)
    assert [told[name]["weight"] for name in names] == [3.0, 1.0], "as the registry says"
    assert [told[name]["waiting"] for name in names] == [0, 0]
    life = full_status()["fairness"]["life"]
    kill = KILL.replace("cost_service", "fairness").replace("from fairness.", "from cost_service.")
    subprocess.run([sys.executable, "-c", kill], env=environment(), check=True, timeout=120, capture_output=True)
    for tenant in two_tenants:  # while it is away, and after
        expected[tenant.tenant] += usage_of(tenant, 12)
    in_ledger(names, expected)
    assert full_status()["fairness"]["life"] != life


def test_status_shows_tenants_gap_and_bound_to_people(two_tenants: tuple[Running, Running]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "cluster", "status", "--interval-s", "0.2"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True, timeout=120)
    assert not re.search(r"\| +vllm$", done.stderr, re.MULTILINE), "a look takes seconds with vLLM"
    assert re.search(r"\| +ray$", done.stderr, re.MULTILINE), "imports are listed"
    shown = done.stdout
    assert re.search(r"2 replicas; gap \d+, bound \d+, gap/bound \d\.\d+", shown), shown
    assert re.search(rf"{two_tenants[0].tenant[-30:]} +\d+ +\d+% +0 +3\b", shown), shown


@pytest.fixture(scope="module")
def metrics_url(running: Running) -> str:
    return f"http://127.0.0.1:{metrics_port()}/metrics"


def test_tenants_share_no_prefix_cache(running: Running, acme: Running, metrics_url: str) -> None:
    def total(name: str) -> float:
        lines = httpx.get(metrics_url).text.splitlines()
        return sum(
            float(line.split()[-1]) for line in lines if re.match(rf"ray_vllm_prefix_cache_{name}(_total)?{{", line)
        )

    def send(tenant: Running) -> int:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 1}
        return int(tenant.post(COMPLETIONS, body).json()["usage"]["prompt_tokens"])

    def settled(at_least: float) -> float:
        """Tokens that were found in caches, once so many were looked up: metrics come every some seconds."""
        deadline_s = time.monotonic() + 60
        while total("queries") < at_least:
            assert time.monotonic() < deadline_s, f"{total('queries')} of {at_least} tokens were looked up"
            time.sleep(0.5)
        return total("hits")

    tenants("limit", acme.tenant, "--max-concurrent-requests", "none")
    prompt = f"{time.monotonic_ns()} " + "All these words are in the cache of who has sent them. " * 30
    num_queries = total("queries")
    num_tokens = send(acme)
    before = settled(num_queries + num_tokens)
    num_queries = total("queries")
    for _ in range(4):  # where it was computed: all of them find the prompt
        send(acme)
    own = settled(num_queries + 4 * num_tokens)
    assert own - before > 2 * num_tokens, "a tenant finds its own"
    send(running)
    assert settled(num_queries + 5 * num_tokens) == own, "another tenant finds it too"


def test_every_metric_that_dashboards_rely_on_is_exported_by_its_name(running: Running, metrics_url: str) -> None:
    needs_preemptions = {COST_ERROR.exported}
    names = {metric.exported for metric in METRICS.values()} - needs_preemptions
    deadline_s = time.monotonic() + 60
    told = ""
    while missing := {name for name in names if f"\n{name}{{" not in told}:
        assert time.monotonic() < deadline_s, missing
        assert running.post(CHAT, {"model": MODEL, "messages": HELLO, "max_tokens": 16}).status_code == 200
        told += httpx.get(metrics_url).text


def test_a_client_that_leaves_frees_its_request(running: Running) -> None:
    body = {"model": MODEL, "prompt": "Count:", "max_tokens": 1900, "ignore_eos": True, "stream": True}
    headers = {"authorization": f"Bearer {running.key}"}
    with httpx.stream("POST", running.url + COMPLETIONS, json=body, headers=headers, timeout=60) as answer:
        next(answer.iter_lines())
    deadline_s = time.monotonic() + 30
    while any(replica.get("num_running", 0) for replica in status(running)):
        assert time.monotonic() < deadline_s, "the request still runs after its client left"


def test_no_process_of_a_killed_replica_lives_on(running: Running) -> None:
    victim = status(running)[0]["pid"]
    engines = descendants(victim)
    assert engines, "a replica has an engine process"
    os.kill(victim, signal.SIGKILL)
    deadline_s = time.monotonic() + 5
    while left := [pid for pid in engines if alive(pid)]:
        assert time.monotonic() < deadline_s, f"{len(left)} of {len(engines)} processes live on"
        time.sleep(0.1)


def test_the_other_replica_goes_on(running: Running) -> None:
    answers = [running.post(CHAT, {"model": MODEL, "messages": HELLO, "max_tokens": 4}) for _ in range(4)]
    assert any(answer.status_code == 200 for answer in answers)
    assert all(answer.status_code in (200, 503) for answer in answers)


def test_ctrl_c_ends_everything_it_started(running: Running) -> None:
    started = descendants(running.process.pid)
    assert len(started) > 5
    running.process.send_signal(signal.SIGINT)
    assert running.process.wait(90) == 0
    deadline_s = time.monotonic() + 10
    while left := [pid for pid in started if alive(pid)]:
        assert time.monotonic() < deadline_s, [command(pid) for pid in left]
        time.sleep(0.2)


def descendants(pid: int) -> list[int]:
    """Process ids below one process, from /proc."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents.setdefault(parent_of(entry), []).append(int(entry.name))
    found, queue = [], [pid]
    while queue:
        children = parents.get(queue.pop(), [])
        found += children
        queue += children
    return found


def parent_of(entry: Path) -> int:
    return int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])


def alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return (Path("/proc") / str(pid) / "cmdline").read_text().replace("\0", " ")[:80]
    return "gone"

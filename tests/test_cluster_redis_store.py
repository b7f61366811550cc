"""Goal: a Redis that is away, hangs, is full, refuses us, was emptied or holds junk is an `OSError` or a warning, soon and
in one sentence; nothing that lies in it is ever run.

Method: a real `redis-server` with a password that is killed, paused, filled and written to by others.
"""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import redis_store
from cluster.config import StateArgs
from cluster.document import sha256, to_record
from cluster.redis_store import RedisStore
from tests.redis_runs import PASSWORD, PREFIX, RedisServer, needs_redis, redis_server

pytestmark = needs_redis


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def server(shared: RedisServer) -> RedisServer:
    """One that runs and is empty."""
    shared.client().flushall()
    return shared


@pytest.fixture
def own(tmp_path: Path) -> Iterator[RedisServer]:
    """One that a test may kill."""
    with redis_server(tmp_path) as server:
        yield server


@pytest.fixture
def store(server: RedisServer) -> RedisStore:
    return RedisStore(server.state())


CALLS: list[Callable[[RedisStore], Any]] = [
    lambda store: store.load("costs"),
    lambda store: store.names("costs"),
    lambda store: store.save("costs", "a", 2),
    lambda store: store.update("costs", "a", lambda _: 2),
]


def test_all_keys_have_the_prefix_and_clusters_with_another_one_see_nothing(
    store: RedisStore, server: RedisServer
) -> None:
    store.save("costs", "a", 1)
    assert server.client().keys("*") == [b"adaptivellm:costs"]
    other = RedisStore(server.state(redis_key_prefix="other:"))
    assert other.load("costs") == {}
    other.save("costs", "a", 2)
    assert store.load("costs") == {"a": 1}


# Outages


def test_killed_it_is_an_error_in_one_sentence_and_started_again_it_works(own: RedisServer) -> None:
    store = RedisStore(own.state())
    store.save("costs", "a", 1)
    own.kill()
    for call in CALLS:
        with pytest.raises(
            OSError, match=r"The Redis at redis://127\.0\.0\.1:\d+/0 does not answer: start it, or correct"
        ):
            call(store)
    own.start()
    assert store.load("costs") == {}
    store.save("costs", "a", 1)
    assert store.load("costs") == {"a": 1}


def test_started_again_between_two_calls_nobody_notices(own: RedisServer) -> None:
    store = RedisStore(own.state())
    for number in range(3):
        store.save("costs", "a", number)
        own.kill()
        own.start()


def test_paused_it_is_an_error_soon_and_no_late_write_overtakes_a_newer_one(own: RedisServer) -> None:
    store = RedisStore(own.state(redis_timeout_s=0.2))
    store.save("costs", "a", 0)
    own.pause()
    for number in range(1, 4):
        with pytest.raises(OSError, match="does not answer"):
            store.save("costs", "a", number)
    own.resume()
    store.save("costs", "a", 4)
    time.sleep(0.2)
    assert store.load("costs") == {"a": 4}


def test_a_change_whose_answer_is_lost_is_not_made_twice(own: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis hangs between WATCH and EXEC: whether the change was made, only its owner can tell."""
    store = RedisStore(own.state(redis_timeout_s=0.2))
    called = []

    def change(document: Any) -> int:
        called.append(document)
        own.pause()
        return len(called)

    with pytest.raises(OSError, match="does not answer"):
        store.update("costs", "a", change)
    own.resume()
    assert called == [None]


def test_a_killed_writer_leaves_a_whole_document(server: RedisServer, store: RedisStore) -> None:
    script = (
        "import sys; from cluster.config import StateArgs; from cluster.redis_store import RedisStore\n"
        "store = RedisStore(StateArgs.model_validate_json(sys.argv[1]))\n"
        "for version in range(10**9): store.save('costs', 'a', {'version': version, 'values': [version] * 20000})"
    )
    writer = subprocess.Popen([sys.executable, "-c", script, server.state().model_dump_json()])
    try:
        deadline_s = time.monotonic() + 60
        while not store.load("costs"):
            assert time.monotonic() < deadline_s, "nothing was written"
            time.sleep(0.05)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    document = store.load("costs")["a"]
    assert set(document["values"]) == {document["version"]}


# Refusals


def test_a_wrong_password_is_said_and_one_that_is_put_right_is_used_without_a_restart(server: RedisServer) -> None:
    store = RedisStore(server.state())
    server.password_file.write_text("wrong")
    try:
        for call in CALLS:
            with pytest.raises(
                OSError, match=r"does not know us: correct state\.redis_username, or what is in"
            ) as caught:
                call(store)
            assert "wrong" not in str(caught.value).replace("invalid", "")
    finally:
        server.password_file.write_text(PASSWORD)
    store.save("costs", "a", 1)


def test_without_a_password_it_is_said_that_one_is_asked_for(server: RedisServer) -> None:
    store = RedisStore(server.state(redis_password_file=None))
    with pytest.raises(OSError, match="does not know us"):
        store.load("costs")


def test_full_it_reads_and_a_write_is_an_error(own: RedisServer) -> None:
    store = RedisStore(own.state())
    store.save("costs", "a", 1)
    client = own.client()
    client.config_set("maxmemory-policy", "noeviction")
    client.config_set("maxmemory", 1)
    with pytest.raises(OSError, match="is full: raise its maxmemory"):
        store.save("costs", "a", 2)
    with pytest.raises(OSError, match="is full"):
        store.update("costs", "a", lambda _: 2)
    assert store.load("costs") == {"a": 1}
    client.config_set("maxmemory", 0)
    store.save("costs", "a", 3)
    assert store.load("costs") == {"a": 3}


def test_a_disk_that_is_full_stops_writes_and_not_reads(own: RedisServer) -> None:
    """Redis refuses writes after a snapshot failed: here because a folder is in its place."""
    store = RedisStore(own.state())
    store.save("costs", "a", 1)
    client = own.client()
    client.config_set("save", "1 1")
    (own.folder / "dump.rdb").mkdir()
    client.bgsave()
    deadline_s = time.monotonic() + 20
    while client.info("persistence")["rdb_last_bgsave_status"] != "err":
        assert time.monotonic() < deadline_s, "the snapshot did not fail"
        time.sleep(0.05)
    (own.folder / "dump.rdb").rmdir()
    with pytest.raises(OSError, match="does not do what it is asked"):
        store.save("costs", "a", 2)
    assert store.load("costs") == {"a": 1}
    client.bgsave()
    deadline_s = time.monotonic() + 20
    while client.info("persistence")["rdb_last_bgsave_status"] != "ok":
        assert time.monotonic() < deadline_s, "the snapshot did not succeed"
        time.sleep(0.05)
    store.save("costs", "a", 3)


ACL = "~adaptivellm:* -@all +hkeys +hstrlen +hmget +hget +hset +watch +unwatch +multi +exec +ping +select"


def test_an_acl_of_few_commands_and_one_prefix_suffices(server: RedisServer, tmp_path: Path) -> None:
    """The ACL of docs/operate.md."""
    password = tmp_path / "of-app"
    password.touch(mode=0o600)
    password.write_text("of-app")
    server.client().execute_command("ACL", "SETUSER", "app", "on", ">of-app", *ACL.split())
    try:
        app = {"redis_username": "app", "redis_password_file": str(password)}
        store = RedisStore(server.state(**app))
        store.save("costs", "a", 1)
        assert store.update("costs", "a", lambda document: document + 1) == 2
        assert store.load("costs") == {"a": 2}
        assert store.names("costs") == {"a"}
        foreign = RedisStore(server.state(**app, redis_key_prefix="other:"))
        for call in CALLS:
            with pytest.raises(OSError, match="allows its user too little"):
                call(foreign)
        documented = (Path(__file__).parents[1] / "docs" / "operate.md").read_text()
        assert ACL in documented
    finally:
        server.client().execute_command("ACL", "DELUSER", "app")


# What lies in it


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return (open, (str(self.path), "w"))


def test_a_pickle_in_a_record_is_said_and_never_run(
    store: RedisStore, server: RedisServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exploded = tmp_path / "exploded"
    bombs = [pickle.dumps(Bomb(exploded), protocol=protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for number, bomb in enumerate(bombs):
        server.client().hset(PREFIX + "costs", f"raw{number}", bomb)
    store.save("costs", "text", bombs[0].decode())
    assert store.load("costs") == {"text": bombs[0].decode()}
    for number in range(len(bombs)):
        assert store.update("costs", f"raw{number}", lambda document: document) is None
    assert caplog.text.count("is no record of ours") == len(bombs)
    assert not exploded.exists()
    pickle.loads(bombs[0]).close()
    assert exploded.exists(), "the bomb is one"


def test_damaged_records_are_left_out_said_once_and_replaced_by_the_next_write(
    store: RedisStore, server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    client, key = server.client(), PREFIX + "costs"
    store.save("costs", "good", {"a": 1})
    good = client.hget(key, "good")
    damaged = {
        "checksum": good.replace(b"1}", b"2}"),
        "schema": good.replace(b'"schema":1', b'"schema":2'),
        "text": b"hello",
        "empty": b"",
        "half": good[: len(good) // 2],
        b"\xff\xfe": good,
        "no-json": b'{"schema":1,"sha256":"%s","document":%s}' % (redis_hash(b"{"), b"{"),
        "deep": b'{"schema":1,"sha256":"%s","document":%s}' % (redis_hash(b"[" * 10**5), b"[" * 10**5),
    }
    for name, record in damaged.items():
        client.hset(key, name, record)
    for _ in range(2):
        assert store.load("costs") == {"good": {"a": 1}}
    assert caplog.text.count("is damaged and left out") == len(damaged)
    assert "\\xff" in caplog.text
    assert store.update("costs", "no-json", lambda document: document) is None
    for name in ("checksum", "schema", "text", "deep"):
        assert store.update("costs", name, lambda document: [document]) == [None]
    replaced = {name: [None] for name in ("checksum", "schema", "text", "deep")}
    assert store.load("costs") == {"good": {"a": 1}, "no-json": None} | replaced


def redis_hash(text: bytes) -> bytes:
    return sha256(text).encode()


def test_a_record_that_is_too_long_is_never_read(
    store: RedisStore, server: RedisServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(redis_store, "MAX_RECORD_BYTES", 2000)
    store.save("costs", "small", 1)
    server.client().hset(PREFIX + "costs", "large", to_record("x" * 3000))
    sent = int(server.client().info("stats")["total_net_output_bytes"])
    assert store.load("costs") == {"small": 1}
    assert store.update("costs", "large", lambda document: document) is None
    assert int(server.client().info("stats")["total_net_output_bytes"]) - sent < 30_000
    assert "bytes are more than 2000" in caplog.text


def test_of_too_many_documents_some_are_read_and_it_is_said(
    store: RedisStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(redis_store, "MAX_DOCUMENTS", 3)
    for number in range(5):
        store.save("costs", f"n{number}", number)
    assert store.load("costs") == {"n0": 0, "n1": 1, "n2": 2}
    assert "of its 5 documents only 3 are read" in caplog.text


def test_a_key_of_another_kind_in_our_place_is_an_error(store: RedisStore, server: RedisServer) -> None:
    server.client().set(PREFIX + "costs", "mine")
    for call in CALLS:
        with pytest.raises(OSError, match="does not do what it is asked"):
            call(store)


def test_a_collection_that_others_change_all_the_time_is_given_up(
    store: RedisStore, server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_store, "ATTEMPTS", 3)
    other = RedisStore(server.state())
    called = []

    def change(document: Any) -> str:
        called.append(document)
        other.save("costs", "b", len(called))
        return "ours"

    with pytest.raises(OSError, match="is changed by others all the time: try again"):
        store.update("costs", "a", change)
    assert called == [None] * 3
    assert store.load("costs") == {"b": 3}


# TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA, and a server's certificate of it for 127.0.0.1."""
    openssl, folder = shutil.which("openssl"), tmp_path_factory.mktemp("tls")
    if openssl is None:
        pytest.skip("no openssl here: apt-get install openssl")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost")

    def run(*arguments: str) -> None:
        subprocess.run([openssl, *arguments], cwd=folder, check=True, capture_output=True, timeout=60)

    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for name in ("ca", "other"):
        run("req", "-x509", *new, "-keyout", f"{name}.key", "-out", f"{name}.pem", "-days", "2", "-subj", f"/CN={name}")
    run("req", *new, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=127.0.0.1")
    run("x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2",
        "-extfile", "names", "-out", "server.pem")  # fmt: skip
    return folder


@pytest.fixture
def encrypted(certificates: Path, tmp_path: Path) -> Iterator[tuple[RedisServer, StateArgs]]:
    server = RedisServer(tmp_path)
    tls_port = RedisServer(tmp_path).port
    server.options = (
        "--tls-port", str(tls_port), "--tls-cert-file", str(certificates / "server.pem"),
        "--tls-key-file", str(certificates / "server.key"), "--tls-ca-cert-file", str(certificates / "ca.pem"),
        "--tls-auth-clients", "no",
    )  # fmt: skip
    try:
        server.start()
        yield (
            server,
            server.state(redis_url=f"rediss://127.0.0.1:{tls_port}/0", redis_ca_file=str(certificates / "ca.pem")),
        )
    finally:
        server.kill()


def test_over_tls_the_certificate_must_be_of_the_ca_that_is_named(
    encrypted: tuple[RedisServer, StateArgs], certificates: Path
) -> None:
    _, state = encrypted
    store = RedisStore(state)
    store.save("costs", "a", 1)
    assert store.load("costs") == {"a": 1}
    for wrong in (certificates / "other.pem", None):
        other = RedisStore(state.model_copy(update={"redis_ca_file": None if wrong is None else str(wrong)}))
        with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
            other.load("costs")


def test_a_server_without_tls_is_not_talked_to_in_the_clear(server: RedisServer) -> None:
    store = RedisStore(server.state(redis_url=f"rediss://127.0.0.1:{server.port}/0"))
    with pytest.raises(OSError, match="does not answer"):
        store.load("costs")


def test_calls_of_other_threads_wait_no_longer_than_for_two_time_limits(own: RedisServer) -> None:
    """A store that hangs keeps nobody for long, for its calls go one after another."""
    store = RedisStore(own.state(redis_timeout_s=0.1))
    own.pause()
    problems: list[OSError] = []

    def call() -> None:
        try:
            store.load("costs")
        except OSError as error:
            problems.append(error)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    os.kill(own.pid, signal.SIGCONT)
    assert len(problems) == 4

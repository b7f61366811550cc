"""Goal: the product's store keeps the same promises in SQLite and in Redis; the settings choose which, and wrong ones are
refused before anything starts.

Method: the same tests against a real file and a real `redis-server`; writers in processes of their own.
"""

import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.config import AppArgs, StateArgs
from cluster.redis_store import RedisStore
from cluster.state import SqliteStore
from cluster.stores import check_store, open_store
from cost_service.store import Store
from tests.redis_runs import RedisServer, needs_redis, redis_server

KINDS = ["sqlite", pytest.param("redis", marks=needs_redis)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(params=KINDS)
def state(request: pytest.FixtureRequest, tmp_path: Path) -> StateArgs:
    """Settings of an empty store of one kind."""
    if request.param == "sqlite":
        return StateArgs(directory=str(tmp_path))
    server: RedisServer = request.getfixturevalue("server")
    server.client().flushall()
    return server.state()


@pytest.fixture
def store(state: StateArgs) -> Store:
    return open_store(state)


def test_documents_are_there_for_who_opens_the_store_later_by_collection_and_name(
    store: Store, state: StateArgs
) -> None:
    store.save("costs", "a", {"version": 1})
    store.save("costs", "a", {"version": 2})
    store.save("costs", "b", [1.5, None, "ä", "\ud800"])
    store.save("costs", "m/cpu/1/16", "\"'\\\r\n{}")
    store.save("tenants", "a", {})
    again = open_store(state)
    assert again.load("costs") == {"a": {"version": 2}, "b": [1.5, None, "ä", "\ud800"], "m/cpu/1/16": "\"'\\\r\n{}"}
    assert again.names("costs") == {"a", "b", "m/cpu/1/16"}
    assert store.load("nothing") == {}
    assert store.names("nothing") == frozenset()


def test_many_and_large_documents_are_read_whole(store: Store) -> None:
    documents: dict[str, Any] = {f"n{number}": "x" * 500_000 for number in range(25)} | {"huge": list(range(200_000))}
    for name, document in documents.items():
        store.save("large", name, document)
    assert store.load("large") == documents
    assert store.names("large") == documents.keys()


def test_a_store_travels_to_other_processes(store: Store) -> None:
    """As an argument of a Ray actor: by Ray's pickle, as settings."""
    store.save("costs", "a", 1)
    data = pickle.dumps(store)
    assert b"a-password-of-tests" not in data
    assert pickle.loads(data).load("costs") == {"a": 1}


def test_a_change_that_fails_leaves_the_document_as_it_was(store: Store) -> None:
    store.save("costs", "a", 1)

    def refuse(document: int | None) -> int:
        raise ValueError(f"not {document}")

    with pytest.raises(ValueError, match="not 1"):
        store.update("costs", "a", refuse)
    assert store.load("costs") == {"a": 1}
    assert store.update("costs", "a", lambda document: [document]) == [1]
    assert store.update("costs", "new", lambda document: [document]) == [None]
    assert store.load("costs") == {"a": [1], "new": [None]}


COUNT = """
import sys
from cluster.config import StateArgs
from cluster.stores import open_store
store = open_store(StateArgs.model_validate_json(sys.argv[1]))
for number in range(50):
    store.update("counts", "a", lambda count: (count or 0) + 1)
    store.update("counts", f"own {sys.argv[2]}", lambda count: (count or 0) + 1)
"""


def test_a_document_is_changed_by_one_at_a_time(store: Store, state: StateArgs) -> None:
    command = [sys.executable, "-c", COUNT, state.model_dump_json()]
    writers = [subprocess.Popen([*command, str(number)]) for number in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    assert store.load("counts") == {"a": 150, "own 0": 50, "own 1": 50, "own 2": 50}


def test_threads_of_one_process_share_a_store(store: Store) -> None:
    def work(number: int) -> None:
        for count in range(20):
            store.save("threads", f"t{number}", count)
            store.update("threads", "all", lambda count: (count or 0) + 1)
            store.load("threads")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.load("threads") == {"all": 80} | {f"t{number}": 19 for number in range(4)}


def test_all_nodes_share_a_redis_and_none_a_file(tmp_path: Path) -> None:
    assert not open_store(StateArgs(directory=str(tmp_path))).is_shared
    assert open_store(StateArgs(redis_url="redis://127.0.0.1:1")).is_shared


# Which store, and what is refused


def test_the_settings_choose_the_store_and_without_a_url_it_is_a_file(tmp_path: Path) -> None:
    store = open_store(StateArgs(directory=str(tmp_path)))
    assert isinstance(store, SqliteStore)
    assert store.path == tmp_path / "state.sqlite"
    check_store(StateArgs(directory=str(tmp_path)))


def test_a_redis_that_is_away_is_opened_all_the_same(tmp_path: Path) -> None:
    store = open_store(StateArgs(redis_url="redis://127.0.0.1:1", redis_password_file=str(tmp_path / "later")))
    assert isinstance(store, RedisStore)
    with pytest.raises(OSError, match="does not answer"):
        store.load("costs")


REPLICAS = {"num_replicas": 1, "accelerator": "gpu"}


@pytest.mark.parametrize(
    ("state", "mend"),
    [
        ({"redis_url": "redis://:hunter2@h"}, "Setting state: redis_url must not hold a password: put it into a file and "
         "name it in redis_password_file."),
        ({"redis_url": "redis://u:hunter2@h/0"}, "redis_password_file"),
        ({"redis_url": "memcached://h"}, "Setting state: redis_url must be redis://HOST:6379/0, or rediss:// for TLS."),
        ({"redis_username": "u"}, "redis_url is missing beside redis_username"),
        ({"redis_password_file": "f"}, "redis_url is missing beside redis_password_file"),
        ({"redis_ca_file": "f"}, "redis_url is missing beside redis_ca_file"),
        ({"redis_url": "redis://h", "redis_username": "u"}, "redis_password_file is missing beside redis_username"),
        ({"redis_url": "redis://h", "redis_ca_file": "f"}, "write rediss:// in redis_url"),
        ({"redis_url": "redis://h", "redis_key_prefix": "RAYdefault@:"}, "redis_key_prefix"),
        ({"redis_url": "redis://h", "redis_key_prefix": "ray:"}, "must not begin with RAY"),
        ({"redis_url": "redis://h", "redis_key_prefix": ""}, "redis_key_prefix"),
        ({"redis_url": "redis://h", "redis_key_prefix": "no-colon"}, "redis_key_prefix"),
        ({"redis_url": "redis://h", "redis_timeout_s": 0.0}, "redis_timeout_s"),
        ({"redis_url": "redis://h", "redis_password": "hunter2"}, "Unknown setting state.redis_password"),
        ({"redis_url": 5}, "redis_url"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_one_sentence_that_repeats_no_secret(state: dict[str, Any], mend: str) -> None:
    with pytest.raises(ValueError, match=r"Setting|setting") as caught:
        AppArgs.from_mapping({"replicas": REPLICAS, "state": state})
    assert mend in str(caught.value)
    assert str(caught.value).count("\n") == 0
    assert "hunter2" not in str(caught.value)


def test_files_and_addresses_are_checked_before_anything_starts(tmp_path: Path) -> None:
    password = tmp_path / "password"
    local = {"redis_url": "redis://127.0.0.1:6379", "redis_password_file": str(password)}
    with pytest.raises(ValueError, match=r"state\.redis_password_file: .* put the password there, mode 0600"):
        check_store(StateArgs(**local))
    password.touch(mode=0o644)
    password.write_text("hunter2\n")
    with pytest.raises(ValueError, match="run chmod 600 on it"):
        check_store(StateArgs(**local))
    password.chmod(0o600)
    check_store(StateArgs(**local))
    check_store(StateArgs(redis_url="redis://10.0.0.7"))
    with pytest.raises(ValueError, match=r"8\.8\.8\.8 is a public address.*state\.redis_password_file"):
        check_store(StateArgs(redis_url="redis://8.8.8.8"))
    with pytest.raises(ValueError, match="sent in the clear: use rediss://"):
        check_store(StateArgs(redis_url="redis://8.8.8.8", redis_password_file=str(password)))
    encrypted = {"redis_url": "rediss://8.8.8.8", "redis_password_file": str(password)}
    check_store(StateArgs(**encrypted))
    with pytest.raises(ValueError, match=r"state\.redis_ca_file: there is no file"):
        check_store(StateArgs(**encrypted, redis_ca_file=str(tmp_path / "ca.pem")))

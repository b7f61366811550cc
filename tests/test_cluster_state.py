"""Goal: documents survive a restart, a kill in the middle of a write, and damage to others.

Method: a real file; a process that is killed while it writes.
"""

import signal
import sqlite3
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.state import SqliteStore


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "state.sqlite"


def test_documents_are_there_after_a_restart_by_collection_and_name(path: Path) -> None:
    store = SqliteStore(path)
    store.save("costs", "a", {"version": 1})
    store.save("costs", "a", {"version": 2})
    store.save("costs", "b", [1.5, None, "ä"])
    store.save("tenants", "a", {})
    again = SqliteStore(path)
    assert again.load("costs") == {"a": {"version": 2}, "b": [1.5, None, "ä"]}
    assert store.load("nothing") == {}


def test_only_the_owner_may_read_it(path: Path) -> None:
    SqliteStore(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_damaged_document_is_left_out_and_said(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = SqliteStore(path)
    store.save("costs", "good", 1)
    store.save("costs", "bad", {"token_s": 5})
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE documents SET json = '{\"token_s\": 6}' WHERE name = 'bad'")
    connection.close()
    assert store.load("costs") == {"good": 1}
    assert "costs/bad" in caplog.text


def test_a_file_that_is_no_database_is_put_aside(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.parent.mkdir(mode=0o700)
    path.write_bytes(b"not a database at all" * 100)
    store = SqliteStore(path)
    store.save("costs", "a", 1)
    assert store.load("costs") == {"a": 1}
    assert path.with_suffix(".damaged").exists()
    assert "is no database" in caplog.text


def test_a_document_is_changed_by_one_at_a_time(path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from cluster.state import SqliteStore\n"
        "store = SqliteStore(Path(sys.argv[1]))\n"
        "for _ in range(50): store.update('counts', 'a', lambda count: (count or 0) + 1)"
    )
    writers = [subprocess.Popen([sys.executable, "-c", script, str(path)]) for _ in range(2)]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    assert SqliteStore(path).load("counts") == {"a": 100}


def test_a_damaged_document_is_none_to_who_changes_it(path: Path) -> None:
    store = SqliteStore(path)
    store.save("costs", "a", 1)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE documents SET json = '2'")
    connection.close()
    assert store.update("costs", "a", lambda document: [document]) == [None]


def test_a_store_that_has_gone_is_an_os_error(path: Path) -> None:
    store = SqliteStore(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError, match="cannot be read"):
        store.load("costs")
    with pytest.raises(OSError, match="cannot be written"):
        store.save("costs", "a", 1)


def test_what_a_killed_writer_had_saved_is_whole(path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from cluster.state import SqliteStore\n"
        "store = SqliteStore(Path(sys.argv[1]))\n"
        "for version in range(10**9): store.save('costs', 'a', {'version': version, 'values': [version] * 2000})"
    )
    writer = subprocess.Popen([sys.executable, "-c", script, str(path)])
    try:
        deadline_s = time.monotonic() + 60
        while time.monotonic() < deadline_s and not (path.exists() and SqliteStore(path).load("costs")):
            time.sleep(0.05)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    document = SqliteStore(path).load("costs")["a"]
    assert set(document["values"]) == {document["version"]}

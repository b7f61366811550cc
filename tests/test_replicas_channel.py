"""Goal: the channel carries totals and policies, and no peer, however it behaves or ends, can hold up or end an engine.

Method: real sockets, and peers in processes of their own that are stopped and killed; 10,000 calls against each of them
are timed. Then the same inside a tiny engine, whose tokens must be those of an engine without a channel.
"""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq

from replicas.channel import (
    CHANNEL_VARIABLE,
    MAX_MESSAGES_PER_STEP,
    MAX_QUEUED_MESSAGES,
    EngineEnd,
    ServerEnd,
)
from replicas.messages import MAX_MESSAGE_BYTES, EngineTotals, SetPolicy, ToEngine, encode
from tests.engine_runs import Run, engine, generate, mixed_jobs, run_engine

NUM_CALLS = 10_000
MAX_CALLS_S = 2.0
WAIT_S = 20.0

SWAP, RECOMPUTE = SetPolicy(preemption="swap"), SetPolicy(preemption="recompute")


def totals(sequence: int) -> EngineTotals:
    counters = dict.fromkeys(EngineTotals.__struct_fields__, 0)
    words = {
        "epoch": "e",
        "preemption": "swap",
        "admission": "fair",
        "service_kind": "tokens",
        "guarded": False,
        "backlog": {},
    }
    return EngineTotals(**counters | words | {"sequence": sequence})


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"ipc://{tmp_path / 'channel'}"


@pytest.fixture
def engine_end(address: str) -> Iterator[EngineEnd]:
    end = EngineEnd(address)
    yield end
    end.close()


@pytest.fixture
def raw_server(address: str) -> Iterator["zmq.Socket[bytes]"]:
    """A peer that sends what it likes."""
    socket = zmq.Context.instance().socket(zmq.PAIR)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.bind(address)
    yield socket
    socket.close(linger=0)


def received(end: EngineEnd, num: int) -> list[ToEngine]:
    """The next `num` messages, or what came of them in time."""
    messages: list[ToEngine] = []
    wait_until(lambda: len(messages.extend(end.receive()) or messages) >= num)
    return messages


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.005)


# Messages


def test_totals_arrive_in_order() -> None:
    async def serve() -> None:
        server = ServerEnd()
        end = EngineEnd(server.address)
        for sequence in range(1, 21):
            assert end.send(totals(sequence))
        arrived = [(await asyncio.wait_for(server.receive(), WAIT_S)).sequence for _ in range(20)]
        assert arrived == list(range(1, 21))
        end.close()
        server.close()

    asyncio.run(serve())


def test_a_policy_arrives() -> None:
    async def serve() -> None:
        server = ServerEnd()
        end = EngineEnd(server.address)
        assert await server.send(RECOMPUTE, timeout_s=WAIT_S)
        assert await asyncio.to_thread(received, end, 1) == [RECOMPUTE]
        end.close()
        server.close()

    asyncio.run(serve())


def test_a_server_without_an_engine_is_told_so_in_time() -> None:
    async def serve() -> None:
        server = ServerEnd()
        start_s = time.monotonic()
        assert not await server.send(SWAP, timeout_s=0.2)
        assert time.monotonic() - start_s < WAIT_S
        server.close()

    asyncio.run(serve())


def test_the_socket_lies_in_a_folder_of_its_owner_alone_and_goes_with_its_server() -> None:
    async def serve() -> None:
        server = ServerEnd()
        socket = Path(server.address.removeprefix("ipc://"))
        assert socket.is_socket()
        assert socket.parent.stat().st_mode & 0o777 == 0o700
        server.close()
        assert not socket.parent.exists()

    asyncio.run(serve())


def test_an_engine_without_the_variable_has_no_channel(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.delenv(CHANNEL_VARIABLE, raising=False)
    assert EngineEnd.from_environment() is None
    monkeypatch.setenv(CHANNEL_VARIABLE, "")
    assert EngineEnd.from_environment() is None
    monkeypatch.setenv(CHANNEL_VARIABLE, address)
    end = EngineEnd.from_environment()
    assert end is not None
    end.close()


JUNK = {
    "empty": b"",
    "no text": b"\x00\xff\xfe",
    "half a message": b'{"type":"set_policy","pre',
    "no object": b"[1, 2]",
    "wrong type": b'{"type":"totals"}',
    "wrong policy": b'{"type":"set_policy","preemption":"stock"}',
    "unknown field": b'{"type":"set_policy","preemption":"swap","extra":1}',
    "deep": b'{"type":"set_policy","preemption":' + b"[" * 100_000,
    "oversize": encode(SWAP) + b" " * MAX_MESSAGE_BYTES,
    "far oversize": b"x" * (8 * MAX_MESSAGE_BYTES),
}


@pytest.mark.parametrize("junk", JUNK.values(), ids=JUNK.keys())
def test_an_engine_counts_and_skips_junk_and_reads_on(
    engine_end: EngineEnd, raw_server: "zmq.Socket[bytes]", junk: bytes
) -> None:
    for message in (encode(SWAP), junk, junk, encode(RECOMPUTE)):
        raw_server.send(message)
    assert received(engine_end, 2) == [SWAP, RECOMPUTE]
    assert engine_end.num_rejected == 2


@pytest.mark.parametrize("junk", JUNK.values(), ids=JUNK.keys())
def test_a_server_counts_and_skips_junk_and_reads_on(junk: bytes) -> None:
    async def serve() -> None:
        server = ServerEnd()
        peer = zmq.Context.instance().socket(zmq.PAIR)
        peer.connect(server.address)
        for message in (encode(totals(1)), junk, junk, encode(totals(2))):
            peer.send(message)
        assert [(await asyncio.wait_for(server.receive(), WAIT_S)).sequence for _ in range(2)] == [1, 2]
        assert server.num_rejected == 2
        peer.close(linger=0)
        server.close()

    asyncio.run(serve())


def test_a_peer_that_floods_the_engine_takes_a_few_messages_of_each_step(
    engine_end: EngineEnd, raw_server: "zmq.Socket[bytes]"
) -> None:
    for index in range(1000):
        raw_server.send(encode(SWAP) if index % 2 else b"junk")
    taken = 0

    def take() -> bool:
        nonlocal taken
        before = engine_end.num_rejected
        num = len(list(engine_end.receive())) + engine_end.num_rejected - before
        assert num <= MAX_MESSAGES_PER_STEP
        taken += num
        return taken == 1000

    wait_until(take)
    assert engine_end.num_rejected == 500


# Peers that do not answer

PEER = """
import sys, zmq
socket = zmq.Context().socket(zmq.PAIR)
socket.bind(sys.argv[1])
print("bound", flush=True)
while sys.argv[2] == "reads":
    print(socket.recv().decode(), flush=True)
sys.stdin.read()
"""


ENGINE = """
import sys, zmq
socket = zmq.Context().socket(zmq.PAIR)
socket.connect(sys.argv[1])
socket.send(sys.argv[2].encode())
socket.recv()
"""


@contextmanager
def peer_process(address: str, behaviour: str) -> Iterator["subprocess.Popen[str]"]:
    """A server's end in a process of its own: "reads" (and prints what it reads) or "ignores"."""
    process = subprocess.Popen(
        [sys.executable, "-c", PEER, address, behaviour], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "bound\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def call_many_times(end: EngineEnd) -> int:
    """Send and receive 10,000 times; return how many messages were dropped.

    A machine that is busy with other things may need a second attempt; calls that wait for a peer would need hours.
    """
    for _ in range(3):
        before = end.num_dropped
        start_s = time.monotonic()
        sent = 0
        for sequence in range(1, NUM_CALLS + 1):
            assert list(end.receive()) == []
            sent += end.send(totals(sequence))
        took_s = time.monotonic() - start_s
        dropped = end.num_dropped - before
        assert sent + dropped == NUM_CALLS
        if took_s < MAX_CALLS_S:
            return dropped
    pytest.fail(f"{NUM_CALLS} calls took {took_s:.1f} s")


def assert_newest_totals_arrive(end: EngineEnd, process: "subprocess.Popen[str]") -> None:
    """Send as an engine does, again and again, until a message of these comes out at the other end."""
    assert process.stdout is not None
    done = threading.Event()

    def keep_sending() -> None:
        sequence = 1_000_000
        while not done.wait(0.02):
            sequence += 1
            end.send(totals(sequence))

    sender = threading.Thread(target=keep_sending)
    sender.start()
    try:
        for line in process.stdout:
            if '"sequence":1000' in line:
                return
        pytest.fail("the peer ended")
    finally:
        done.set()
        sender.join()


def test_an_engine_without_any_peer_goes_on_and_drops_what_exceeds_its_queue(engine_end: EngineEnd) -> None:
    assert call_many_times(engine_end) == NUM_CALLS - MAX_QUEUED_MESSAGES


def test_an_engine_whose_peer_never_reads_goes_on_and_drops(engine_end: EngineEnd, address: str) -> None:
    with peer_process(address, "ignores"):
        assert call_many_times(engine_end) > NUM_CALLS // 2
        assert call_many_times(engine_end) > NUM_CALLS // 2


@pytest.mark.timeout(120)
def test_an_engine_whose_peer_was_stopped_goes_on_and_reports_again_once_the_peer_does(
    engine_end: EngineEnd, address: str
) -> None:
    with peer_process(address, "reads") as process:
        assert_newest_totals_arrive(engine_end, process)
        process.send_signal(signal.SIGSTOP)
        assert call_many_times(engine_end) > NUM_CALLS // 2
        process.send_signal(signal.SIGCONT)
        assert_newest_totals_arrive(engine_end, process)


@pytest.mark.timeout(120)
def test_an_engine_whose_peer_was_killed_goes_on_and_reports_to_the_next_one(
    engine_end: EngineEnd, address: str
) -> None:
    with peer_process(address, "reads") as process:
        assert_newest_totals_arrive(engine_end, process)
        process.kill()
        process.wait()
        assert call_many_times(engine_end) > NUM_CALLS // 2
    with peer_process(address, "reads") as process:
        assert_newest_totals_arrive(engine_end, process)


def test_a_server_hears_the_next_engine_after_the_first_was_killed() -> None:
    async def serve() -> None:
        server = ServerEnd()
        for sequence in (1, 2, 3):
            process = subprocess.Popen(
                [sys.executable, "-c", ENGINE, server.address, encode(totals(sequence)).decode()]
            )
            try:
                assert (await asyncio.wait_for(server.receive(), WAIT_S)).sequence == sequence
            finally:
                process.kill()
                process.wait()
        server.close()

    asyncio.run(serve())


# Inside an engine

PRESSURE_BLOCKS = 24


class ServerThread:
    """A replica server's end in a thread with its own loop, as far away from the engine as in production."""

    def __init__(self) -> None:
        self.arrived: list[EngineTotals] = []
        self._started: Future[str] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        self.address = self._started.result(WAIT_S)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._end = ServerEnd()
        self._started.set_result(self._end.address)
        reader = asyncio.create_task(self._read())
        await self._stop.wait()
        reader.cancel()
        self._end.close()

    async def _read(self) -> None:
        while True:
            message = await self._end.receive()
            if isinstance(message, EngineTotals):
                self.arrived.append(message)

    def send(self, message: SetPolicy) -> bool:
        return asyncio.run_coroutine_threadsafe(self._end.send(message, timeout_s=WAIT_S), self._loop).result()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ServerThread]:
    thread = ServerThread()
    monkeypatch.setenv(CHANNEL_VARIABLE, thread.address)
    yield thread
    thread.close()


@pytest.fixture(scope="module")
def without_channel(tiny_model: Path) -> Run:
    assert CHANNEL_VARIABLE not in os.environ
    run = run_engine(tiny_model, "swap", mixed_jobs(20), num_blocks=PRESSURE_BLOCKS)
    assert run.swaps > 0
    return run


@pytest.mark.engine
def test_an_engine_delivers_the_same_tokens_when_nobody_reads_its_channel(
    tiny_model: Path, without_channel: Run, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setattr("replicas.vllm_scheduler.ENGINE_INTERVAL_S", 0.0)  # every step reports: the queue does fill
    monkeypatch.setenv(CHANNEL_VARIABLE, address)
    with peer_process(address, "ignores"):
        assert run_engine(tiny_model, "swap", mixed_jobs(20), num_blocks=PRESSURE_BLOCKS) == without_channel


@pytest.mark.engine
def test_the_last_totals_of_a_run_are_those_of_an_idle_engine_that_delivered_everything(
    tiny_model: Path, without_channel: Run, server: ServerThread
) -> None:
    assert run_engine(tiny_model, "swap", mixed_jobs(20), num_blocks=PRESSURE_BLOCKS) == without_channel
    num_tokens = sum(len(tokens) for tokens in without_channel.tokens)
    wait_until(lambda: bool(server.arrived) and server.arrived[-1].output_tokens == num_tokens)
    last = server.arrived[-1]
    assert (last.num_running, last.num_waiting, last.num_used_host_slots) == (0, 0, 0)
    assert last.num_free_kv_blocks == last.num_kv_blocks - 1 == PRESSURE_BLOCKS - 1
    assert (last.swaps, last.recomputes) == (without_channel.swaps, without_channel.recomputes)
    assert last.swapped_out_blocks == without_channel.swapped_out_blocks
    assert last.preemption == "swap"
    assert last.dropped_messages == 0
    assert len({each.epoch for each in server.arrived}) == 1
    assert [each.sequence for each in server.arrived] == list(range(1, len(server.arrived) + 1))
    assert any(each.num_running > 0 for each in server.arrived)
    for field in ("steps", "scheduled_tokens", "output_tokens", "swaps", "recomputes", "swapped_in_blocks"):
        values = [getattr(each, field) for each in server.arrived]
        assert values == sorted(values), f"{field} fell"


@pytest.mark.engine
def test_a_policy_sent_to_a_running_engine_is_followed_and_reported(
    tiny_model: Path, without_channel: Run, server: ServerThread
) -> None:
    jobs = mixed_jobs(20)
    with engine(tiny_model, "swap", num_blocks=PRESSURE_BLOCKS) as llm:
        scheduler: Any = llm.llm_engine.engine_core.engine_core.scheduler
        assert server.send(RECOMPUTE)
        time.sleep(0.2)  # on its way through the sockets
        assert generate(llm, jobs) == without_channel.tokens
        assert scheduler.preemptor.num_preemptions["recompute"] > 0
        assert scheduler.preemptor.num_preemptions["swap"] == 0
        wait_until(lambda: server.arrived[-1].num_running == 0)
        assert server.arrived[-1].preemption == "recompute"
        assert server.arrived[-1].recomputes == scheduler.preemptor.num_preemptions["recompute"]

        assert server.send(SWAP)
        time.sleep(0.2)
        assert generate(llm, jobs) == without_channel.tokens
        assert scheduler.preemptor.num_preemptions["swap"] > 0
        wait_until(lambda: server.arrived[-1].preemption == "swap" and server.arrived[-1].num_running == 0)

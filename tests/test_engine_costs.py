"""Goal: what a real engine measures becomes the costs that another one decides by, and costs for others do not.

Method: an engine with its control channel; the test is its server and hands samples to a cost service, snapshots back.
"""

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import zmq

from cost_service.samples import CopySample, PrefillSample, Sample
from cost_service.service import CostService, Kind
from cost_service.snapshot import CostSnapshot
from replicas.channel import CHANNEL_VARIABLE
from replicas.messages import CostSamples, EngineTotals, SetCosts, ToServer, decode_to_server, encode
from tests.engine_runs import JOBS, PRESSURE, engine, generate, scheduler_of

pytestmark = pytest.mark.engine

FEW = JOBS[:70]


class Server:
    """The other end of an engine's channel, without an event loop."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._socket = zmq.Context.instance().socket(zmq.PAIR)
        address = f"ipc://{folder / 'channel'}"
        self._socket.bind(address)
        monkeypatch.setenv(CHANNEL_VARIABLE, address)

    def read(self) -> list[ToServer]:
        messages = []
        while self._socket.poll(200):
            messages.append(decode_to_server(self._socket.recv()))
        return messages

    def send(self, snapshot: str) -> None:
        self._socket.send(encode(SetCosts(snapshot=snapshot)))

    def close(self) -> None:
        self._socket.close(linger=0)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    return Server(tmp_path, monkeypatch)


def test_a_fresh_engine_decides_by_what_another_one_measured(tiny_model: Path, tmp_path: Path, server: Server) -> None:
    service = CostService()
    with engine(tiny_model, "random", **PRESSURE) as llm:
        generate(llm, FEW)
    told = [message for message in server.read() if isinstance(message, CostSamples)]
    samples: list[Sample] = [sample for message in told for sample in message.samples]
    kinds = {type(sample) for sample in samples}
    assert kinds == {PrefillSample, CopySample}  # no link: copies on CPU are the engine's own work
    assert told[0].samples == []  # first of all, who it is
    for message in told:
        service.observe(message.costs, msgspec.json.encode(message.samples))
    (kind,) = service.refit()
    learned = service.snapshot(kind)
    assert learned is not None
    logs = tmp_path / "logs"
    logs.mkdir()
    with engine(tiny_model, "adaptive", swap={"decision_log_folder": str(logs)}, **PRESSURE) as llm:
        assert scheduler_of(llm).preemptor.costs.version == 0
        server.send(learned)
        generate(llm, FEW)
        assert scheduler_of(llm).preemptor.costs == CostSnapshot.from_json(learned)
    (log,) = logs.iterdir()
    versions = {
        json.loads(line)["snapshot"]["version"] for line in log.read_text().splitlines() if '"type":"costs"' in line
    }
    assert versions == {CostSnapshot.from_json(learned).version}
    totals = [message for message in server.read() if isinstance(message, EngineTotals)]
    assert totals[-1].costs_version == CostSnapshot.from_json(learned).version
    server.close()


def test_costs_that_are_damaged_old_or_anothers_change_nothing(
    tiny_model: Path, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    with engine(tiny_model, "adaptive", **PRESSURE) as llm:
        mine = scheduler_of(llm).preemptor.costs
        newer = replace(mine, version=7)
        server.send("{}")
        server.send(newer.to_json().replace("7", "8", 1))
        server.send(replace(newer, hardware="H100").to_json())
        generate(llm, FEW[:4])
        assert scheduler_of(llm).preemptor.costs.version == 0
        server.send(newer.to_json())
        server.send(replace(newer, version=6, token_s=1.0).to_json())
        generate(llm, FEW[:4])
        assert scheduler_of(llm).preemptor.costs == newer
    server.close()
    assert caplog.text.count("Going on with version 0") == 2
    assert "for cpu" not in caplog.text
    assert "on H100 is not for this engine" in caplog.text
    assert Kind.of(mine) != Kind.of(replace(newer, hardware="H100"))

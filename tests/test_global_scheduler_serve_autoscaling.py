"""Goal: Serve's controller has as many replicas as the policy says of what replicas report, and is never held up by it.

Method: Serve's own autoscaling state of a deployment with our settings, without a cluster: reports are put in as replicas
send them, and the clock is the test's. tests/test_ray_scaling.py has the same on real replicas.
"""

import logging
import time
from typing import Any

import pytest

from cluster.replica_settings import AutoscalingArgs, ReplicaArgs
from cost_service.service_messages import AutoscalingStats
from global_scheduler.autoscaling import AutoscalerSettings

pytestmark = pytest.mark.engine  # imports Ray and vLLM

AT_ONCE = {"up_delay_s": 0.0, "down_delay_s": 0.0, "up_cooldown_s": 0.0, "down_cooldown_s": 0.0}
IDLE = AutoscalingStats(num_blocks=100, num_free_blocks=100, max_num_seqs=8)
FULL = AutoscalingStats(num_blocks=100, num_free_blocks=0, max_num_seqs=8, num_running=8, num_waiting=5, queued_s=40.0)
HALF = AutoscalingStats(num_blocks=100, num_free_blocks=50, max_num_seqs=8, num_running=4)


class Controller:
    """Serve's state of one deployment, and the number of replicas that it has set."""

    def __init__(self, **changes: Any) -> None:
        from ray.serve._private.autoscaling_state import DeploymentAutoscalingState
        from ray.serve._private.common import DeploymentID
        from ray.serve._private.config import DeploymentConfig, ReplicaConfig
        from ray.serve._private.deployment_info import DeploymentInfo
        from ray.serve.config import AutoscalingConfig

        from cluster.app import how_many

        args = AutoscalingArgs(**{"min_replicas": 1, "max_replicas": 6} | AT_ONCE | changes)
        options = how_many(ReplicaArgs(accelerator="gpu", autoscaling=args))
        self.deployment = DeploymentID(name="d", app_name="a")
        self.state = DeploymentAutoscalingState(self.deployment)
        info = DeploymentInfo(
            deployment_config=DeploymentConfig(autoscaling_config=AutoscalingConfig(**options["autoscaling_config"])),
            replica_config=ReplicaConfig.create(lambda: None), start_time_ms=0, deployer_job_id="",
        )  # fmt: skip
        self.num = self.state.register(info, 0)
        self.now_s = time.time()
        self.policy_calls = 0

    def run(self, *names: str) -> None:
        from ray.serve._private.common import ReplicaID

        self.replicas = {name: ReplicaID(name, self.deployment) for name in names}
        self.state.update_running_replica_ids(list(self.replicas.values()))

    def report(self, **stats: AutoscalingStats) -> None:
        """Let replicas say something, at the same moment and on clocks that are an hour late."""
        from ray.serve._private.common import ReplicaMetricReport, TimeStampedValue

        self.now_s += 1.0
        for name, one in stats.items():
            metrics = {key: [TimeStampedValue(self.now_s - 3600.0, value)] for key, value in one.to_numbers().items()}
            self.state.record_request_metrics_for_replica(
                ReplicaMetricReport(replica_id=self.replicas[name], timestamp=self.now_s, metrics=metrics)
            )

    def decide(self) -> int:
        self.num = self.state.get_decision_num_replicas(self.num)
        return self.num


@pytest.fixture(name="clock")
def _clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The controller's seconds, in a list of one."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_it_begins_with_the_fewest_replicas_and_follows_reports_without_delays_of_serves_own(
    clock: list[float],
) -> None:
    controller = Controller(max_step_up=2)
    assert controller.num == 1
    controller.run("r1")
    controller.report(r1=FULL)
    assert controller.decide() == 3
    controller.run("r1", "r2", "r3")
    controller.report(r1=IDLE, r2=IDLE, r3=IDLE)
    clock[0] += 1.0
    assert controller.decide() == 2
    clock[0] += 1.0
    assert controller.decide() == 1


def test_it_looks_once_a_second_whatever_comes_meanwhile(clock: list[float]) -> None:
    controller = Controller(max_step_up=1)
    controller.run("r1")
    controller.report(r1=FULL)
    assert controller.decide() == 2
    for _ in range(9):
        clock[0] += 0.1
        assert controller.decide() == 2
    clock[0] += 0.11
    assert controller.decide() == 3


def test_delays_and_cool_downs_are_the_policys(clock: list[float]) -> None:
    controller = Controller(up_delay_s=5.0, up_cooldown_s=20.0, max_step_up=1)
    controller.run("r1")
    numbers = []
    for _ in range(30):
        controller.report(r1=FULL)
        numbers.append(controller.decide())
        clock[0] += 1.0
    assert numbers == [1] * 5 + [2] * 20 + [3] * 5


def test_nothing_falls_while_a_replica_has_not_reported(clock: list[float]) -> None:
    controller = Controller(min_replicas=1)
    controller.num = 3
    controller.run("r1", "r2", "r3")
    controller.report(r1=IDLE, r2=IDLE)
    for _ in range(10):
        assert controller.decide() == 3
        clock[0] += 1.0
    controller.report(r3=IDLE)
    assert controller.decide() == 2


def test_a_replica_at_work_whose_reports_stop_keeps_the_number(clock: list[float]) -> None:
    controller = Controller(max_report_age_s=10.0, target_kv_use=0.9)
    controller.num = 3
    controller.run("r1", "r2", "r3")
    controller.report(r1=IDLE, r2=IDLE, r3=HALF)
    clock[0] += 1.0
    controller.state._policy_state = {}
    assert controller.decide() == 2, "the last reports are believed for a while"
    controller.num = 3
    clock[0] += 11.0
    assert controller.decide() == 3, "who works and says nothing is silent"
    controller.report(r3=HALF)
    clock[0] += 1.0
    assert controller.decide() == 2


def test_a_replica_whose_report_is_none_counts_as_silent(clock: list[float]) -> None:
    from ray.serve._private.common import ReplicaMetricReport, TimeStampedValue

    controller = Controller()
    controller.num = 2
    controller.run("r1", "r2")
    controller.report(r1=IDLE)
    junk = {"adaptivellm_num_running": [TimeStampedValue(1.0, float("nan"))]}
    controller.state.record_request_metrics_for_replica(
        ReplicaMetricReport(replica_id=controller.replicas["r2"], timestamp=9e9, metrics=junk)
    )
    assert controller.decide() == 2


def test_whatever_goes_wrong_the_controller_goes_on(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    controller = Controller()
    controller.num = 4
    controller.run("r1", "r2", "r3", "r4")
    controller.state._policy_state = {"adaptivellm": {"no": "state"}}
    with caplog.at_level(logging.ERROR, "ray.serve"):
        assert controller.decide() == 4
    assert "its replicas stay as many as they are" in caplog.text


def test_how_fast_replicas_preempt_is_read_from_the_series() -> None:
    from ray.serve._private.common import TimeStampedValue

    from global_scheduler.serve_autoscaling import rise_per_s

    assert rise_per_s([TimeStampedValue(10.0, 3), TimeStampedValue(14.0, 11)]) == 2.0
    assert rise_per_s([TimeStampedValue(10.0, 3)]) == 0.0
    assert rise_per_s([TimeStampedValue(10.0, 30), TimeStampedValue(14.0, 1)]) == 0.0, "the engine has begun anew"


def test_what_replicas_say_passes_serves_check_of_it() -> None:
    numbers = FULL.to_numbers()
    assert all(type(value) in (int, float) for value in numbers.values())
    assert AutoscalingStats.from_numbers(numbers) == FULL
    assert AutoscalingStats.from_numbers(dict(list(numbers.items())[1:])) is None


def test_the_policy_is_made_with_the_settings_of_the_config() -> None:
    from cluster.app import how_many

    args = AutoscalingArgs(max_replicas=3, target_queued_s=7.0)
    policy = how_many(ReplicaArgs(accelerator="gpu", autoscaling=args))["autoscaling_config"]["policy"]
    assert AutoscalerSettings(**policy["policy_kwargs"]) == args.settings()

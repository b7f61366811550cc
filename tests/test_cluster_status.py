"""Goal: people see replicas and tenants at a glance, also where the fairness actor is away.

Method: what the service itself says of reports; tests/test_ray_serve.py has the command on a running application.
"""

from cluster.status import fairness_table
from tests.test_global_scheduler_fairness_service import Replica, Scheduler


def test_tenants_are_shown_with_service_share_waiting_and_weight_and_the_pool_with_gap_and_bound() -> None:
    scheduler, a = Scheduler(), Replica("a")
    scheduler.service.set_weights({"f": 2.5})
    a.serve("f", 30)
    a.serve("g", 10)
    a.wait("g")
    a.exchange(scheduler)
    lines = fairness_table(scheduler.service.status()).splitlines()
    assert lines[0].startswith("app/m/tokens: 1 replicas; gap 0, bound ")
    assert lines[0].endswith(", gap/bound 0.000")
    assert [line.split() for line in lines[1:]] == [
        ["tenant", "service", "share", "waiting", "weight"], ["f", "60", "75%", "0", "2.5"], ["g", "20", "25%", "1", "1"]
    ]  # fmt: skip


def test_what_is_not_known_is_said() -> None:
    assert "no replica has reported yet" in fairness_table(Scheduler().service.status())
    away = fairness_table({"away": "no actor fairness is running: start an application with `make serve`."})
    assert "no actor fairness is running" in away
    assert "Engines are fair by what they know themselves" in away

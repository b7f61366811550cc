"""Goal: people see replicas and tenants at a glance, also where the fairness actor is away.

Method: what the service itself says of reports; tests/test_ray_serve.py has the command on a running application.
"""

from cluster.status import fairness_table, with_turnarounds
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
        ["tenant", "service", "share", "waiting", "weight", "turnaround"],
        ["f", "60", "75%", "0", "2.5", "-"], ["g", "20", "25%", "1", "1", "-"],
    ]  # fmt: skip


def test_weighted_turnaround_is_the_mean_over_a_pools_replicas_by_how_many_requests_each_tells_of() -> None:
    scheduler, a, b = Scheduler(), Replica("a"), Replica("b")
    for replica in (a, b):
        for tenant in ("f", "g", ""):
            replica.serve(tenant, 10)
        replica.exchange(scheduler)
    replicas = {
        "a": {
            "turnarounds": {
                "f": {"num": 30, "weighted_turnaround": 2.0},
                "anonymous": {"num": 1, "weighted_turnaround": 5.0},
            }
        },
        "b": {"turnarounds": {"f": {"num": 10, "weighted_turnaround": 6.0}}},
        "of another pool": {"turnarounds": {"g": {"num": 1, "weighted_turnaround": 9.0}}},
    }
    shown = with_turnarounds(scheduler.service.status(), replicas)
    (pool,) = shown["pools"].values()
    assert {each["tenant"]: each["weighted_turnaround"] for each in pool["tenants"]} == {"f": 3.0, "g": None, "": 5.0}
    assert {line.split()[0]: line.split()[-1] for line in fairness_table(shown).splitlines()[2:]} == {
        "f": "3.00", "g": "-", "(none)": "5.00"
    }  # fmt: skip
    away = {"away": "no actor"}
    assert with_turnarounds(away, replicas) == away


def test_what_is_not_known_is_said() -> None:
    assert "no replica has reported yet" in fairness_table(Scheduler().service.status())
    away = fairness_table({"away": "no actor fairness is running: start an application with `make serve`."})
    assert "no actor fairness is running" in away
    assert "Engines are fair by what they know themselves" in away

"""Goal: `python -m cluster costs` says in a line how well output lengths are predicted, at any time.

Method: what the service itself says of made-up requests.
"""

from cluster.costs import lengths_line
from cost_service.length_service import LengthService
from tests.test_cost_service_length_service import finished, report


def test_before_the_first_request_there_is_nothing_to_judge() -> None:
    assert lengths_line(LengthService().status()) == "output lengths: 0 requests learned"


def test_coverage_loss_and_cut_requests_are_said() -> None:
    service = LengthService()
    service.exchange(report(1, finished(), finished(cut=True), finished(within=False), finished()))
    assert lengths_line(service.status()) == (
        "output lengths: 4 requests learned; 75% within their 0.1-0.9 interval, loss 0.50 of that of the tenants' own "
        "quantiles; 25% cut at their limit"
    )


def test_without_a_loss_there_is_no_ratio() -> None:
    service = LengthService()
    service.exchange(report(1, finished(loss=0.0, own_loss=0.0)))
    assert "100% within their 0.1-0.9 interval; 0% cut" in lengths_line(service.status())

"""Goal: a synthetic workload is what its text says, and the same text is the same requests.

Method: values computed by hand or compared between two readings.
"""

import pytest

from cluster.workload import synthetic


def test_the_same_text_gives_the_same_requests() -> None:
    text = "synthetic:requests=20,rate=5,tenants=3,seed=7"
    assert synthetic(text) == synthetic(text)
    assert synthetic(text) != synthetic("synthetic:requests=20,rate=5,tenants=3,seed=8")


def test_lengths_stay_within_their_limits_and_arrivals_never_go_back() -> None:
    requests = synthetic("synthetic:requests=200,rate=50,prompt_mean=40,prompt_max=60,output_mean=20,output_max=30")
    assert all(1 <= len(request.prompt_token_ids) <= 60 for request in requests)
    assert all(1 <= request.output_tokens <= 30 for request in requests)
    arrivals = [request.arrival_s for request in requests]
    assert arrivals == sorted(arrivals)
    assert len({request.request_id for request in requests}) == 200


def test_without_a_rate_all_requests_arrive_at_once() -> None:
    assert {request.arrival_s for request in synthetic("synthetic:requests=9,rate=0")} == {0}


@pytest.mark.parametrize("text", ["azure:x", "synthetic:speed=1", "synthetic:requests=many", "synthetic:requests=0"])
def test_a_bad_text_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        synthetic(text)

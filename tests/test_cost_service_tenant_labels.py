"""Goal: metrics get few labels however many tenants there are, and nobody's label changes.

Method: by hand.
"""

from cost_service.tenant_labels import OTHERS, UNNAMED, TenantLabels


def test_the_first_have_their_own_and_the_rest_share_one() -> None:
    labels = TenantLabels(max_labels=2)
    assert [labels.label(name) for name in ("f", "g", "h", "f", "i")] == ["f", "g", OTHERS, "f", OTHERS]


def test_requests_without_a_tenant_have_a_label_that_is_not_empty() -> None:
    assert TenantLabels().label("") == UNNAMED

"""Goal: a standing is the cluster's word and the engine's own service since, each counted once; a lift holds until known.

Method: examples of what an engine hears and gives, in order.
"""

from cost_service.service_messages import Known
from replicas.standing import Group, Standing


def test_the_key_adds_what_was_served_since_the_clusters_word_by_weight() -> None:
    standing = Standing(weight=2.0, total=100.0, held=6.0)
    standing.learn(Known(counter=1000.0, included=40.0), confirmed=True)
    assert standing.key == 1000.0 + (100.0 - 40.0 + 6.0) / 2.0


def test_a_word_about_more_than_was_ever_served_here_is_of_another_account() -> None:
    standing = Standing(total=3.0)
    standing.learn(Known(counter=1000.0, included=500.0), confirmed=True)
    assert standing.key == 1003.0


def test_a_lift_holds_against_words_that_do_not_know_of_it_and_service_since_counts_on_top() -> None:
    standing = Standing(total=10.0)
    standing.lift(500.0)
    standing.total += 7.0
    standing.learn(Known(counter=20.0, included=10.0), confirmed=False)
    assert standing.key == 507.0
    standing.learn(Known(counter=490.0, included=17.0), confirmed=True)
    assert standing.key == 490.0


def test_who_begins_to_wait_is_lifted_once_to_the_least_who_waits_or_the_last_who_did() -> None:
    group = Group()
    group.arrives("f", returns=True)
    group.of("f").total += 300.0
    group.arrives("g", returns=True)
    assert group.key("g") == 300.0
    group.of("g").total += 50.0
    group.arrives("g", returns=True)
    assert group.key("g") == 350.0
    for name in "gfg":
        group.leaves(name)
    group.arrives("h", returns=True)
    assert group.key("h") == 350.0
    group.arrives("i", returns=False)
    assert group.key("i") == 0.0

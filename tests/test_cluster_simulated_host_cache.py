"""Goal: host memory keeps what was used last, never what is being copied, and never more than it has room for.

Method: any history of stores, loads and uses, beside a list in the order of use.
"""

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.simulated_host_cache import HostCache


def full(num_blocks: int = 3) -> HostCache:
    cache = HostCache(num_blocks)
    for key in range(num_blocks):
        assert cache.begin_store([key]) == [key]
        cache.end_store([key])
    return cache


def test_the_least_recently_used_goes_first() -> None:
    cache = full()
    cache.touch([0])
    assert cache.begin_store([9]) == [9]
    assert 1 not in cache
    assert {0, 2, 9} <= {key for key in range(10) if key in cache}


def test_of_blocks_used_together_the_last_one_goes_first() -> None:
    cache = full()
    cache.touch([0, 1, 2])
    cache.begin_store([9])
    assert 2 not in cache
    assert 0 in cache


def test_what_is_there_is_not_stored_again_and_stays_for_the_store_beside_it() -> None:
    cache = full()
    assert cache.begin_store([0, 9]) == [9]
    assert 0 in cache
    assert 1 not in cache


def test_a_store_takes_room_for_all_or_for_none() -> None:
    cache = full()
    cache.begin_load([0, 1])
    assert cache.begin_store([8, 9]) is None
    assert len(cache) == 3
    assert 2 in cache
    cache.end_load([0])
    assert cache.begin_store([8, 9]) == [8, 9]


def test_a_block_is_no_hit_to_load_until_it_is_written() -> None:
    cache = HostCache(2)
    cache.begin_store([0])
    assert cache.is_storing(0)
    cache.end_store([0])
    assert not cache.is_storing(0)


@settings(max_examples=200)
@given(
    st.integers(1, 6), st.lists(st.tuples(st.sampled_from("slet"), st.sets(st.integers(0, 9), min_size=1)), max_size=60)
)
def test_whatever_happens_the_books_agree(num_blocks: int, history: list[tuple[str, set[int]]]) -> None:
    cache, storing, loading = HostCache(num_blocks), [], []
    for kind, keys in history:
        if kind == "s" and (new := cache.begin_store(sorted(keys))):
            storing.append(new)
        elif kind == "l":
            there = [key for key in sorted(keys) if key in cache and not cache.is_storing(key)]
            cache.begin_load(there)
            loading.append(there)
        elif kind == "e" and storing:
            cache.end_store(storing.pop(0))
        elif kind == "e" and loading:
            cache.end_load(loading.pop(0))
        else:
            cache.touch(sorted(keys))
        cache.check()
        assert all(key in cache for keys in (*storing, *loading) for key in keys)

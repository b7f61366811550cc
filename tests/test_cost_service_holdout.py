"""Goal: an expression says which rows a fit does not see, and can do nothing else."""

import numpy as np
import pytest

from cost_service.holdout import DENSE_EVERY_THIRD, held_out

COLUMNS = {
    "tokens": np.array([1.0, 1.0, 2.0, 4.0, 8.0, 16.0]),
    "context": np.array([0.0, 64.0, 128.0, 256.0, 512.0, 1024.0]),
}


@pytest.mark.parametrize(
    ("expression", "rows"),
    [
        ("context > 128", [3, 4, 5]),
        ("64 <= context < 256", [1, 2]),
        ("tokens == 1 or context >= 1024", [0, 1, 5]),
        ("not (tokens > 1 and context < 1024)", [0, 1, 5]),
        ("context / tokens > 63", [1, 2, 3, 4, 5]),
        ("-tokens + 3 > 0", [0, 1, 2]),
        (DENSE_EVERY_THIRD, [2, 5]),
    ],
)
def test_rows_are_held_out_where_the_expression_holds(expression: str, rows: list[int]) -> None:
    chosen = held_out(expression, COLUMNS)
    assert chosen is not None
    assert np.flatnonzero(chosen).tolist() == rows


def test_rows_by_chance_are_the_same_in_every_run() -> None:
    columns = {"tokens": np.ones(1000)}
    one, other = (held_out("random() < 0.2", columns) for _ in range(2))
    assert one is not None
    assert other is not None
    assert one.tolist() == other.tolist()
    assert 150 < one.sum() < 250


def test_a_table_without_such_a_column_is_not_judged() -> None:
    assert held_out("num_decodes > 4", COLUMNS) is None


@pytest.mark.parametrize(
    "expression",
    ["", "tokens >", "tokens", "tokens + 1", "True", "'a' < 'b'", "__import__('os')", "tokens.size > 1",
     "rank(tokens, 1) < 2", "rank(1, key=2) < 2", "tokens in context", "[tokens] < 2", "tokens if 1 else 2",
     "tokens ** 2 < 3", "random(3) < 1"],
)  # fmt: skip
def test_anything_else_is_refused(expression: str) -> None:
    with pytest.raises(ValueError, match="--holdout"):
        held_out(expression, COLUMNS)

"""Which rows of a table are left out of a fit: an expression over its columns, such as `context > 4096`.

Grammar: Python's comparisons, `and`, `or`, `not`, arithmetic and numbers over column names, nothing else; `rank(tokens)` is
the position of a row's value among the distinct ones, and `random()` a number from 0 to 1 for each row, the same in every
run.
"""

import ast
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

ATTENTION_RANDOM = "random() < 0.2"
ATTENTION_LONG = "context > 4096"
DENSE_EVERY_THIRD = "rank(tokens) % 3 == 1"

_BINARY = {
    ast.Add: np.add, ast.Sub: np.subtract, ast.Mult: np.multiply, ast.Div: np.divide, ast.Mod: np.mod,
    ast.FloorDiv: np.floor_divide,
}  # fmt: skip
_COMPARE = {
    ast.Lt: np.less, ast.LtE: np.less_equal, ast.Gt: np.greater, ast.GtE: np.greater_equal, ast.Eq: np.equal,
    ast.NotEq: np.not_equal,
}  # fmt: skip


def held_out(expression: str, columns: Mapping[str, Array]) -> NDArray[np.bool_] | None:
    """Say for each row whether it is held out; None when the expression names a column that this table does not have.

    Raises:
        ValueError: Not such an expression.
    """
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except SyntaxError:
        raise ValueError(f"--holdout {expression!r} must be an expression such as 'context > 4096'.") from None
    calls = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in calls}
    (num_rows,) = {len(column) for column in columns.values()}
    result: NDArray[Any] = _Evaluation(
        expression, {name: columns.get(name, np.zeros(num_rows)) for name in names}, num_rows
    ).of(tree.body)
    if result.dtype != np.bool_:
        raise ValueError(f"--holdout {expression!r} must compare something, such as 'context > 4096'.")
    return result if names <= set(columns) else None


class _Evaluation:
    def __init__(self, expression: str, columns: Mapping[str, Array], num_rows: int) -> None:
        self._expression, self._columns, self._num_rows = expression, columns, num_rows

    def of(self, node: ast.expr) -> NDArray[np.generic]:
        match node:
            case ast.Name(id=name):
                return self._columns[name]
            case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
                return np.full(self._num_rows, float(value))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                with np.errstate(divide="ignore", invalid="ignore"):
                    return np.asarray(_BINARY[type(op)](self.of(left), self.of(right)))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return np.negative(self.of(operand))
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return np.logical_not(self.of(operand))
            case ast.BoolOp(op=op, values=values):
                combine = np.logical_and if isinstance(op, ast.And) else np.logical_or
                return np.asarray(combine.reduce([self.of(value) for value in values]))
            case ast.Compare(left=left, ops=ops, comparators=comparators) if all(type(op) in _COMPARE for op in ops):
                sides = [self.of(side) for side in (left, *comparators)]
                pairs = zip(ops, sides, sides[1:], strict=False)
                return np.logical_and.reduce([_COMPARE[type(op)](one, other) for op, one, other in pairs])
            case ast.Call(func=ast.Name(id="rank"), args=[column], keywords=[]):
                return np.unique(self.of(column), return_inverse=True)[1].astype(np.float64)
            case ast.Call(func=ast.Name(id="random"), args=[], keywords=[]):
                return np.random.default_rng(0).random(self._num_rows)
        raise ValueError(
            f"--holdout {self._expression!r} must be made of columns, numbers, comparisons, and, or, not, rank(COLUMN) and "
            "random()."
        )

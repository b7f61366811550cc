"""Goal: what people write as YAML is read as it stands, or refused in one sentence with the line of the fault.

Method: texts with one fault each; against YAML's own reader for texts without any.
"""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cluster.yaml_text import parse

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def refusal(text: str) -> str:
    with pytest.raises(ValueError, match=r"^[^\n]+\.$") as caught:
        parse(text, "The file", "compare it")
    return str(caught.value)


@given(st.lists(VALUES.filter(lambda value: value is not None), max_size=3))
def test_documents_are_what_yaml_says(documents: list[object]) -> None:
    assert parse(yaml.safe_dump_all(documents), "The file", "compare it") == documents


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3\n", "(a stands in line 1 and again in line 3): remove one."),
        ("a: {b: 1, b: 2}\n", "(b stands in line 1 and again in line 1)"),
        ("- {x: 1}\n- x: 1\n  'x': 2\n", "(x stands in line 2 and again in line 3)"),
        ("a: 1\n---\nb: 1\nb: 1\n", "(b stands in line 3 and again in line 4)"),
    ],
)
def test_a_name_that_stands_twice_in_one_mapping_is_refused_with_its_lines(text: str, said: str) -> None:
    assert said in refusal(text)


def test_a_name_may_stand_in_several_mappings_and_over_a_merged_one() -> None:
    text = "one: &one {x: 1, y: 2}\ntwo: &two {<<: *one, x: 3}\nthree: {<<: *two, x: 4}\nfour: *two\n"
    (document,) = parse(text, "The file", "compare it")
    assert document["two"] == document["four"] == {"x": 3, "y": 2}
    assert document["three"] == {"x": 4, "y": 2}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: [1,\nc: 2\n", 4),
        ("a: 1\nb: c: d\n", 2),
        ("a: 1\nd: 2026-13-45\n", 2),
        ("x: !!python/name:os.system", 1),
    ],
)
def test_a_fault_is_told_with_its_line(text: str, line: int) -> None:
    said = refusal(text)
    assert f"The file is not valid YAML (line {line}: " in said
    assert said.endswith("): compare it.")


@pytest.mark.parametrize("text", ["a: \x00", "[" * 5000])
def test_what_yaml_does_not_allow_at_all_is_refused(text: str) -> None:
    assert refusal(text).startswith("The file is not valid YAML")

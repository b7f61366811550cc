"""YAML as people write it: only plain values, no name twice in one mapping, and each fault with its line (pure).

Rule: YAML's own readers let the last of two equal names win without a word; the earlier one would be lost.
"""

from typing import Any

import yaml

from cluster.settings_errors import one_line

MERGE = "tag:yaml.org,2002:merge"


class _TwiceError(Exception):
    """A name stands twice in one mapping."""


class _StrictSafeLoader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == MERGE:
                continue
            line, name = key.start_mark.line + 1, (key.tag, key.value)
            if name in lines:
                raise _TwiceError(f"{one_line(key.value)} stands in line {lines[name]} and again in line {line}")
            lines[name] = line
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # a date that is none
            raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from None


def parse(text: str, place: str, mend: str) -> list[Any]:
    """Return the documents of a text, empty ones left out.

    Args:
        place: What the text is, as errors name it.
        mend: What to do about a text that is no YAML.

    Raises:
        ValueError: It is not YAML, or names something twice; in one sentence with the line.
    """
    try:
        return [each for each in yaml.load_all(text, Loader=_StrictSafeLoader) if each is not None]
    except _TwiceError as error:
        raise ValueError(f"{place} names something twice ({error}): remove one.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark is not None else ""
        problem = " ".join((error.problem or "it cannot be read").split()).removesuffix(".")
        raise ValueError(f"{place} is not valid YAML ({where}{problem}): {mend}.") from None
    except (yaml.YAMLError, ValueError, RecursionError):  # characters that YAML does not allow; too deep
        raise ValueError(f"{place} is not valid YAML: {mend}.") from None

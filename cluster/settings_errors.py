"""What is wrong with a setting, in one sentence that names it and the mend (pure).

Rules:
- One place for the words: settings of ours, Serve's, Ray's and Kubernetes' are refused alike.
- An unknown name comes with the one that is probably meant. Texts are not repeated: one may be a password.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

_MUST: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "literal_error": lambda context: f"be {context['expected']}",
    "greater_than": lambda context: f"be above {context['gt']:g}",
    "greater_than_equal": lambda context: f"be at least {context['ge']:g}",
    "less_than": lambda context: f"be below {context['lt']:g}",
    "less_than_equal": lambda context: f"be at most {context['le']:g}",
    "finite_number": lambda _: "be a finite number",
    "int_type": lambda _: "be a whole number",
    "float_type": lambda _: "be a number",
    "bool_type": lambda _: "be true or false",
    "string_type": lambda _: "be a text",
    "dict_type": lambda _: "be a mapping of settings",
    "model_type": lambda _: "be a mapping of settings",
    "model_attributes_type": lambda _: "be a mapping of settings",
    "string_too_short": lambda _: "not be empty",
    "string_too_long": lambda context: f"have at most {context['max_length']} characters",
    "string_pattern_mismatch": lambda context: f"match {context['pattern']}",
}
"""Pydantic's kind of a fault to what the value must do."""


def mend_of_name(name: object, known: Iterable[str]) -> str:
    """How an unknown name is mended, with the end of its sentence."""
    likely = difflib.get_close_matches(str(name), list(known), n=1)
    return f"did you mean {likely[0]}?" if likely else "remove it or correct its name."


def refuse_unknown(given: Iterable[Any], known: Iterable[str], place: str) -> None:
    """Hold a mapping to the names that its reader knows; most readers ignore others without a word.

    Raises:
        ValueError: A name is unknown, with the one that is probably meant.
    """
    names = sorted(known)
    for key in given:
        if key not in names:
            raise ValueError(f"Unknown setting {place}{one_line(key)}: {mend_of_name(key, names)}")


def sentence(error: ValidationError, model: type[BaseModel], place: str = "") -> str:
    """Say the first of pydantic's faults.

    Args:
        model: What was to be made.
        place: Where its values stand, with a point at the end; "" at the top.
    """
    faults = error.errors()
    # A misspelt name is both unknown and missing: the first tells more.
    first = next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])
    location = [part for part in first["loc"] if part != "[key]"]
    field = place + ".".join(one_line(part) for part in location) if location else place.removesuffix(".")
    if first["type"] == "extra_forbidden":
        return f"Unknown setting {field}: {mend_of_name(location[-1], _fields_at(model, location[:-1]))}"
    if first["type"] == "missing":
        return f"Setting {field} is missing: add it."
    if must := _MUST.get(first["type"]):
        value = first["input"]
        told = f", not {value}" if isinstance(value, int | float) else ""
        return f"Setting {field} must {must(first.get('ctx', {}))}{told}."
    message = first["msg"].removeprefix("Value error, ").removesuffix(".")
    return f"Setting {field}: {message}." if location else f"{message}."


def of_file(error: OSError) -> str:
    """Say why a file cannot be used, which the operating system's own text tells with a number."""
    if error.filename is None or error.strerror is None:
        return f"{str(error).removesuffix('.')}."
    return f"{error.filename} cannot be used ({error.strerror}): correct its name or its permissions."


def one_line(name: object) -> str:
    """A name as it stands in a sentence, whatever is in it."""
    return " ".join(str(name).split())


def _fields_at(model: type[BaseModel], location: Iterable[object]) -> Iterable[str]:
    """The settings that a section has; none where its kind is not told."""
    for part in location:
        field = model.model_fields.get(str(part))
        kinds = [] if field is None else [field.annotation, *get_args(field.annotation)]
        found = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not found:
            return ()
        model = found[0]
    return model.model_fields

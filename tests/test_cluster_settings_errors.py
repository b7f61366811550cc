"""Goal: a wrong setting is one sentence that names it, where it stands, and what it must be.

Method: a small model of pydantic's with each kind of value, one fault at a time.
"""

from typing import Any, Literal

import pytest
from pydantic import Field, ValidationError

from cluster.replica_settings import Settings
from cluster.settings_errors import of_file, refuse_unknown, sentence


class Inner(Settings):
    num_things: int = Field(default=1, ge=1, le=9)
    ratio: float = Field(default=0.5, gt=0, lt=1)


class Outer(Settings):
    kind: Literal["cpu", "gpu"] = "cpu"
    name: str = Field(default="a", min_length=1, max_length=3, pattern="^[a-z]*$")
    is_on: bool = True
    inner: Inner | None = None
    free: dict[str, int] = Field(default_factory=dict)
    must: int


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kind": "gpuu"}, "Setting top.kind must be 'cpu' or 'gpu'."),
        ({"inner": {"num_things": 0}}, "Setting top.inner.num_things must be at least 1, not 0."),
        ({"inner": {"num_things": 10}}, "Setting top.inner.num_things must be at most 9, not 10."),
        ({"inner": {"ratio": 0.0}}, "Setting top.inner.ratio must be above 0, not 0.0."),
        ({"inner": {"ratio": 1.0}}, "Setting top.inner.ratio must be below 1, not 1.0."),
        ({"inner": {"ratio": float("inf")}}, "Setting top.inner.ratio must be a finite number, not inf."),
        ({"inner": {"num_things": "two"}}, "Setting top.inner.num_things must be a whole number."),
        ({"inner": {"ratio": []}}, "Setting top.inner.ratio must be a number."),
        ({"inner": 3}, "Setting top.inner must be a mapping of settings, not 3."),
        ({"free": "x"}, "Setting top.free must be a mapping of settings."),
        ({"is_on": "yes"}, "Setting top.is_on must be true or false."),
        ({"name": 5}, "Setting top.name must be a text, not 5."),
        ({"name": ""}, "Setting top.name must not be empty."),
        ({"name": "abcd"}, "Setting top.name must have at most 3 characters."),
        ({"name": "A"}, "Setting top.name must match ^[a-z]*$."),
        ({"must": None}, "Setting top.must must be a whole number."),
        ({"inner": {"num_thing": 2}}, "Unknown setting top.inner.num_thing: did you mean num_things?"),
        ({"knd": "cpu"}, "Unknown setting top.knd: did you mean kind?"),
        ({"zzz": 1}, "Unknown setting top.zzz: remove it or correct its name."),
    ],
)
def test_each_fault_names_the_setting_with_its_place_and_the_mend(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({"must": 1} | values)
    assert sentence(caught.value, Outer, "top.") == said


def test_a_misspelt_name_is_not_called_missing() -> None:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({"musst": 1})
    assert sentence(caught.value, Outer) == "Unknown setting musst: did you mean must?"
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({})
    assert sentence(caught.value, Outer) == "Setting must is missing: add it."


def test_names_that_a_reader_would_ignore_are_refused() -> None:
    refuse_unknown(["host", "port"], {"host", "port"}, "http_options.")
    with pytest.raises(ValueError, match=r"^Unknown setting http_options\.prot: did you mean port\?$"):
        refuse_unknown(["prot"], {"host", "port"}, "http_options.")


def test_an_error_of_a_file_is_told_without_the_systems_number() -> None:
    said = "/x cannot be used (No such file or directory): correct its name or its permissions."
    assert of_file(FileNotFoundError(2, "No such file or directory", "/x")) == said
    assert of_file(OSError("the store is away.")) == "the store is away."

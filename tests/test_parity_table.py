"""The table beside the scenarios has every function of the reference, and every one of its arguments."""

import re
from pathlib import Path

import pytest
from test_house import REFERENCE_ARGUMENTS

README = (Path(__file__).parent / "parity" / "README.md").read_text()


def listed():
    """The names in the second column, for each in the first."""
    table = README[README.index("## Every argument") : README.index("## Intended differences")]
    found, functions = {}, []
    for first, second in re.findall(r"^\| (.*?)\| (.*?) \|", table, re.MULTILINE):
        functions = re.findall(r"`(\w+)`", first) or functions
        for function in functions:
            found.setdefault(function, []).extend(re.findall(r"`(\*?\w+)`", second))
    return found


@pytest.mark.parametrize("function", REFERENCE_ARGUMENTS)
def test_every_argument_is_in_the_table(function):
    missing = set(REFERENCE_ARGUMENTS[function].split()) - set(listed()[function])
    assert not missing, f"tests/parity/README.md does not say where {sorted(missing)} of {function} are"


@pytest.mark.parametrize(
    "name",
    "enable_named_call disable_named_call override_named_call psum pmean pmax pmin all_gather axis_index In Out broadcast"
    " Partitioned AxisMetadata add_axis remove_axis Variable".split(),
)
def test_every_other_name_is_mentioned(name):
    assert re.search(rf"\b{name}\b", README), f"tests/parity/README.md does not say where {name} is"

"""The tree of errors: drawn as it is, and every branch with the exit status that the command promises."""

import inspect
import re

import pytest

from frem_search import errors
from frem_search.errors import FremSearchError, ParameterError, UsageError

ERRORS = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, Exception)]


def test_the_tree_in_the_docstring_is_the_one_in_the_code():
    drawn, above = {}, []
    for line in inspect.cleandoc(errors.__doc__).splitlines():
        if found := re.match(r"([│ ]*)(?:[├└]── )?(\w+Error)\b", line):
            depth = (len(found[1]) + 4 * ("──" in line)) // 4
            above = [*above[:depth], found[2]]
            drawn[found[2]] = above[-2] if depth else "Exception"
    assert drawn == {each.__name__: each.__base__.__name__ for each in ERRORS}


@pytest.mark.parametrize("error", ERRORS)
def test_what_was_asked_wrongly_is_2_and_everything_else_1(error):
    assert issubclass(error, FremSearchError)
    assert error.exit_status == (2 if issubclass(error, UsageError) else 1)
    assert error.__doc__


def test_a_wrong_parameter_says_name_expected_and_got():
    error = ParameterError("B", "0 to 16", got="many")
    assert (error.name, str(error)) == ("B", "B: expected 0 to 16, but got 'many'.")

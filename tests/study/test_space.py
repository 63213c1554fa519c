"""The search space: what a study file may say about a parameter, and what it becomes."""

import itertools
import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from frem_search.errors import StudyFileError
from frem_search.study.samplers import distributions
from frem_search.study.space import (
    Choice,
    Fixed,
    Range,
    corners,
    parse_space,
    resolve,
    searched,
    space_from_json,
    space_to_json,
)

SPACE = {
    "depth": Fixed(4),
    "B": Range(0, 512),
    "X": Range(1.0, 1000.0, log=True),
    "learning_rate": Range(0.0, 1.0, step=0.25),
    "batch_size": Range(2, 8, step=2),
    "normalization": Choice(("batch_norm", "batch_renorm")),
    "image_size": Choice(([64, 96], [128, 128])),
}


def parse(value):
    return parse_space({"p": value}, where="s.toml: params")["p"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (4, Fixed(4)),
        ("text", Fixed("text")),
        (False, Fixed(False)),
        ({"value": [64, 96]}, Fixed([64, 96])),
        ([1, 2], Choice((1, 2))),
        ([[64, 96], [32, 32]], Choice(([64, 96], [32, 32]))),
        ({"low": 1, "high": 512}, Range(1, 512)),
        ({"low": 1e-4, "high": 1e-2, "log": True}, Range(1e-4, 1e-2, log=True)),
        ({"low": 0.0, "high": 1.0, "step": 0.1}, Range(0.0, 1.0, step=0.1)),
        ({"low": -(2**63), "high": 2**63 - 1}, Range(-(2**63), 2**63 - 1)),
    ],
)
def test_a_value_is_fixed_a_list_is_a_choice_a_table_is_a_range(value, expected):
    assert parse(value) == expected


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"low": 2, "high": 1}, "p: low must be below high, but got 2 and 1. Swap them"),
        ({"low": 1, "high": 1}, "p: low must be below high, but got 1 and 1. Swap them, or write the value alone"),
        ({"low": 1}, "p: a range has the keys low and high, and may have log and step, but got low"),
        ({}, "p: a range has the keys low and high, and may have log and step, but got {}"),
        ({"low": 1, "hihg": 2}, "but got low, hihg. Write for example"),
        ({"low": 1, "high": 2, "steps": 1}, "but got low, high, steps"),
        ({"value": 1, "low": 2}, "but got value, low"),
        ({"low": "1", "high": 2}, "p.low: expected a number, but got '1'"),
        ({"low": True, "high": 2}, "p.low: expected a number, but got True"),
        ({"low": 1, "high": None}, "p.high: expected a number, but got None"),
        ({"low": 1, "high": [2]}, "p.high: expected a number, but got [2]"),
        ({"low": 1, "high": 2, "step": "1"}, "p.step: expected a number, but got '1'"),
        ({"low": math.nan, "high": 2.0}, "p.low: expected a finite number, but got nan"),
        ({"low": 1.0, "high": math.inf}, "p.high: expected a finite number, but got inf"),
        ({"low": 1.0, "high": 2.0, "step": math.nan}, "p.step: expected a finite number, but got nan"),
        ({"low": 1, "high": 10**400}, "p.high: expected an integer of at most 64 bits, but got one of 1329 bits"),
        ({"low": 1, "high": 2, "log": 1}, "p.log: expected true or false, but got 1"),
        ({"low": 0, "high": 2, "log": True}, "p: a logarithmic range must begin above 0, but low is 0. Raise low"),
        ({"low": -1.0, "high": 2.0, "log": True}, "must begin above 0, but low is -1.0"),
        (
            {"low": 1, "high": 3, "step": 0},
            "p.step: expected a step above 0 and at most 2, an integer as both ends are",
        ),
        ({"low": 1, "high": 3, "step": -1}, "but got -1"),
        ({"low": 1, "high": 3, "step": 3}, "at most 2, an integer as both ends are, without log, but got 3"),
        ({"low": 1, "high": 3, "step": 0.5}, "an integer as both ends are, without log, but got 0.5"),
        ({"low": 1, "high": 3, "step": 1, "log": True}, "without log, but got 1 with log"),
        (
            {"low": 1, "high": 512, "step": 10},
            "a step that leads from 1 to 512, but got 10, which ends at 511. Write that",
        ),
        ({"low": 0.0, "high": 1.0, "step": 0.3}, "from 0.0 to 1.0, but got 0.3, which ends at 0.9"),
        ([], "p: a choice needs at least one value, but got []. Write a value, a list or a range"),
        ([1, 2, 1], "p: every choice must stand once, but 1 stands twice. Remove one"),
        ([[1, 2], [1, 2]], "every choice must stand once, but [1, 2] stands twice"),
        ([1.0, math.nan], "p: expected a finite number, but got nan"),
        (math.inf, "p: expected a finite number, but got inf"),
        ({"value": [1.0, -math.inf]}, "p.value: expected a finite number, but got -inf"),
        (2**63, "p: expected an integer of at most 64 bits, but got one of 64 bits"),
    ],
)
def test_a_wrong_parameter_is_told_by_place_expected_and_got(value, says):
    with pytest.raises(StudyFileError, match=r"^s\.toml: params\.p") as raised:
        parse(value)
    assert says in str(raised.value)


def test_optuna_gets_the_distribution_that_the_range_means():
    made = distributions(SPACE)
    assert made == {
        "B": IntDistribution(0, 512),
        "X": FloatDistribution(1.0, 1000.0, log=True),
        "learning_rate": FloatDistribution(0.0, 1.0, step=0.25),
        "batch_size": IntDistribution(2, 8, step=2),
        "normalization": CategoricalDistribution(("batch_norm", "batch_renorm")),
        "image_size": CategoricalDistribution(("[64, 96]", "[128, 128]")),
    }


def test_one_float_end_makes_a_range_of_floats():
    assert distributions({"X": parse({"low": 1, "high": 10.0})}) == {"X": FloatDistribution(1.0, 10.0)}


def test_a_trial_gets_its_values_as_the_study_file_spells_them():
    drawn = {"B": 3, "X": 2.5, "learning_rate": 0.25, "batch_size": 4, "normalization": "batch_norm"}
    assert resolve(SPACE, drawn | {"image_size": "[64, 96]"}) == drawn | {"depth": 4, "image_size": [64, 96]}


def test_the_contract_holds_the_space_and_gives_it_back():
    stored = json.loads(json.dumps(space_to_json(SPACE)))
    assert space_from_json(stored) == SPACE


def test_the_order_in_the_file_does_not_change_the_contract():
    backwards = dict(reversed(SPACE.items()))
    assert json.dumps(space_to_json(SPACE)) == json.dumps(space_to_json(backwards))


def test_searched_keeps_the_order_of_the_file():
    assert searched(SPACE) == ("B", "X", "learning_rate", "batch_size", "normalization", "image_size")


def test_corners_are_all_combinations_of_edges():
    space = {"B": Range(0, 512), "depth": Fixed(4), "base_channels": Choice((4, 8))}
    assert list(corners(space)) == [
        {"B": b, "depth": 4, "base_channels": c} for b, c in itertools.product((0, 512), (4, 8))
    ]


def test_every_edge_is_a_corner_however_many_parameters_there_are():
    space = {f"p{i}": Range(0, 1) for i in range(14)}
    found = list(corners(space))
    assert len(found) < 2**12
    assert {name for corner in found for name, value in corner.items() if value == 1} == set(space)


def test_a_space_without_parameters_has_one_corner():
    assert list(corners({})) == [{}]


numbers = st.integers(-100, 100) | st.floats(-100, 100)
ranges = st.fixed_dictionaries(
    {"low": numbers, "high": numbers},
    optional={"log": st.booleans(), "step": st.sampled_from([1, 2, 3, 0.1, 0.5])},
)


@given(st.dictionaries(st.sampled_from("abc"), ranges | st.lists(numbers, max_size=3) | numbers))
@settings(derandomize=True, max_examples=1000, deadline=None, database=None)
def test_what_parses_has_distributions_that_hold_its_edges(table):
    try:
        space = parse_space(table, where="s.toml: params")
    except StudyFileError as error:
        assert re.match(r"s.toml: params[.][abc]", str(error))  # noqa: PT017 both outcomes are right
        return
    made = distributions(space)
    assert set(made) == set(searched(space))
    for name, distribution in made.items():
        for edge in space[name].bounds():
            assert distribution._contains(distribution.to_internal_repr(edge))
    assert space_from_json(json.loads(json.dumps(space_to_json(space)))) == space

"""What is refused: numbers that are not finite or out of range, and unknown names."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest

from sbac.guards import all_finite, first_not_finite, nearest, require_number, require_whole


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_number_anywhere_is_found(dtype: Any, bad: float) -> None:
    batch = np.ones((4, 2, 3), dtype)
    assert all_finite(batch)
    for place in np.ndindex(batch.shape):
        spoilt = batch.copy()
        spoilt[place] = bad
        assert not all_finite(spoilt)
        assert not all_finite(spoilt.T)
        assert first_not_finite(spoilt) == place[0]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_large_numbers_are_finite_though_their_squares_are_not(dtype: Any) -> None:
    largest = np.finfo(dtype).max
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all_finite(np.array([largest, -largest, 1], dtype))
        assert not all_finite(np.array([largest, -largest, np.inf], dtype))


def test_whole_numbers_and_empty_arrays_are_finite() -> None:
    for array in (np.array([1, 2]), np.array([True]), np.array([255], np.uint8), np.zeros((3, 0)), np.array(1.0)):
        assert all_finite(array)


def test_the_first_bad_row_is_named() -> None:
    assert first_not_finite(np.array([0.0, 1.0, np.nan, np.inf])) == 2
    assert first_not_finite(np.array([[0, 0], [0, np.inf], [np.nan, 0]])) == 1


def test_the_nearest_name_is_suggested() -> None:
    known = ["gamma", "gae_lambda", "learning_rate"]
    assert nearest("gama", known) == "; did you mean 'gamma'?"
    assert nearest("LEARNING-RATE", known) == "; did you mean 'learning_rate'?"
    assert nearest("zzz", known) == "; known: gae_lambda, gamma, learning_rate"
    assert nearest("zzz", []) == "; known: "


@pytest.mark.parametrize("value", [0, 0.5, 1, np.float32(0.25), np.int64(1)])
def test_a_number_in_its_range_is_accepted(value: Any) -> None:
    require_number("gamma", value, minimum=0, maximum=1)


@pytest.mark.parametrize("value", [-0.01, 1.01, math.nan, math.inf, -math.inf, True, "0.5", None, [0.5], 1j])
def test_what_is_no_number_in_its_range_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^gamma must be a finite number at least 0 and at most 1, not ") as caught:
        require_number("gamma", value, minimum=0, maximum=1)
    assert str(caught.value).endswith(repr(value))


def test_open_ends_leave_out_the_bound() -> None:
    require_number("tau", 1e-300, above=0, maximum=1)
    with pytest.raises(ValueError, match=r"tau must be a finite number above 0 and at most 1, not 0"):
        require_number("tau", 0, above=0, maximum=1)
    with pytest.raises(ValueError, match=r"alpha must be a finite number at least 0 and below 1, not 1"):
        require_number("alpha", 1, minimum=0, below=1)
    require_number("ent_coef", -1e300)
    with pytest.raises(ValueError, match=r"^ent_coef must be a finite number, not nan$"):
        require_number("ent_coef", math.nan)


def test_schedules_are_left_to_be_checked_as_they_are_used() -> None:
    require_number("learning_rate", lambda progress: -progress, above=0)


@pytest.mark.parametrize(("value", "whole"), [(3, 3), (1e5, 100_000), (np.int64(7), 7), (np.float32(2), 2)])
def test_whole_numbers_are_accepted_as_floats_too(value: Any, whole: int) -> None:
    result = require_whole("n_steps", value, 2)
    assert result == whole
    assert type(result) is int


@pytest.mark.parametrize("value", [1, 2.5, True, "3", None, math.nan, math.inf, [3]])
def test_what_is_no_whole_number_of_the_minimum_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^n_steps must be a whole number, at least 2, not ") as caught:
        require_whole("n_steps", value, 2)
    assert str(caught.value).endswith(repr(value))

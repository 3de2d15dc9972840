"""What is refused: numbers that are not finite or out of range, and unknown names."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest

from sbac.guards import (
    nearest,
    read_train_freq,
    require_constant,
    require_number,
    require_whole,
)
from sbac.schedules import CosineSchedule, LinearSchedule
from sbac.trees import all_finite, first_not_finite


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
def test_the_largest_numbers_are_finite(dtype: Any) -> None:
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


def test_schedules_are_checked_at_both_ends() -> None:
    require_number("gamma", LinearSchedule(0.0, 1.0), minimum=0, maximum=1)
    require_number("gamma", lambda progress: np.float32(progress), minimum=0, maximum=1)
    asked: list[float] = []

    def schedule(progress: float) -> float:
        asked.append(progress)
        return 0.5

    require_number("gamma", schedule, maximum=1)
    assert sorted(asked) == [0, 1]
    with pytest.raises(
        ValueError,
        match=r"^tau with 1 of the progress remaining must be a finite number at least 0 and at most 1, not 2.0$",
    ):
        require_number("tau", LinearSchedule(2, 1), minimum=0, maximum=1)
    with pytest.raises(ValueError, match=r"^tau with 0 of the progress remaining must be .* at most 1, not 1\.5$"):
        require_number("tau", LinearSchedule(1, 1.5), minimum=0, maximum=1)
    for wrong in (math.nan, math.inf, None, "0.5", [0.5], True):
        with pytest.raises(ValueError, match=r"^tau with 1 of the progress remaining must be a finite number, not "):
            require_number("tau", lambda _, wrong=wrong: wrong)


@pytest.mark.parametrize("schedule", [LinearSchedule(1e-3, 0.0), CosineSchedule(0.0, 1e-3), lambda _: 0.0])
def test_a_schedule_may_reach_a_bound_that_a_number_must_not_lie_on(schedule: Any) -> None:
    require_number("learning_rate", schedule, above=0)
    require_number("share", lambda progress: 1 - schedule(progress), minimum=0, below=1)
    with pytest.raises(
        ValueError, match=r"^learning_rate with [01] of the progress remaining .* at least 0, not -1e-09$"
    ):
        require_number(
            "learning_rate", lambda progress: min(schedule(progress), schedule(1 - progress)) - 1e-9, above=0
        )
    with pytest.raises(ValueError, match=r"^share with 1 of .* at most 1, not 1\.5"):
        require_number("share", lambda progress: 1 + progress / 2, below=1)
    with pytest.raises(ValueError, match="above 0, not 0"):
        require_number("learning_rate", 0.0, above=0)


def test_where_a_constant_is_needed_schedules_are_refused() -> None:
    require_constant("dropout", 0.0, minimum=0, below=1)
    for schedule in (LinearSchedule(0.5, 0.1), lambda _: 0.1):
        with pytest.raises(
            ValueError, match=r"^dropout must be a finite number at least 0 and below 1, not "
        ) as caught:
            require_constant("dropout", schedule, minimum=0, below=1)
        assert str(caught.value).endswith(repr(schedule))
    with pytest.raises(ValueError, match=r"below 1, not 1$"):
        require_constant("dropout", 1, minimum=0, below=1)


@pytest.mark.parametrize(
    ("given", "read"),
    [(1, (1, "step")), (4.0, (4, "step")), ((3, "step"), (3, "step")), ([2, "episode"], (2, "episode"))],
)
def test_how_often_to_learn(given: Any, read: tuple[int, str]) -> None:
    assert read_train_freq(given) == read
    assert type(read_train_freq(given)[0]) is int


@pytest.mark.parametrize(
    "wrong", [0, -1, 1.5, "1", None, (0, "step"), (1.5, "episode"), (1, "step", 2), ("step", "step")]
)
def test_wrong_numbers_of_how_often_to_learn_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"^train_freq must be a whole number, at least 1, not "):
        read_train_freq(wrong)


@pytest.mark.parametrize("wrong", [(1, "epoch"), (1, 1), ["episode", 1], (1, ["step"])])
def test_wrong_units_of_how_often_to_learn_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"^train_freq counts in 'step' or 'episode', not in "):
        read_train_freq(wrong)


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

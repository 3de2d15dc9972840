"""Schedules against their closed forms, as data, and as recipes and the command line write them."""

import json
import math

import numpy as np
import pytest

from sbac.schedules import (
    ConstantSchedule,
    CosineSchedule,
    ExponentialSchedule,
    LinearSchedule,
    PiecewiseSchedule,
    Schedule,
    parse_schedule,
    schedule_from_config,
    value_at,
)

EXAMPLES = [
    ConstantSchedule(0.5),
    LinearSchedule(0.3, 0.1),
    LinearSchedule(0.3, 0.1, end_fraction=0.25),
    PiecewiseSchedule([(0.1, 1.0), (0.5, 0.2), (0.9, 0.4)]),
    CosineSchedule(0.3, 0.1),
    ExponentialSchedule(0.3, 0.1),
]


def values(schedule: Schedule, *done: float) -> list[float]:
    return [schedule(1.0 - fraction) for fraction in done]


# Closed forms.


def test_constant():
    assert values(ConstantSchedule(0.25), 0.0, 0.4, 1.0) == [0.25, 0.25, 0.25]


def test_linear():
    assert values(LinearSchedule(2.0, 1.0), 0.0, 0.25, 0.5, 1.0) == [2.0, 1.75, 1.5, 1.0]


def test_linear_reaches_its_end_early_and_stays():
    schedule = LinearSchedule(2.0, 1.0, end_fraction=0.5)
    assert values(schedule, 0.0, 0.25, 0.5, 0.75, 1.0) == [2.0, 1.5, 1.0, 1.0, 1.0]


def test_piecewise():
    schedule = PiecewiseSchedule([(0.25, 1.0), (0.5, 3.0), (0.75, 0.0)])
    assert values(schedule, 0.0, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0) == [1.0, 1.0, 2.0, 3.0, 1.5, 0.0, 0.0]


def test_piecewise_with_one_point_is_constant():
    assert values(PiecewiseSchedule([(0.5, 7.0)]), 0.0, 0.5, 1.0) == [7.0, 7.0, 7.0]


def test_cosine():
    # Half a wave: at one third of the way, (1 - cos 60 degrees) / 2 = 1/4 of the difference is done.
    schedule = CosineSchedule(2.0, 1.0)
    assert values(schedule, 0.0, 1 / 3, 0.5, 2 / 3, 1.0) == pytest.approx([2.0, 1.75, 1.5, 1.25, 1.0])


def test_exponential():
    schedule = ExponentialSchedule(1.0, 1e-4)
    assert values(schedule, 0.0, 0.25, 0.5, 1.0) == pytest.approx([1.0, 0.1, 0.01, 1e-4])


@pytest.mark.parametrize("kind", [LinearSchedule, CosineSchedule, ExponentialSchedule])
def test_both_ends_are_exact(kind):
    for start, end in [(7e-4, 1e-5), (0.1, 0.3), (1e-3, 1e-3 / 3)]:
        assert values(kind(start, end), 0.0, 1.0) == [start, end]


@pytest.mark.parametrize("schedule", EXAMPLES, ids=repr)
def test_progress_outside_the_training_counts_as_the_nearer_end(schedule):
    assert schedule(1.5) == schedule(1.0)
    assert schedule(-0.5) == schedule(0.0)


# As data.


@pytest.mark.parametrize("schedule", EXAMPLES, ids=repr)
def test_config_survives_json(schedule):
    config = schedule.to_config()
    restored = schedule_from_config(json.loads(json.dumps(config, allow_nan=False)))

    assert json.loads(json.dumps(config)) == config
    assert restored == schedule and type(restored) is type(schedule)
    assert values(restored, 0.0, 0.3, 0.7, 1.0) == values(schedule, 0.0, 0.3, 0.7, 1.0)


def test_config_is_readable():
    config = LinearSchedule(0.3, 0.1).to_config()
    assert config == {"kind": "linear", "start": 0.3, "end": 0.1, "end_fraction": 1.0}


def test_numpy_numbers_become_data():
    config = LinearSchedule(np.float32(0.5), np.int64(0)).to_config()
    assert json.loads(json.dumps(config)) == {"kind": "linear", "start": 0.5, "end": 0.0, "end_fraction": 1.0}


def test_schedule_cannot_be_changed_but_can_be_a_key():
    schedule = PiecewiseSchedule([(0.0, 1.0), (1.0, 0.0)])
    with pytest.raises(AttributeError):
        schedule.points = ()
    assert {schedule: 1}[PiecewiseSchedule(((0, 1), (1, 0)))] == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "sawtooth", "start": 1.0}, "Unknown kind of schedule 'sawtooth'.*'cosine'.*'linear'"),
        ({"start": 1.0, "end": 0.0}, "Unknown kind of schedule None"),
        ({"kind": ["linear"]}, r"Unknown kind of schedule \['linear'\]"),
        ({"kind": "linear", "start": 1.0}, r"A linear schedule takes .*'end_fraction'\], got \['start'\]"),
        ({"kind": "cosine", "start": 1.0, "end": 0.0, "period": 2}, "A cosine schedule takes.*'period'"),
        ({"kind": "linear", "start": "fast", "end": 0.0}, "start must be a finite number, got 'fast'"),
        ({"kind": "constant", "value": 10**400}, "value must be a finite number"),
    ],
)
def test_bad_config_is_explained(config, message):
    with pytest.raises(ValueError, match=message):
        schedule_from_config(config)


# Bad arguments.


@pytest.mark.parametrize("value", [math.nan, math.inf, "0.1", None, True, 1j])
def test_value_that_is_no_finite_number_is_named(value):
    with pytest.raises(ValueError, match="ConstantSchedule: value must be a finite number, got "):
        ConstantSchedule(value)
    with pytest.raises(ValueError, match="CosineSchedule: end must be a finite number, got "):
        CosineSchedule(0.1, value)


@pytest.mark.parametrize("end_fraction", [0.0, -0.1, 1.1])
def test_end_fraction_out_of_range(end_fraction):
    with pytest.raises(ValueError, match=r"end_fraction must be in \(0, 1\], got"):
        LinearSchedule(1.0, 0.0, end_fraction)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ([], "at least one pair"),
        ([(0.5, 1.0), (0.2, 0.0)], r"must increase within \[0, 1\], got \[0.5, 0.2\]"),
        ([(0.5, 1.0), (0.5, 0.0)], "must increase"),
        ([(-0.1, 1.0), (0.5, 0.0)], r"within \[0, 1\]"),
        ([(0.5, 1.0), (1.5, 0.0)], r"within \[0, 1\]"),
        ([0.5, 1.0], "must be pairs"),
        ([(0.5, 1.0, 2.0)], "must be pairs"),
        (3.0, "must be pairs"),
        ([(0.5, math.nan)], "a value of points must be a finite number, got nan"),
        ([("half", 1.0)], "a fraction of points must be a finite number, got 'half'"),
    ],
)
def test_bad_points_are_explained(points, message):
    with pytest.raises(ValueError, match=message):
        PiecewiseSchedule(points)


@pytest.mark.parametrize(("start", "end", "name"), [(0, 1, "start"), (-1, 1, "start"), (1, 0, "end")])
def test_exponential_needs_positive_ends(start, end, name):
    with pytest.raises(ValueError, match=f"{name} must be above 0.*LinearSchedule"):
        ExponentialSchedule(start, end)


# As text.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (0.001, 0.001),
        (1, 1.0),
        ("0.001", 0.001),
        (" 7e-4 ", 7e-4),
        ("lin_0.001", LinearSchedule(0.001, 0.0)),
        ("lin_7e-4", LinearSchedule(7e-4, 0.0)),
        ("linear(0.001, 0.0001)", LinearSchedule(0.001, 0.0001)),
        ("linear(1e-3,1e-4,0.5)", LinearSchedule(1e-3, 1e-4, 0.5)),
        ("cosine(0.001, 0)", CosineSchedule(0.001, 0.0)),
        (" exponential( 1e-3 , 1e-5 ) ", ExponentialSchedule(1e-3, 1e-5)),
    ],
)
def test_text_is_read(text, expected):
    result = parse_schedule(text)
    assert result == expected and type(result) is type(expected)


NOT_A_SCHEDULE = ["", "fast", "nan", "inf", "lin_", "lin_x", "linear", "linear()", "linear(a, b)"]
NOT_A_SCHEDULE += ["linear(1, 2", "linear(1, 2)(3)", "sawtooth(1, 2)", "__import__('os')"]
NOT_A_SCHEDULE += [math.nan, None, True, [0.1]]


@pytest.mark.parametrize("text", NOT_A_SCHEDULE)
def test_other_text_is_refused_and_the_forms_are_shown(text):
    with pytest.raises(ValueError, match=r"Cannot read .* write 0.001, 'lin_0.001'.*'cosine\(0.001, "):
        parse_schedule(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("linear(0.1)", r"Cannot read 'linear\(0.1\)': linear needs a start and an end, got 1 number"),
        ("cosine(1, 2, 3)", "cosine needs a start and an end, got 3 number"),
        ("linear(1, 0, 2)", r"Cannot read 'linear\(1, 0, 2\)': LinearSchedule: end_fraction must be"),
        ("exponential(1, 0)", "Cannot read .*: ExponentialSchedule: end must be above 0"),
    ],
)
def test_text_with_bad_numbers_is_explained(text, message):
    with pytest.raises(ValueError, match=message):
        parse_schedule(text)


# At a time.


@pytest.mark.parametrize("number", [0.5, np.float32(0.5), np.float64(0.5)])
def test_number_passes_through_as_float(number):
    result = value_at(number, 0.3)
    assert result == 0.5 and type(result) is float


def test_schedule_and_plain_function_are_asked():
    assert value_at(LinearSchedule(1.0, 0.0), 0.25) == 0.25
    assert value_at(lambda progress_remaining: progress_remaining**2, 0.5) == 0.25
    assert value_at(lambda _: np.float32(0.5), 0.5) == 0.5


@pytest.mark.parametrize("returned", [math.nan, math.inf, None, "0.1", 1j, True, np.ones(2)], ids=repr)
def test_function_that_returns_no_finite_number_is_named_with_what_it_returned(returned):
    def my_schedule(progress_remaining: float) -> object:
        return returned

    with pytest.raises(ValueError) as caught:
        value_at(my_schedule, 0.75)

    message = str(caught.value)
    assert "my_schedule" in message and f"returned {returned!r} at progress_remaining=0.75" in message


@pytest.mark.parametrize("value", [None, "lin_0.1"])
def test_value_that_is_neither_number_nor_schedule(value):
    with pytest.raises(ValueError, match="Expected a number or a callable of progress_remaining, got"):
        value_at(value, 0.5)

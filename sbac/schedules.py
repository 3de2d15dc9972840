"""A hyperparameter as a function of progress; as data, so that it can be saved.

A schedule is called with `progress_remaining`, as in Stable-Baselines: 1.0 at the start of training, 0.0 at
its end. Progress outside [0, 1] counts as the nearer end. Any callable with that argument will do where a
schedule is asked for, but only a `Schedule` can be written into a model file as data.
"""

import math
import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from numbers import Real
from typing import Any, ClassVar, TypeAlias


@dataclass(frozen=True)
class Schedule(ABC):
    """A number that depends on the progress of training."""

    kind: ClassVar[str]

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, self._finite(field.name, getattr(self, field.name)))

    @abstractmethod
    def __call__(self, progress_remaining: float) -> float:
        """Return the value when this share of the training remains: 1.0 at the start, 0.0 at the end."""

    def to_config(self) -> dict[str, Any]:
        """Return the schedule as data that JSON can hold; `schedule_from_config` turns it back."""
        return {"kind": self.kind, **{field.name: getattr(self, field.name) for field in fields(self)}}

    def _finite(self, name: str, value: object) -> float:
        number = _finite_number(value)
        if number is None:
            raise ValueError(f"{type(self).__name__}: {name} must be a finite number, got {value!r}.")
        return number


FloatOrSchedule: TypeAlias = float | Schedule | Callable[[float], float]


@dataclass(frozen=True)
class ConstantSchedule(Schedule):
    """The same value throughout.

    Args:
        value: the value, any finite number.
    """

    kind = "constant"

    value: float

    def __call__(self, progress_remaining: float) -> float:
        return self.value


@dataclass(frozen=True)
class LinearSchedule(Schedule):
    """A straight line from `start` to `end`, and `end` from there on.

    Args:
        start: value at the start of training.
        end: value once `end_fraction` of the training is done.
        end_fraction: share of the training that the line takes, in (0, 1].

    Raises:
        ValueError: if an argument is not finite or `end_fraction` is outside (0, 1].
    """

    kind = "linear"

    start: float
    end: float
    end_fraction: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.end_fraction <= 1.0:
            raise ValueError(f"LinearSchedule: end_fraction must be in (0, 1], got {self.end_fraction!r}.")

    def __call__(self, progress_remaining: float) -> float:
        return _between(self.start, self.end, min(_done(progress_remaining) / self.end_fraction, 1.0))


@dataclass(frozen=True)
class PiecewiseSchedule(Schedule):
    """Straight lines through given points; constant before the first and after the last.

    Args:
        points: pairs (fraction of the training done, value), fractions in [0, 1] and increasing.

    Raises:
        ValueError: if there is no point, a point is not a pair of finite numbers, or the fractions do not
            increase within [0, 1].
    """

    kind = "piecewise"

    points: Sequence[tuple[float, float]]

    def __post_init__(self) -> None:
        try:
            pairs = [(fraction, value) for fraction, value in self.points]
        except (TypeError, ValueError):
            raise ValueError(
                f"PiecewiseSchedule: points must be pairs (fraction done, value), got {self.points!r}."
            ) from None
        if not pairs:
            raise ValueError("PiecewiseSchedule: points must hold at least one pair (fraction done, value).")
        points = tuple(
            (self._finite("a fraction of points", fraction), self._finite("a value of points", value))
            for fraction, value in pairs
        )

        fractions = [fraction for fraction, _ in points]
        if fractions[0] < 0.0 or fractions[-1] > 1.0 or any(a >= b for a, b in pairwise(fractions)):
            raise ValueError(
                f"PiecewiseSchedule: the fractions of points must increase within [0, 1], got {fractions}."
            )
        object.__setattr__(self, "points", points)

    def __call__(self, progress_remaining: float) -> float:
        done = _done(progress_remaining)
        after = bisect_right(self.points, done, key=lambda point: point[0])
        if after == 0:
            return self.points[0][1]
        if after == len(self.points):
            return self.points[-1][1]

        (left, start), (right, end) = self.points[after - 1], self.points[after]
        return _between(start, end, (done - left) / (right - left))

    def to_config(self) -> dict[str, Any]:
        return {"kind": self.kind, "points": [list(point) for point in self.points]}


@dataclass(frozen=True)
class CosineSchedule(Schedule):
    """Half a cosine wave from `start` to `end`: flat at both ends, steepest in the middle.

    Loshchilov & Hutter 2017, arXiv:1608.03983, equation 5, without restarts.

    Args:
        start: value at the start of training.
        end: value at the end of training.
    """

    kind = "cosine"

    start: float
    end: float

    def __call__(self, progress_remaining: float) -> float:
        return _between(self.start, self.end, 0.5 * (1.0 - math.cos(math.pi * _done(progress_remaining))))


@dataclass(frozen=True)
class ExponentialSchedule(Schedule):
    """A geometric decay (or growth): equal shares of the training change the value by equal factors.

    Args:
        start: value at the start of training, above 0.
        end: value at the end of training, above 0.

    Raises:
        ValueError: if an end is not a finite number above 0.
    """

    kind = "exponential"

    start: float
    end: float

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("start", self.start), ("end", self.end)):
            if value <= 0.0:
                raise ValueError(
                    f"ExponentialSchedule: {name} must be above 0, got {value!r}: a geometric decay never "
                    "reaches 0; use LinearSchedule or CosineSchedule for that."
                )

    def __call__(self, progress_remaining: float) -> float:
        done = _done(progress_remaining)
        return float(self.start ** (1.0 - done) * self.end**done)


_KINDS: dict[str, type[Schedule]] = {
    schedule.kind: schedule
    for schedule in (ConstantSchedule, LinearSchedule, PiecewiseSchedule, CosineSchedule, ExponentialSchedule)
}


def schedule_from_config(config: Mapping[str, Any]) -> Schedule:
    """Build the schedule that `Schedule.to_config` described.

    Args:
        config: the "kind" of the schedule and its arguments by name.

    Returns:
        A schedule equal to the one described.

    Raises:
        ValueError: if the kind is unknown, or the arguments are not those of that kind or have bad values.
    """
    kind = config.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"Unknown kind of schedule {kind!r} in {dict(config)!r}: expected one of {sorted(_KINDS)}.")

    arguments = {name: value for name, value in config.items() if name != "kind"}
    try:
        return _KINDS[kind](**arguments)
    except TypeError:
        expected = [field.name for field in fields(_KINDS[kind])]
        raise ValueError(f"A {kind} schedule takes {expected}, got {sorted(arguments)}.") from None


def parse_schedule(text_or_number: str | float) -> float | Schedule:
    """Read a number or a schedule as recipes and the command line write it.

    Args:
        text_or_number: a number; or a text: "0.001", "lin_0.001" (linearly to 0, as the RL Zoo writes it),
            "linear(0.001, 0.0001)", "cosine(0.001, 0.0001)" or "exponential(0.001, 0.0001)", each from start
            to end; linear takes a third number as its `end_fraction`.

    Returns:
        The number, or the schedule.

    Raises:
        ValueError: if it is none of these, or the schedule refuses its arguments.
    """
    number = _read_number(text_or_number)
    if number is not None:
        return number

    text = text_or_number.strip() if isinstance(text_or_number, str) else ""
    if text.startswith("lin_") and (start := _read_number(text.removeprefix("lin_"))) is not None:
        return LinearSchedule(start, 0.0)

    call = re.fullmatch(r"(linear|cosine|exponential)\s*\((.*)\)", text)
    numbers = [_read_number(part) for part in call[2].split(",")] if call else []
    if call is None or None in numbers:
        raise ValueError(
            f"Cannot read {text_or_number!r} as a finite number or a schedule: write 0.001, 'lin_0.001' "
            "(linearly to 0), 'linear(0.001, 0.0001)', 'cosine(0.001, 0.0001)' or "
            "'exponential(0.001, 0.0001)'."
        )
    try:
        return _KINDS[call[1]](*numbers)
    except TypeError:
        raise ValueError(
            f"Cannot read {text!r}: {call[1]} needs a start and an end, got {len(numbers)} number(s)."
        ) from None
    except ValueError as error:
        raise ValueError(f"Cannot read {text!r}: {error}") from None


def value_at(value: FloatOrSchedule, progress_remaining: float) -> float:
    """Return the present value of a hyperparameter that is a number or a schedule.

    Args:
        value: a number, which passes through, or a callable of `progress_remaining`.
        progress_remaining: 1.0 at the start of training, 0.0 at its end.

    Returns:
        The value.

    Raises:
        ValueError: if `value` is neither, or the callable returns anything but a finite real number.
    """
    if isinstance(value, Real):
        return float(value)
    if not callable(value):
        raise ValueError(f"Expected a number or a callable of progress_remaining, got {value!r}.")

    result = value(progress_remaining)
    number = _finite_number(result)
    if number is None:
        raise ValueError(
            f"The schedule {value!r} must return a finite number, "
            f"but returned {result!r} at progress_remaining={progress_remaining!r}."
        )
    return number


def _done(progress_remaining: float) -> float:
    return min(max(1.0 - progress_remaining, 0.0), 1.0)


def _between(start: float, end: float, weight: float) -> float:
    """Exact at both ends, which start + weight * (end - start) is not."""
    return (1.0 - weight) * start + weight * end


def _finite_number(value: object) -> float | None:
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _read_number(text_or_number: object) -> float | None:
    if not isinstance(text_or_number, str):
        return _finite_number(text_or_number)
    try:
        return _finite_number(float(text_or_number))
    except ValueError:
        return None

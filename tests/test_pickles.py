"""Pickles read as data: what comes back, and that nothing is called on the way."""

from __future__ import annotations

import collections
import os
import pickle
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
from gymnasium import spaces

from sbac.pickles import Made, Name, describe, read_pickle, restore, state_of

SPACES = [
    spaces.Box(-1, 1, (3,), np.float32),
    spaces.Box(-np.inf, np.inf, (2, 2), np.float64),
    spaces.Box(0, 255, (4, 36, 36), np.uint8),
    spaces.Box(-np.inf, np.inf, (2,), np.int64),
    spaces.Box(-1, 1, (), np.float32),
    spaces.Discrete(4, start=-2),
    spaces.MultiDiscrete([[2, 3], [4, 5]]),
    spaces.MultiBinary(4),
    spaces.MultiBinary([2, 3]),
    spaces.Dict({"b": spaces.Discrete(2), "a": spaces.Box(-1, 1, (2,))}),
    spaces.Dict([("b", spaces.Discrete(2)), ("a", spaces.MultiBinary(2))]),
]


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("library", [pickle, cloudpickle])
@pytest.mark.parametrize("space", SPACES, ids=str)
def test_spaces_come_back(space: Any, library: Any, protocol: int) -> None:
    space.seed(3)  # a generator is in the pickle too, and is of no use
    found = restore(read_pickle(library.dumps(space, protocol)))
    assert found == space and type(found) is type(space)
    assert (found.shape, found.dtype) == (space.shape, space.dtype)
    if isinstance(space, spaces.Dict):
        assert list(found.spaces) == list(space.spaces)
    if isinstance(space, spaces.Box):
        assert (found.bounded_below == space.bounded_below).all() and (found.bounded_above == space.bounded_above).all()


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_plain_values_and_arrays_come_back(protocol: int) -> None:
    array = np.arange(12, dtype=">f8").reshape(3, 4)
    value = {
        "numbers": [1, -(2**40), 2**80, 1.5, True, None, "text", b"bytes"],
        "nested": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [[]], {}),
        "ordered": collections.OrderedDict(b=1, a=2),
        "scalars": [np.float64(3.5), np.int32(4), np.bool_(True)],
    }
    assert restore(read_pickle(pickle.dumps(value, protocol))) == value
    shared = [array, np.asfortranarray(array), array.astype(np.float16), np.array([True, False]), np.array(2.5)]
    for found, expected in zip(restore(read_pickle(pickle.dumps(shared, protocol))), shared, strict=True):
        assert found.dtype == expected.dtype.newbyteorder("=") and found.shape == expected.shape
        assert (found == expected).all()
        assert found.flags.owndata and found.flags.writeable


class Own:
    """Somebody's class."""

    def __init__(self) -> None:
        self.size = 3

    def __reduce__(self) -> Any:
        return os.system, ("exit 1",)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Own(), f"there is an object of {os.system.__module__}.system where"),
        ([spaces.Text(3)], r"gymnasium\.spaces\.text\.Text"),
        ({"a": {1}}, r"builtins\.set"),
        (os.mkdir, "mkdir where"),
        (lambda: 3, "an object of the user's own"),
        (np.array([None]), "an array of str 'O8', not of numbers"),
        ({(1, 2): 3}, "a dict has tuple for a key"),
        (np.random.default_rng(0), "numpy.random._pickle.__generator_ctor"),
    ],
)
def test_everything_else_is_refused_by_name(value: Any, text: str) -> None:
    node = read_pickle(cloudpickle.dumps(value))
    with pytest.raises(ValueError, match=text):
        restore(node)


def test_nothing_is_called(tmp_path: Path) -> None:
    class Trace:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "trace"),), {"state": 1}, iter([1]), iter([("key", 2)])

    (made,) = read_pickle(pickle.dumps([Trace()]))
    assert isinstance(made, Made) and made.path.endswith(".mkdir") and made.args == (str(tmp_path / "trace"),)
    assert (made.state, made.items, made.pairs) == ({"state": 1}, [1], [("key", 2)])
    assert state_of(made, made.path) == {"state": 1}
    with pytest.raises(ValueError, match="where an object of another belongs"):
        state_of(made, "another")
    assert not (tmp_path / "trace").exists()
    assert isinstance(read_pickle(pickle.dumps(Path)), Name)
    assert describe(read_pickle(pickle.dumps(Path))) == "pathlib.Path"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "the pickle cannot be read"),
        (b"\x80\x05K\x01", "the pickle cannot be read"),
        (b".", "IndexError"),
        (b"\x80\x05\x85.", "a tuple lacks its parts"),
        (b"\x80\x05h\x07.", "KeyError"),
        (b"K\x01b.", "damaged"),
        (b"K\x01K\x02b.", "it fills int, which is no object"),
        (b"K\x01K\x02a.", "it appends to int"),
        (b"(K\x01\x82\x01.", "the instruction EXT1"),
        (b"Pname\n.", "the instruction PERSID"),
        (b"(cos\nsystem\no.", "the instruction OBJ"),
        (b"(S'ls'\nios\nsystem\n.", "the instruction"),
        (b"\x80\x05K\x01K\x02\x93.", "without a name"),
        (b"\x80\x05]" + b"2" * 1_000_001 + b".", "more than 1000000 instructions"),
        (b"\x8b\xff\xff\xff\x7f" + b"\x01" * 10 + b".", "cannot be read"),
        (b"\x8e" + b"\xff" * 7 + b"\x7f" + b"x.", "cannot be read"),
    ],
)
def test_damaged_pickles_are_refused(content: bytes, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        read_pickle(content)


def test_few_bytes_cannot_stand_for_much() -> None:
    value: Any = [1] * 10
    for _ in range(60):
        value = [value] * 10  # 10^61 numbers, each list stored once
    node = read_pickle(pickle.dumps(value))
    assert len(describe(node)) < 100
    with pytest.raises(ValueError, match="more than 100000 values"):
        restore(node)
    array = np.zeros(2**20)
    with pytest.raises(ValueError, match="more than 67108864 bytes"):
        restore(read_pickle(pickle.dumps([array] * 100)))
    content = b"]" * 100_000 + b"a" * 99_999 + b"."
    with pytest.raises(ValueError, match="describes no value: RecursionError"):
        restore(read_pickle(content))


def test_damage_never_leads_to_another_error() -> None:
    original = pickle.dumps(spaces.Dict({"a": SPACES[0], "b": SPACES[6]}))
    rng = np.random.default_rng(0)
    refused = 0
    for place in rng.integers(0, len(original), 1500):
        content = bytearray(original)
        content[place] = rng.integers(256)
        try:
            found = restore(read_pickle(bytes(content)))
        except ValueError:
            refused += 1
        else:
            assert found is None or isinstance(
                found, (spaces.Space, dict, str, int, float, bytes, tuple, list, np.ndarray)
            )
    assert refused > 500

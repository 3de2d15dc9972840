"""Values as data: what goes in comes out, bit for bit, and data from elsewhere can do no harm."""

import json
import math
import os
import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import data_equivalence

from sbac.codec import MissingObjectError, decode, encode
from sbac.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from sbac.schedules import LinearSchedule, PiecewiseSchedule

SPACES = [
    spaces.Box(-1.0, 1.0, (3,)),
    spaces.Box(np.array([-np.inf, 0.0, -2.5]), np.array([np.inf, np.inf, 0.1]), dtype=np.float64),
    spaces.Box(0, 255, (4, 84, 84), np.uint8),
    spaces.Box(-np.inf, np.inf, (), np.float16),
    spaces.Box(-np.inf, 7, (2,), np.int64),
    spaces.Box(-(2**63), 2**63 - 2, (2, 1), np.int64),
    spaces.Box(np.zeros(3, bool), np.ones(3, bool), dtype=np.bool_),
    spaces.Box(0.0, 1.0, (0, 5)),
    spaces.Box(-1.0, 1.0, (2,), ">f4"),
    spaces.Discrete(5),
    spaces.Discrete(3, start=-1, dtype=np.int32),
    spaces.MultiDiscrete([3, 4]),
    spaces.MultiDiscrete(np.array([[2, 3], [4, 5]]), start=np.array([[0, -1], [7, 2]]), dtype=np.int32),
    spaces.MultiBinary(4),
    spaces.MultiBinary((2, 3)),
    spaces.MultiBinary((4,)),
    spaces.Tuple((spaces.Discrete(2), spaces.Tuple(()))),
    spaces.Dict({"b": spaces.Discrete(2), "a": spaces.Dict({"__box__": spaces.Box(0, 1)})}),
    spaces.Dict({"b": spaces.Discrete(2), "a": spaces.MultiBinary(2)}, sort_keys=False),
    spaces.Dict([(1, spaces.Discrete(2)), ("a", spaces.MultiBinary(2))]),
]

PLAIN = [
    None,
    True,
    0,
    -(2**80),
    1.0,
    0.1,
    -0.0,
    5e-324,
    math.inf,
    -math.inf,
    "",
    "é\n\0\ud800",
    [],
    (),
    {},
    [1, (2.0, [None, ()]), {"a": (1,)}],
    {"b": 1, "a": 2},
    {1: "int", "1": "str", None: 0, (1, 2): [3], 2.5: ()},
    {True: 1, "x": 2},
]

NUMPY = [
    np.float32(0.1),
    np.float64(-0.0),
    np.int8(-3),
    np.uint64(2**64 - 1),
    np.bool_(True),
    np.complex64(1 - 2j),
    np.str_("text"),
    np.datetime64("2020-01-01", "ns"),
    np.longdouble("0.1"),
    np.array(1.5),
    np.zeros((0, 3), np.complex64),
    np.zeros((2, 0)),
    np.arange(6, dtype=">i2").reshape(2, 3),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.array([-0.0, np.inf, -np.inf], np.float16),
    np.frombuffer(struct.pack("<4I", 0x7FC00001, 0xFFC12345, 0x7F800001, 0x80000000), np.float32),
    np.random.default_rng(0).standard_normal((20, 30)),
    np.array([[True, False]]),
    np.array(["a", "bcd"]),
    np.array(["2020-01-01"], "M8[25s]"),
]


def there_and_back(value: Any) -> Any:
    data, objects = encode(value)
    assert objects == {}
    return decode(json.loads(json.dumps(data, allow_nan=False)))


def same(a: Any, b: Any) -> bool:
    """Equality of type, order and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return len(a) == len(b) and all(
            same(x, y) for pair in zip(a.items(), b.items(), strict=True) for x, y in zip(*pair, strict=True)
        )
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and not isinstance(a, np.generic):
        return struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, np.ndarray | np.generic):
        if a.dtype == np.longdouble:  # ten bytes of number, and padding of no meaning
            return bool(np.array_equal(a, b))
        return a.dtype.str == b.dtype.str and a.shape == b.shape and a.tobytes() == b.tobytes()
    return bool(a == b)


@pytest.mark.parametrize("value", PLAIN + NUMPY, ids=repr)
def test_plain_values_and_arrays_come_back_bit_for_bit(value: Any) -> None:
    assert same(there_and_back(value), value)


def test_nan_comes_back() -> None:
    assert math.isnan(there_and_back(math.nan))


def test_decoded_arrays_are_writable_and_own_their_memory() -> None:
    for array in (np.arange(3.0), np.arange(300.0)):
        assert there_and_back(array).flags.writeable
        there_and_back(array)[0] = 7.0


def test_small_arrays_are_readable_in_the_data() -> None:
    assert encode(np.array([1.5, -2.0], np.float32))[0] == {
        "__array__": {"dtype": "<f4", "shape": [2], "data": [1.5, -2.0]}
    }


@pytest.mark.parametrize(
    "value",
    [
        np.dtype(">f4"),
        np.dtype("M8[ns]"),
        torch.float32,
        torch.bfloat16,
        torch.device("cpu"),
        torch.device("cuda:1"),
        torch.nn.ReLU,
        torch.nn.modules.activation.Tanh,
        torch.optim.Adam,
        np.float32,
        PiecewiseSchedule,
        LinearSchedule(3e-4, 0.0, 0.5),
        PiecewiseSchedule([(0.0, 1.0), (0.5, 0.1)]),
    ],
    ids=repr,
)
def test_types_classes_and_schedules_come_back_equal(value: Any) -> None:
    assert there_and_back(value) == value
    assert type(there_and_back(value)) is type(value)


@pytest.mark.parametrize(
    "noise",
    [
        NormalActionNoise([0.0, 0.5], 0.2),
        OrnsteinUhlenbeckActionNoise(np.zeros(2), np.full(2, 0.3), theta=0.2, initial_noise=[1.0, -1.0]),
        VectorizedActionNoise(NormalActionNoise(0.0, 0.1), n_envs=3),
    ],
)
def test_noise_comes_back(noise: Any) -> None:
    again = there_and_back({"action_noise": noise})["action_noise"]
    assert type(again) is type(noise)
    assert again.to_config() == noise.to_config()


def test_a_users_kind_of_noise_or_schedule_is_an_object_even_inside_a_vectorised_one() -> None:
    class Quiet(NormalActionNoise):
        pass

    class Late(LinearSchedule):
        pass

    noise, schedule = VectorizedActionNoise(Quiet(0.0, 0.1), n_envs=2), Late(1.0, 0.0)
    assert encode([noise, schedule])[1] == {"[0]": noise, "[1]": schedule}


@pytest.mark.parametrize("space", SPACES, ids=repr)
def test_spaces_come_back(space: spaces.Space[Any]) -> None:
    again = there_and_back(space)
    assert type(again) is type(space)
    assert again == space
    assert again.shape == space.shape
    assert again.dtype == space.dtype

    if isinstance(space, spaces.Box):
        for name in ("low", "high", "bounded_below", "bounded_above"):
            assert same(getattr(again, name), getattr(space, name))
    if isinstance(space, spaces.MultiBinary):
        assert same(again.n, space.n)
    if isinstance(space, spaces.Dict):
        assert list(again.spaces) == list(space.spaces)
        assert again.sort_keys == space.sort_keys

    space.seed(3)
    again.seed(3)
    assert data_equivalence(again.sample(), space.sample())


@pytest.mark.parametrize(
    "value",
    [
        {"__tuple__": [1]},
        {"__float__": "inf"},
        {"__object__": "x", "describe": "y"},
        {"__dict__": [["a", 1]]},
        {"__dict__": {"__dict__": {"__unheard_of__": 1}}},
        {"__class__": "os.system"},
        {"a": {"__box__": 1, "b": 2}},
    ],
    ids=repr,
)
def test_a_users_dict_that_looks_like_a_marker_stays_a_dict(value: dict[str, Any]) -> None:
    assert same(there_and_back(value), value)


class Custom:
    pass


class CustomBox(spaces.Box):
    pass


def test_objects_are_set_aside_by_path_and_put_back() -> None:
    def local(x: float) -> float:
        return x

    custom, box = Custom(), CustomBox(0, 1)
    value = {
        "policy_kwargs": {"activation_fn": local, "odd key": [Custom, torch.tanh]},
        "space": spaces.Dict({"image": box}),
        "structured": np.zeros(2, [("a", "f4")]),
        "last": (custom, custom),
    }
    data, objects = encode(value)
    assert list(objects) == [
        "policy_kwargs.activation_fn",
        "policy_kwargs['odd key'][0]",
        "policy_kwargs['odd key'][1]",
        "space.image",
        "structured",
        "last[0]",
        "last[1]",
    ]
    assert objects["policy_kwargs.activation_fn"] is local
    assert data["policy_kwargs"]["activation_fn"]["describe"] == f"{__name__}.{local.__qualname__}"
    assert data["last"]["__tuple__"][0]["describe"] == f"an instance of {__name__}.Custom"

    again = decode(json.loads(json.dumps(data)), objects)
    assert again["policy_kwargs"] == value["policy_kwargs"]
    assert again["space"].spaces["image"] is box
    assert again["last"] == (custom, custom)
    assert decode(data["last"], objects) == (custom, custom)


def test_a_missing_object_is_named() -> None:
    data, _ = encode({"policy_kwargs": {"features_extractor_class": Custom}})
    with pytest.raises(MissingObjectError, match=r"policy_kwargs\.features_extractor_class .*Custom") as caught:
        decode(data)
    assert caught.value.path == "policy_kwargs.features_extractor_class"
    assert caught.value.describe == f"{__name__}.Custom"


def test_different_objects_never_share_a_path() -> None:
    class Key:
        def __repr__(self) -> str:
            return "key"

    first, second = Custom(), Custom()
    value = {Key(): first, Key(): second}
    data, objects = encode(value)
    assert list(decode(data, objects).values()) == [first, second]


def test_classes_that_only_claim_to_be_of_a_library_are_objects() -> None:
    fake = type("ReLU", (torch.nn.Module,), {"__module__": "torch.nn.modules.activation"})
    assert encode(fake)[1] == {"": fake}


def test_short_names_of_library_classes_resolve() -> None:
    assert decode({"__class__": "torch.nn.ReLU"}) is torch.nn.ReLU
    assert decode({"__class__": "torch.nn.modules.activation.ReLU"}) is torch.nn.ReLU


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "builtins.eval",
        "subprocess.Popen",
        "torch.load",
        "torch.nn.functional.relu",
        "torch.nn.Parameter",
        "torch.nn.modules.module.torch.load",
        "torch.nn.modules.module.OrderedDict",
        "torch.optim.lr_scheduler.StepLR",
        "torch.nnx.ReLU",
        "torch.nn",
        "numpy.ndarray",
        "numpy.f2py.f2py2e.main",
        "sbac.codec.json",
        "sbac.codec.decode",
        "sbac.codec._Encoder",
        "sbac.__main__.main",
        "sbac.archive.Path",
        "sbac.no_such_module.Class",
        "sbac..codec.Class",
        "",
        ".",
        7,
    ],
)
def test_names_outside_the_allow_list_are_refused(name: Any) -> None:
    with pytest.raises(ValueError):
        decode({"__class__": name})


def box(**changes: Any) -> dict[str, Any]:
    low = {"dtype": "<f4", "shape": [2], "data": [0.0, 0.0]}
    return {"__box__": {"low": low, "high": low, **changes}}


HUGE = {"dtype": "<f4", "shape": [10**9], "data": [0.0]}


@pytest.mark.parametrize(
    "data",
    [
        {"__unheard_of__": 1},
        {"__tuple__": [], "more": 1},
        {"__tuple__": {}},
        {"__float__": "1e5"},
        {"__float__": 1.0},
        {"__float__": ["nan"]},
        {"__dict__": [[1]]},
        {"__dict__": [["a", 1], ["a", 2]]},
        {"__dict__": [[[], 1]]},
        {"__object__": []},
        {"__object__": "x"},
        {"__dtype__": "O"},
        {"__dtype__": "|O8"},
        {"__dtype__": "<U0"},
        {"__dtype__": "V8"},
        {"__dtype__": "<f3"},
        {"__dtype__": ["<f4"]},
        {"__torch_dtype__": "load"},
        {"__torch_dtype__": "nn"},
        {"__device__": "nonsense"},
        {"__array__": HUGE},
        {"__array__": {**HUGE, "data": "AAAAAA=="}},
        {"__array__": {**HUGE, "dtype": "<U0", "data": ""}},
        {"__array__": {**HUGE, "shape": [0, 10**30], "data": []}},
        {"__array__": {**HUGE, "shape": [-1, -1]}},
        {"__array__": {**HUGE, "shape": [1.0]}},
        {"__array__": {**HUGE, "shape": [True]}},
        {"__array__": {**HUGE, "shape": [1] * 100}},
        {"__array__": {"dtype": "<f4", "shape": [1], "data": "not base64!"}},
        {"__array__": {"dtype": "|u1", "shape": [1], "data": [300]}},
        {"__array__": {"dtype": "|u1", "shape": [1], "data": [1.5]}},
        {"__array__": {"dtype": "<f4", "shape": [1], "data": [True]}},
        {"__array__": {"dtype": "<f4", "shape": [1], "data": ["1.0"]}},
        {"__array__": {"dtype": "<c8", "shape": [1], "data": [1.0]}},
        {"__array__": {"dtype": "<f4", "shape": [1]}},
        {"__scalar__": {"dtype": "<f4", "shape": [1], "data": [1.0]}},
        {"__box__": []},
        box(high=HUGE),
        box(low=HUGE, high=HUGE),
        box(low={"dtype": "<f4", "shape": [2], "data": [5.0, 0.0]}),
        box(low={"dtype": "<f8", "shape": [2], "data": [0.0, 0.0]}),
        box(bounded_below={"dtype": "|b1", "shape": [3], "data": [True] * 3}),
        {"__discrete__": {"n": 0, "start": 0, "dtype": "<i8"}},
        {"__discrete__": {"n": 2.0, "start": 0, "dtype": "<i8"}},
        {"__discrete__": {"n": 10**30, "start": 0, "dtype": "<i8"}},
        {"__discrete__": {"n": 2, "start": 0, "dtype": "<f4"}},
        {"__multi_discrete__": {"nvec": HUGE, "start": HUGE}},
        {"__multi_binary__": 10**12},
        {"__multi_binary__": [10**6, 10**6]},
        {"__multi_binary__": -1},
        {"__multi_binary__": True},
        {"__dict_space__": {"spaces": [["a", 1]], "sort_keys": True}},
        {"__dict_space__": {"spaces": [], "sort_keys": 1}},
        {"__tuple_space__": [1]},
        {"__schedule__": {"kind": "unheard of"}},
        {"__schedule__": {"kind": []}},
        {"__schedule__": 1},
        {"__noise__": {"kind": "normal"}},
        {"__noise__": {"kind": "vectorized", "n_envs": 10**9, "base_noise": {"kind": "normal"}}},
        {"__noise__": {"kind": "vectorized", "n_envs": "many"}},
        {1: 2},
        (1, 2),
        {1},
        object(),
        b"bytes",
        np.float64(1.0),
    ],
    ids=str,
)
def test_strange_data_is_a_value_error_and_takes_no_memory(data: Any) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):
            decode(data)
        with pytest.raises(ValueError):
            decode([{"a": data}])
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_data_nested_too_deeply_and_values_that_contain_themselves_are_value_errors() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    circle: dict[str, Any] = {}
    circle["self"] = circle
    with pytest.raises(ValueError, match="RecursionError"):
        decode(deep)
    for value in (deep, circle):
        with pytest.raises(ValueError, match="nested too deeply"):
            encode(value)


def test_what_cannot_be_read_is_not_written() -> None:
    with pytest.raises(ValueError, match="MultiBinary"):
        encode(spaces.MultiBinary(10**9))


def test_mutated_data_gives_a_value_or_a_value_error() -> None:
    text = json.dumps(encode({"spaces": SPACES[:2] + SPACES[9:], "values": NUMPY[:6] + PLAIN})[0])
    generator = np.random.default_rng(0)
    seen = set()
    for _ in range(2000):
        mutated = list(text)
        for position in generator.integers(len(text), size=generator.integers(1, 4)):
            mutated[position] = chr(generator.integers(32, 127))
        try:
            decode(json.loads("".join(mutated)))
            seen.add("value")
        except ValueError:
            seen.add("error")
    assert seen == {"value", "error"}


def test_equal_values_give_equal_data() -> None:
    def config() -> Any:
        return {"a": lambda x: x, "b": Custom(), "c": spaces.Box(-1, 1, (2,))}

    first, second = encode(config())[0], encode(config())[0]
    assert json.dumps(first) == json.dumps(second)


def test_decoding_leaves_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "system", lambda *_: pytest.fail("os.system ran"))
    with pytest.raises(ValueError):
        decode({"__class__": "os.system"})

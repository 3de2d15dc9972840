"""Constructor arguments and spaces as JSON data, and back.

What JSON has stands for itself. Everything else becomes an object with one marker, a key that starts with two
underscores:

    None, bool, int, str, list, finite float    themselves
    inf, -inf, nan                              {"__float__": "inf"}
    dict with plain string keys                 an object; with other keys {"__dict__": [[key, value], ...]}
    tuple                                       {"__tuple__": [...]}
    numpy array, numpy scalar                   {"__array__": {dtype, shape, data}}, {"__scalar__": the same}
    numpy.dtype, torch.dtype, torch.device      {"__dtype__": "<f4"}, {"__torch_dtype__": "float32"}, ...
    a space of Gymnasium                        {"__box__": {...}}, {"__discrete__": {...}}, ...
    a schedule or noise of sbac                 {"__schedule__": its config}, {"__noise__": its config}
    a class of torch.nn, torch.optim, sbac ...  {"__class__": "torch.nn.modules.activation.ReLU"}
    a Python object of the user's own           {"__object__": its path, "describe": its name}

A user's own dict whose keys look like markers is written as `__dict__`, so that the two cannot be confused.
Reading trusts nothing: it never runs what the data names, and never allocates more than the data holds.
"""

import base64
import binascii
import importlib
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from gymnasium import spaces

from sbac.noise import ActionNoise, noise_from_config
from sbac.schedules import Schedule, schedule_from_config

# The classes that data may name: those below a module that derive from a base. Nothing else is ever imported.
_LIBRARIES: dict[str, type] = {
    "torch.nn": torch.nn.Module,
    "torch.optim": torch.optim.Optimizer,
    "numpy": np.generic,
    "sbac": object,
}

_T = TypeVar("_T")

_DTYPE = re.compile(r"[<>|][biufcmMUS]\d+(\[\w+\])?")
_READABLE_SIZE = 64  # arrays up to this many elements are written as numbers, larger ones as base64

# Sizes that are mere numbers in the data, with nothing of that size behind them.
_MAX_BINARY = 2**26
_MAX_ENVIRONMENTS = 2**16


class MissingObjectError(ValueError):
    """The data refers to a Python object of the user's own that was not given to `decode`.

    Attributes:
        path: Where the object stands in the encoded value, such as `policy_kwargs.activation_fn`.
        describe: The object's qualified name, or that of its class.
    """

    def __init__(self, path: str, describe: str) -> None:
        super().__init__(f"{path or 'the value'} needs a Python object that was not given: {describe}")
        self.path = path
        self.describe = describe


def encode(value: Any) -> tuple[Any, dict[str, object]]:
    """Turn a value into JSON data, and set aside the Python objects for which data has no form.

    Args:
        value: Constructor arguments or spaces, nested in dicts, lists and tuples as deep as needed.

    Returns:
        The data, and the objects set aside, keyed by their path in the value: a user's own classes, functions
        and instances. `decode` needs the same dict to put them back; it is empty where everything is data.

    Raises:
        ValueError: The value contains itself, is nested too deeply, or holds a MultiBinary of more than 2^26
            elements.
    """
    encoder = _Encoder()
    try:
        return encoder.encode(value, ""), encoder.objects
    except RecursionError as error:
        raise ValueError("cannot encode a value that contains itself or is nested too deeply") from error


def decode(data: Any, objects: Mapping[str, object] | None = None) -> Any:
    """Turn JSON data into the value from which `encode` made it.

    A part of the data can be decoded alone: an object's path is that in the whole value.

    Args:
        data: What `encode` returned, straight or through JSON text. It need not be trusted.
        objects: The Python objects that `encode` set aside, by path. They must come from a trusted source.

    Returns:
        The value, equal to the one encoded in type, order and bits.

    Raises:
        MissingObjectError: The data needs an object that `objects` does not hold.
        ValueError: The data is not what `encode` writes.
    """
    try:
        return _decode(data, objects or {})
    except ValueError:
        raise
    # The data passes through constructors of other libraries, and what they raise is theirs to choose.
    except Exception as error:
        raise ValueError(f"the data describes no value: {type(error).__name__}: {error}") from error


class _Encoder:
    def __init__(self) -> None:
        self.objects: dict[str, object] = {}

    def encode(self, value: Any, path: str) -> Any:
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {"__float__": repr(value)}
        if kind is list:
            return [self.encode(item, f"{path}[{i}]") for i, item in enumerate(value)]
        if kind is tuple:
            return {"__tuple__": [self.encode(item, f"{path}[{i}]") for i, item in enumerate(value)]}
        if kind is dict:
            return self._dict(value, path)

        if kind is np.ndarray and _is_plain(value.dtype):
            return {"__array__": self._array(value)}
        if isinstance(value, np.generic) and kind.__module__ == "numpy" and _is_plain(value.dtype):
            return {"__scalar__": self._array(np.asarray(value))}
        if isinstance(value, np.dtype) and _is_plain(value):
            return {"__dtype__": value.str}
        if kind is torch.dtype:
            return {"__torch_dtype__": str(value).removeprefix("torch.")}
        if kind is torch.device:
            return {"__device__": str(value)}

        if isinstance(value, spaces.Space):
            return self._space(value, path)
        if isinstance(value, Schedule) and _is_own(value):
            return {"__schedule__": self.encode(value.to_config(), path)}
        if isinstance(value, ActionNoise) and _is_own(value) and _is_own(getattr(value, "base_noise", value)):
            return {"__noise__": self.encode(value.to_config(), path)}
        if isinstance(value, type) and (name := _library_name(value)) is not None:
            return {"__class__": name}
        return self._object(value, path)

    def _dict(self, value: dict[Any, Any], path: str) -> dict[str, Any]:
        if all(type(key) is str and not key.startswith("__") for key in value):
            return {key: self.encode(item, _child(path, key)) for key, item in value.items()}
        return {
            "__dict__": [
                [self.encode(key, f"{_child(path, key)} (key)"), self.encode(item, _child(path, key))]
                for key, item in value.items()
            ]
        }

    def _array(self, array: np.ndarray) -> dict[str, Any]:
        kind = array.dtype.kind
        exact = kind in "biu" or (kind == "f" and array.itemsize <= 8 and not np.isnan(array).any())
        data: Any
        if exact and array.size <= _READABLE_SIZE:
            data = [self.encode(item, "") for item in array.ravel().tolist()]
        else:
            data = base64.b64encode(array.tobytes()).decode("ascii")
        return {"dtype": array.dtype.str, "shape": list(array.shape), "data": data}

    def _space(self, space: spaces.Space[Any], path: str) -> dict[str, Any]:
        # A subclass may behave differently, so that only the spaces themselves are data.
        if type(space) is spaces.Box:
            payload: dict[str, Any] = {"low": self._array(space.low), "high": self._array(space.high)}
            # Integers have no infinity: an unbounded side is a limit of the type and a mask that says so.
            if not np.array_equal(space.bounded_below, -np.inf < space.low):
                payload["bounded_below"] = self._array(space.bounded_below)
            if not np.array_equal(space.bounded_above, space.high < np.inf):
                payload["bounded_above"] = self._array(space.bounded_above)
            return {"__box__": payload}
        if type(space) is spaces.Discrete:
            n, start = int(space.n), int(space.start)
            return {"__discrete__": {"n": n, "start": start, "dtype": space.dtype.str}}
        if type(space) is spaces.MultiDiscrete:
            nvec, first = self._array(space.nvec), self._array(space.start)
            return {"__multi_discrete__": {"nvec": nvec, "start": first}}
        if type(space) is spaces.MultiBinary:
            _check_binary(space.shape)
            return {"__multi_binary__": space.n if isinstance(space.n, int) else list(space.shape)}
        if type(space) is spaces.Dict:
            pairs = [
                [self.encode(key, f"{_child(path, key)} (key)"), self.encode(item, _child(path, key))]
                for key, item in space.spaces.items()
            ]
            return {"__dict_space__": {"spaces": pairs, "sort_keys": space.sort_keys}}
        if type(space) is spaces.Tuple:
            items = [self.encode(item, f"{path}[{i}]") for i, item in enumerate(space.spaces)]
            return {"__tuple_space__": items}
        return self._object(space, path)

    def _object(self, value: object, path: str) -> dict[str, Any]:
        while path in self.objects:  # two unusual keys with one repr
            path += "'"
        self.objects[path] = value

        # A repr may hold an address, and equal values are to give equal data.
        named = value if hasattr(value, "__qualname__") else type(value)
        describe = f"{named.__module__}.{named.__qualname__}"
        return {"__object__": path, "describe": describe if named is value else f"an instance of {describe}"}


def _child(path: str, key: object) -> str:
    if isinstance(key, str) and key.isidentifier():
        return f"{path}.{key}" if path else key
    return f"{path}[{key!r}]"


def _is_own(value: object) -> bool:
    return type(value).__module__.startswith("sbac.")


def _is_plain(dtype: np.dtype[Any]) -> bool:
    return dtype.itemsize > 0 and _DTYPE.fullmatch(dtype.str) is not None


def _check_binary(shape: tuple[int, ...]) -> None:
    if math.prod(shape) > _MAX_BINARY:
        raise ValueError(f"a MultiBinary space of shape {shape} exceeds {_MAX_BINARY} elements")


def _library_name(value: type) -> str | None:
    name = f"{value.__module__}.{value.__qualname__}"
    try:
        return name if _class(name) is value else None
    except (ValueError, ImportError):
        return None


def _class(name: Any) -> type:
    module, _, attribute = _expect(name, str).rpartition(".")
    for library, base in _LIBRARIES.items():
        # Private modules stay closed: importing `sbac.__main__` would run the command line.
        if not _is_below(module, library) or any(not part or part[0] == "_" for part in name.split(".")):
            continue
        found = getattr(importlib.import_module(module), attribute, None)
        # A module also shows what it imported itself; only what the library defines counts.
        if isinstance(found, type) and issubclass(found, base) and _is_below(found.__module__, library):
            return found
    raise ValueError(f"{name!r} is no class that data may name: those are of {', '.join(_LIBRARIES)}")


def _is_below(module: str, library: str) -> bool:
    return module == library or (library != "numpy" and module.startswith(f"{library}."))


def _decode(data: Any, objects: Mapping[str, object]) -> Any:
    if data is None or type(data) in (bool, int, float, str):
        return data
    if type(data) is list:
        return [_decode(item, objects) for item in data]

    marker = next((key for key in _expect(data, dict) if _expect(key, str).startswith("__")), None)
    if marker is None:
        return {key: _decode(item, objects) for key, item in data.items()}
    if marker == "__object__":
        path, describe = _expect(data[marker], str), _expect(data["describe"], str)
        if path not in objects:
            raise MissingObjectError(path, describe)
        return objects[path]
    if marker not in _DECODERS or len(data) != 1:
        raise ValueError(f"the data holds an unknown marker {marker!r} among the keys {sorted(data)}")
    return _DECODERS[marker](data[marker], objects)


def _expect(value: Any, kind: type[_T]) -> _T:
    if type(value) is not kind:
        raise ValueError(f"the data holds a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _float(data: Any, _: Mapping[str, object]) -> float:
    if data not in ("inf", "-inf", "nan"):
        raise ValueError(f"the data holds {data!r} where 'inf', '-inf' or 'nan' belongs")
    return float(data)


def _tuple(data: Any, objects: Mapping[str, object]) -> tuple[Any, ...]:
    return tuple(_decode(item, objects) for item in _expect(data, list))


def _dict(data: Any, objects: Mapping[str, object]) -> dict[Any, Any]:
    pairs = [(_decode(key, objects), _decode(item, objects)) for key, item in _expect(data, list)]
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("the data holds a dict in which a key stands twice")
    return result


def _dtype(data: Any, _: Mapping[str, object]) -> np.dtype[Any]:
    dtype: np.dtype[Any] | None = np.dtype(data) if _DTYPE.fullmatch(_expect(data, str)) else None
    if dtype is not None and _is_plain(dtype):
        return dtype
    raise ValueError(f"{data!r} is no dtype that data may name")


def _torch_dtype(data: Any, _: Mapping[str, object]) -> torch.dtype:
    return _expect(vars(torch).get(_expect(data, str)), torch.dtype)


def _device(data: Any, _: Mapping[str, object]) -> torch.device:
    return torch.device(_expect(data, str))


def _array(data: Any, objects: Mapping[str, object]) -> np.ndarray:
    dtype = _dtype(_expect(data, dict)["dtype"], objects)
    shape = tuple(_expect(length, int) for length in _expect(data["shape"], list))
    values = data["data"]
    if any(length < 0 for length in shape):
        raise ValueError(f"the data holds an array of shape {shape}")

    # The declared shape is compared with what is there before anything of that size is made.
    if isinstance(values, str):
        try:
            raw = base64.b64decode(values, validate=True)
        except binascii.Error as error:
            raise ValueError(f"the data holds an array that is not base64: {error}") from error
        if len(raw) != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"the data holds {len(raw)} bytes for an array of shape {shape}, dtype {dtype}")
        return np.ndarray(shape, dtype, raw).copy()

    element = {"b": bool, "i": int, "u": int, "f": float}[dtype.kind]
    numbers: list[Any] = [_expect(_decode(value, {}), element) for value in _expect(values, list)]
    if len(numbers) != math.prod(shape):
        raise ValueError(f"the data holds {len(numbers)} values for an array of shape {shape}")
    return np.array(numbers, dtype).reshape(shape)


def _scalar(data: Any, objects: Mapping[str, object]) -> Any:
    array = _array(data, objects)
    if array.shape != ():
        raise ValueError(f"the data holds an array of shape {array.shape} where a scalar belongs")
    return array[()]


def _box(data: Any, objects: Mapping[str, object]) -> spaces.Box:
    low, high = _array(_expect(data, dict)["low"], objects), _array(data["high"], objects)
    if low.dtype != high.dtype:
        raise ValueError(f"the data holds a Box with a low of {low.dtype} and a high of {high.dtype}")

    box = spaces.Box(low, high, low.shape, low.dtype)
    for mask in ("bounded_below", "bounded_above"):
        # Gymnasium makes a scalar of the mask of a Box without dimensions.
        bounded = _array(data[mask], objects) if mask in data else np.asarray(getattr(box, mask))
        if bounded.shape != box.shape or bounded.dtype != np.bool_:
            raise ValueError(f"the data holds a Box whose {mask} does not fit its shape {box.shape}")
        setattr(box, mask, bounded)
    return box


def _discrete(data: Any, objects: Mapping[str, object]) -> spaces.Discrete:
    n, start = _expect(_expect(data, dict)["n"], int), _expect(data["start"], int)
    return spaces.Discrete(n, start=start, dtype=_dtype(data["dtype"], objects))


def _multi_discrete(data: Any, objects: Mapping[str, object]) -> spaces.MultiDiscrete:
    nvec = _array(_expect(data, dict)["nvec"], objects)
    return spaces.MultiDiscrete(nvec, dtype=nvec.dtype, start=_array(data["start"], objects))


def _multi_binary(data: Any, _: Mapping[str, object]) -> spaces.MultiBinary:
    shape = (data,) if type(data) is int else tuple(_expect(length, int) for length in _expect(data, list))
    _check_binary(shape)
    return spaces.MultiBinary(data)


def _dict_space(data: Any, objects: Mapping[str, object]) -> spaces.Dict:
    members = _dict(_expect(data, dict)["spaces"], objects)
    space = spaces.Dict(list(members.items()))  # pairs keep their order, which a dict would lose to sorting
    space.sort_keys = _expect(data["sort_keys"], bool)
    return space


def _tuple_space(data: Any, objects: Mapping[str, object]) -> spaces.Tuple[Any]:
    return spaces.Tuple(_tuple(data, objects))


def _schedule(data: Any, objects: Mapping[str, object]) -> Schedule:
    return schedule_from_config(_expect(_decode(data, objects), dict))


def _noise(data: Any, objects: Mapping[str, object]) -> ActionNoise:
    config: dict[str, Any] = _expect(_decode(data, objects), dict)
    inner: Any = config
    while isinstance(inner, dict):
        if inner.get("n_envs", 0) > _MAX_ENVIRONMENTS:
            raise ValueError(f"the data holds noise for more than {_MAX_ENVIRONMENTS} environments")
        inner = inner.get("base_noise")
    return noise_from_config(config)


_DECODERS: dict[str, Callable[[Any, Mapping[str, object]], Any]] = {
    "__float__": _float,
    "__tuple__": _tuple,
    "__dict__": _dict,
    "__array__": _array,
    "__scalar__": _scalar,
    "__dtype__": _dtype,
    "__torch_dtype__": _torch_dtype,
    "__device__": _device,
    "__box__": _box,
    "__discrete__": _discrete,
    "__multi_discrete__": _multi_discrete,
    "__multi_binary__": _multi_binary,
    "__dict_space__": _dict_space,
    "__tuple_space__": _tuple_space,
    "__schedule__": _schedule,
    "__noise__": _noise,
    "__class__": lambda data, _: _class(data),
}

"""Pickles of other libraries, read as data: no name in them is looked up, and nothing is called.

A pickle is a program for a small stack machine. The one here knows the instructions that make plain values, and where
the program would import something, call it or fill an object, it only notes so: as a `Name` and as a `Made`.
`restore` then makes spaces of Gymnasium and arrays of NumPy from such notes, by their names, and refuses all others.
"""

from __future__ import annotations

import math
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gymnasium import spaces

_MAX_SIZE = 2**26  # bytes of a pickle
_MAX_STEPS = 1_000_000  # instructions of a pickle
_MAX_VALUES = 100_000  # that `restore` makes of one: parts may be shared, so that few bytes stand for many
_MAX_BINARY = 2**26  # elements of a MultiBinary, which has nothing of that size behind it


@dataclass(eq=False, frozen=True, repr=False)
class Name:
    """Something that a pickle would import.

    Attributes:
        path: Such as ``torch.nn.modules.activation.ReLU``.
    """

    path: str


@dataclass(eq=False, repr=False)
class Made:
    """Something that a pickle would make by calling what it imported.

    Attributes:
        function: What it would call: a class or a function.
        args: With what.
        state: What it would fill the object with afterwards.
        items: What it would append.
        pairs: Keys and values that it would set.
    """

    function: Any
    args: Any
    state: Any = None
    items: list[Any] = field(default_factory=list)
    pairs: list[tuple[Any, Any]] = field(default_factory=list)

    @property
    def path(self) -> str:
        """The name of what it would call, or "" if that has none."""
        return self.function.path if isinstance(self.function, Name) else ""


def describe(node: Any) -> str:
    """What a value of a pickle is, for a message. Never all of it: few bytes may stand for very much."""
    if isinstance(node, Name):
        return node.path
    if isinstance(node, Made):
        path = node.path
        return "an object of the user's own" if not path or path.startswith("cloudpickle.") else f"an object of {path}"
    if isinstance(node, (str, float)):
        return f"{type(node).__name__} {node[:40]!r}" if isinstance(node, str) else f"float {node!r}"
    return type(node).__name__


def read_pickle(content: bytes) -> Any:
    """What a pickle describes.

    Args:
        content: The pickle. It need not be trusted.

    Returns:
        Numbers, texts, bytes, None, lists, tuples and dicts; a `Name` and a `Made` wherever something else would be.

    Raises:
        ValueError: It is damaged, too long, or has instructions beyond those that pickles of data need.
    """
    if len(content) > _MAX_SIZE:
        raise ValueError(f"a pickle of {len(content)} bytes, more than the {_MAX_SIZE} allowed")
    try:
        return _run(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the pickle cannot be read: {error}") from error
    except Exception as error:  # an instruction that finds too little on the stack, or the wrong thing
        raise ValueError(f"the pickle is damaged: {type(error).__name__}: {error}") from error


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = {
    *("INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_IGNORED = {"PROTO", "FRAME"}


def _run(content: bytes) -> Any:
    stack: list[Any] = []
    marked: list[list[Any]] = []  # the stacks below each open mark
    memo: dict[Any, Any] = {}

    def to_mark() -> list[Any]:
        nonlocal stack
        above, stack = stack, marked.pop()
        return above

    for step, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        name = opcode.name
        if step >= _MAX_STEPS:
            raise ValueError(f"it has more than {_MAX_STEPS} instructions")
        if name in _LITERALS:
            stack.append(bytes(argument) if isinstance(argument, bytearray) else argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _IGNORED:
            continue
        elif name == "STOP":
            return stack.pop()

        # Containers.
        elif name == "MARK":
            marked.append(stack)
            stack = []
        elif name in ("EMPTY_LIST", "EMPTY_DICT"):
            stack.append([] if name == "EMPTY_LIST" else {})
        elif name == "EMPTY_SET":
            stack.append(Made(Name("builtins.set"), ()))
        elif name == "FROZENSET":
            items = to_mark()
            stack.append(Made(Name("builtins.frozenset"), (), items=items))
        elif name in ("TUPLE", "LIST"):
            items = to_mark()
            stack.append(tuple(items) if name == "TUPLE" else items)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            length = int(name[-1])
            if len(stack) < length:
                raise ValueError("a tuple lacks its parts")
            stack[-length:] = [tuple(stack[-length:])]
        elif name == "DICT":
            items = to_mark()
            stack.append(_set({}, items))
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = [stack.pop()] if name == "APPEND" else to_mark()
            _append(stack[-1], items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(), stack.pop()][::-1] if name == "SETITEM" else to_mark()
            _set(stack[-1], items)

        # The stack and the memo.
        elif name == "POP":
            if stack:
                stack.pop()
            else:
                to_mark()
        elif name == "POP_MARK":
            to_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])

        # What would be imported, called and filled.
        elif name == "GLOBAL":
            stack.append(Name(str(argument).replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            if not (isinstance(module, str) and isinstance(attribute, str)):
                raise ValueError("it imports something without a name")
            stack.append(Name(f"{module}.{attribute}"))
        elif name in ("REDUCE", "NEWOBJ"):
            args, function = stack.pop(), stack.pop()
            stack.append(Made(function, args))
        elif name == "NEWOBJ_EX":
            kwargs, args, function = stack.pop(), stack.pop(), stack.pop()
            stack.append(Made(function, (*args, *dict(kwargs).items())))
        elif name == "BUILD":
            state = stack.pop()
            if not isinstance(stack[-1], Made):
                raise ValueError(f"it fills {describe(stack[-1])}, which is no object")
            stack[-1].state = state
        else:
            raise ValueError(f"it has the instruction {name}, which pickles of data do not need")
    raise ValueError("it has no end")


def _append(target: Any, items: list[Any]) -> None:
    if isinstance(target, Made):
        target.items.extend(items)
    elif isinstance(target, list):
        target.extend(items)
    else:
        raise ValueError(f"it appends to {describe(target)}")


def _set(target: Any, items: list[Any]) -> Any:
    pairs = list(zip(items[::2], items[1::2], strict=True))
    if isinstance(target, Made):
        target.pairs.extend(pairs)
    elif isinstance(target, dict):
        target.update(pairs)
    else:
        raise ValueError(f"it sets items of {describe(target)}")
    return target


def state_of(node: Any, path: str) -> dict[str, Any]:
    """What an object of the class of this name would be filled with, by attribute.

    Raises:
        ValueError: It is no such object.
    """
    if not (isinstance(node, Made) and node.path == path and isinstance(node.state, dict)):
        raise ValueError(f"there is {describe(node)} where an object of {path} belongs")
    return node.state


def restore(node: Any) -> Any:
    """The value that a node describes: plain values, dicts with plain keys, arrays and spaces, nested.

    Args:
        node: What `read_pickle` returned, or a part of it.

    Raises:
        ValueError: It holds something else; names it.
    """
    try:
        return _Restoration().restore(node)
    except ValueError:
        raise
    except Exception as error:  # from parts that are not what they should be, and from constructors of other libraries
        raise ValueError(f"the pickle describes no value: {type(error).__name__}: {error}") from error


class _Restoration:
    """One call of `restore`, with what it may still make."""

    def __init__(self) -> None:
        self._left = _MAX_VALUES
        self._left_bytes = _MAX_SIZE

    def restore(self, node: Any) -> Any:
        self._left -= 1
        if self._left < 0:
            raise ValueError(f"the pickle describes more than {_MAX_VALUES} values")
        if node is None or isinstance(node, (bool, int, float, str, bytes)):
            return node
        if isinstance(node, (list, tuple)):
            return type(node)(self.restore(item) for item in node)
        if isinstance(node, dict):
            return {self._key(key): self.restore(item) for key, item in node.items()}
        makers: dict[str, Callable[[Made], Any]] = {
            "collections.OrderedDict": lambda made: {self._key(key): self.restore(item) for key, item in made.pairs},
            "numpy.dtype": _dtype,
            **dict.fromkeys((f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")), _frombuffer),
            **dict.fromkeys((f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")), _reconstruct),
            **dict.fromkeys((f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")), _scalar),
            "gymnasium.spaces.box.Box": self._box,
            "gymnasium.spaces.discrete.Discrete": self._discrete,
            "gymnasium.spaces.multi_discrete.MultiDiscrete": self._multi_discrete,
            "gymnasium.spaces.multi_binary.MultiBinary": self._multi_binary,
            "gymnasium.spaces.dict.Dict": self._dict_space,
        }
        if isinstance(node, Made) and node.path in makers:
            made = makers[node.path](node)
            self._left_bytes -= made.nbytes if isinstance(made, np.ndarray) else 0
            if self._left_bytes < 0:
                raise ValueError(f"the pickle describes arrays of more than {_MAX_SIZE} bytes")
            return made
        raise ValueError(f"there is {describe(node)} where a number, an array or a space belongs")

    def _key(self, key: Any) -> Any:
        if not isinstance(key, (str, int)):
            raise ValueError(f"a dict has {describe(key)} for a key")
        return key

    def _attributes(self, made: Made, *names: str) -> list[Any]:
        state = state_of(made, made.path)
        missing = [name for name in names if name not in state]
        if missing:
            raise ValueError(f"a space of {made.path} lacks {', '.join(missing)}")
        return [self.restore(state[name]) for name in names]

    def _box(self, made: Made) -> spaces.Box:
        low, high = (_expect(bound, np.ndarray) for bound in self._attributes(made, "low", "high"))
        if low.dtype != high.dtype or low.shape != high.shape:
            raise ValueError(f"a Box has a low of {low.dtype} {low.shape} and a high of {high.dtype} {high.shape}")
        box = spaces.Box(low, high, low.shape, low.dtype)
        for name in ("bounded_below", "bounded_above"):
            # A Box of whole numbers has no infinity: an open side is a limit of the type and a mask that says so.
            if name in made.state:
                mask = np.asarray(self.restore(made.state[name]))
                if mask.shape != low.shape or mask.dtype != np.bool_:
                    raise ValueError(f"a Box has a {name} that does not fit its shape {low.shape}")
                setattr(box, name, mask)
        return box

    def _discrete(self, made: Made) -> spaces.Discrete:
        n, start = (_whole(number) for number in self._attributes(made, "n", "start"))
        return spaces.Discrete(n, start=start)

    def _multi_discrete(self, made: Made) -> spaces.MultiDiscrete:
        (nvec,) = (_expect(array, np.ndarray) for array in self._attributes(made, "nvec"))
        start = self.restore(made.state.get("start"))
        return spaces.MultiDiscrete(nvec, dtype=nvec.dtype, start=start)

    def _multi_binary(self, made: Made) -> spaces.MultiBinary:
        (n,) = self._attributes(made, "n")
        lengths = [_whole(length) for length in np.atleast_1d(n)]
        if not 0 < math.prod(lengths) <= _MAX_BINARY:
            raise ValueError(f"a MultiBinary of {lengths} elements")
        return spaces.MultiBinary(lengths[0] if np.ndim(n) == 0 else lengths)

    def _dict_space(self, made: Made) -> spaces.Dict:
        (members,) = self._attributes(made, "spaces")
        for name, member in _expect(members, dict).items():
            if not isinstance(name, str) or not isinstance(member, spaces.Space):
                raise ValueError(f"a Dict space has {type(member).__name__} under {name!r}")
        space = spaces.Dict(list(members.items()))  # pairs keep their order, which a dict would lose to sorting
        if isinstance(made.state.get("sort_keys"), bool):
            space.sort_keys = made.state["sort_keys"]
        return space


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"there is {type(value).__name__} where {kind.__name__} belongs")
    return value


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"there is {describe(value)} where a whole number belongs")
    return int(value)


def _dtype(node: Any) -> np.dtype[Any]:
    if not (isinstance(node, Made) and node.path == "numpy.dtype" and isinstance(node.args, tuple) and node.args):
        raise ValueError(f"there is {describe(node)} where a dtype belongs")
    if not (isinstance(node.args[0], str) and re.fullmatch(r"b1|[iu][1248]|f[248]", node.args[0])):
        raise ValueError(f"there is an array of {describe(node.args[0])}, not of numbers")
    order = node.state[1] if isinstance(node.state, tuple) and len(node.state) > 1 else "="
    return np.dtype(node.args[0]).newbyteorder(">" if order == ">" else "<")


def _array(shape: Any, dtype: np.dtype[Any], content: Any, order: Any) -> np.ndarray:
    lengths = [_whole(length) for length in _expect(shape, tuple)[:64]]
    size = math.prod(lengths) * dtype.itemsize
    if any(length < 0 for length in lengths) or len(_expect(content, bytes)) != size:
        raise ValueError(f"there are {len(content)} bytes for an array of shape {lengths} and dtype {dtype}")
    array: np.ndarray = np.ndarray(lengths, dtype, content, order=order)
    return array.astype(dtype.newbyteorder("="))


def _frombuffer(made: Made) -> np.ndarray:
    content, dtype, shape, order = made.args
    return _array(shape, _dtype(dtype), content, "F" if order == "F" else "C")


def _reconstruct(made: Made) -> np.ndarray:
    _, shape, dtype, is_fortran, content = made.state
    return _array(shape, _dtype(dtype), content, "F" if is_fortran is True else "C")


def _scalar(made: Made) -> Any:
    dtype, content = made.args
    return _array((), _dtype(dtype), content, "C")[()]

"""How an algorithm is made: misspelt arguments are refused, presets filled in, files loaded on class or instance."""

from __future__ import annotations

import functools
import inspect
from abc import ABCMeta
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from sbac.guards import nearest


class Constructed(ABCMeta):
    """The class of algorithm classes. Looks at the arguments of a constructor before the constructor does."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    _shorthands: ClassVar[Mapping[str, Sequence[str]]] = {}

    @property
    def __signature__(cls) -> inspect.Signature:
        """The constructor's own, for help() and editors, which would otherwise show that of `__call__`."""
        signature = inspect.signature(inspect.getattr_static(cls, "__init__"))
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make an instance.

        Raises:
            TypeError: The class has no such argument; names the nearest.
            ValueError: The class has no such preset.
        """
        known = argument_names(cls)
        for name in kwargs:
            if name not in known:
                raise TypeError(f"{cls.__name__} has no argument {name!r}{nearest(name, known)}")
        preset = kwargs.get("preset")
        if preset is not None:
            if preset not in cls.presets:
                raise ValueError(f"{cls.__name__} has no preset {preset!r}{nearest(str(preset), cls.presets)}")
            given = {*known[: len(args)], *kwargs}
            for shorthand, names in cls._shorthands.items():
                if kwargs.get(shorthand) is not None:
                    given |= set(names)
            filled = {name: value for name, value in cls.presets[preset].items() if name not in given}
            if filled:
                values = ", ".join(f"{name}={value!r}" for name, value in filled.items())
                print(f"{cls.__name__}, preset {preset!r}: {values}")
            networks = cls.presets[preset].get("policy_kwargs", {})
            kwargs = {**filled, **kwargs}
            kwargs["policy_kwargs"] = {**networks, **(kwargs.get("policy_kwargs") or {})}
        return super().__call__(*args, **kwargs)


def argument_names(cls: type) -> list[str]:
    """The names of a class's constructor arguments, with those that ``**kwargs`` passes on to the classes above."""
    names: dict[str, None] = {}
    for owner in cls.__mro__:
        if "__init__" not in vars(owner):
            continue
        parameters = list(inspect.signature(vars(owner)["__init__"]).parameters.values())[1:]
        names.update((p.name, None) for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return list(names)


class LoadsEitherWay:
    """``DDPG.load(path)`` returns a new model; ``model.load(path)`` loads into the model."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        functools.update_wrapper(self, function)  # type: ignore[arg-type]

    def __get__(self, instance: Any, owner: type) -> Callable[..., Any]:
        """The function with the class, and the instance if there is one, for its first two arguments."""
        bound = functools.partial(self._function, owner, instance)
        return functools.update_wrapper(bound, self._function)

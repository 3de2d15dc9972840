"""How an algorithm is made from its arguments: those misspelt are refused, presets filled in, parts looked up."""

from __future__ import annotations

import inspect
from abc import ABCMeta
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from sbac.guards import nearest

_Part = TypeVar("_Part")

# The arguments that are fixed in each algorithm whose networks are in the process that made them.
FIXED = ("weight_decay", "layer_norm", "dropout", "normalize_obs", "normalize_reward", "n_envs")


class Fixed:
    """An attribute that is set while a model is made, and refuses other values from then on.

    For arguments from which parts were built: a new value would do nothing until the model was saved and loaded. There
    is no `__get__`, so that reading takes what every attribute takes.

    Args:
        name: The attribute's.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __set__(self, model: Any, value: Any) -> None:
        name, attributes = self._name, vars(model)
        if not attributes.get("_is_made"):
            attributes[name] = value
        elif value != attributes.get(name):
            raise AttributeError(
                f"{type(model).__name__}: {name} is {attributes.get(name)!r} since the model was made, and cannot be "
                f"changed to {value!r}: make another model with {name}={value!r}, or, where its networks keep their "
                f"form, save this one and load it with load(path, {name}={value!r})"
            )


class Constructed(ABCMeta):
    """The class of algorithm classes. Looks at the arguments of a constructor before the constructor does."""

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    _shorthands: ClassVar[Mapping[str, Sequence[str]]] = {}
    _fixed: ClassVar[Sequence[str]] = ()  # attributes from which parts are built: see `Fixed`

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **kwargs: Any) -> Constructed:
        fixed = {argument: Fixed(argument) for argument in namespace.get("_fixed", ())}
        return super().__new__(mcs, name, bases, {**fixed, **namespace}, **kwargs)

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
        model = super().__call__(*args, **kwargs)
        model._is_made = True
        return model


def argument_names(cls: type) -> list[str]:
    """The names of a class's constructor arguments, with those that ``**kwargs`` passes on to the classes above."""
    return list(argument_defaults(cls))


def argument_defaults(cls: type) -> dict[str, Any]:
    """As `argument_names`, with their default values; `inspect.Parameter.empty` stands for none."""
    defaults: dict[str, Any] = {}
    for owner in cls.__mro__:
        if "__init__" not in vars(owner):
            continue
        parameters = list(inspect.signature(vars(owner)["__init__"]).parameters.values())[1:]
        own = {p.name: p.default for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        defaults |= {name: default for name, default in own.items() if name not in defaults}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return defaults


def read_policy(algorithm: str, policy: object, aliases: Mapping[str, type[nn.Module]]) -> type[nn.Module]:
    """The class of the policy that is asked for.

    Args:
        algorithm: What the message calls the algorithm.
        policy: A name among `aliases`, or a class.
        aliases: The classes by name.

    Raises:
        ValueError: It is neither; names what was received and, of a name, the nearest.
    """
    if isinstance(policy, type) and issubclass(policy, nn.Module):
        return policy
    if not isinstance(policy, str):
        raise ValueError(f"policy must be one of {', '.join(aliases)}, auto, or a policy class, not {policy!r}")
    if policy not in aliases:
        is_elsewhere = "lstm" in policy.lower() and not any("Lstm" in alias for alias in aliases)
        remark = "; policies with an LSTM are for A2C and A3C" if is_elsewhere else ""
        raise ValueError(f"{algorithm} has no policy {policy!r}{nearest(policy, [*aliases, 'auto'])}{remark}")
    return aliases[policy]


def read_device(device: torch.device | str) -> torch.device:
    """The device that is asked for; "auto" is the CPU.

    Raises:
        ValueError: torch does not know it, or does not find it here.
    """
    # A small network on a GPU waits for the GPU; images arrive with the policies that read them.
    try:
        chosen = torch.device("cpu" if isinstance(device, str) and device == "auto" else device)
        torch.empty(0, device=chosen)  # a device may be known and not there
        return chosen
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ValueError(
            f"device must be 'auto', 'cpu', 'cuda' or another that torch finds here, not {device!r} ({error})"
        ) from error


def read_part(argument: str, base: type[_Part], given: object, kwargs: object) -> tuple[type[_Part], dict[str, Any]]:
    """The class that a model is to use in place of one of its parts, and the further arguments for it.

    Args:
        argument: Name of the part, "replay_buffer", say: it is asked for by ``replay_buffer_class`` and
            ``replay_buffer_kwargs``.
        base: The part's usual class, all of whose arguments are given by the model.
        given: A class derived from `base`, or None for `base`.
        kwargs: A dict of arguments that the class has and `base` has not, or None.

    Raises:
        ValueError: It is no such class, or no such dict; names what was received and, of an argument, the nearest.
    """
    cls = base if given is None else given
    if not (isinstance(cls, type) and issubclass(cls, base)):
        what = f"{cls.__module__}.{cls.__qualname__}" if isinstance(cls, type) else repr(cls)
        raise ValueError(f"{argument}_class must be {base.__name__} or a class derived from it, not {what}")
    if not (kwargs is None or isinstance(kwargs, Mapping)):
        raise ValueError(f"{argument}_kwargs must be a dict of {cls.__name__}'s further arguments, not {kwargs!r}")
    own = argument_names(base)
    known = [name for name in argument_names(cls) if name not in own]
    for name in kwargs or {}:
        if name in own:
            raise ValueError(f"{argument}_kwargs: {name!r} of {cls.__name__} is set by the model: leave it out")
        if name not in known:
            others = nearest(str(name), known) if known else "; it has none beyond those that the model sets"
            raise ValueError(f"{argument}_kwargs: {cls.__name__} has no argument {name!r}{others}")
    return cls, dict(kwargs or {})

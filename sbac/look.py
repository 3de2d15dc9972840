"""Whether modules are still what they were when somebody looked, and whether anybody looks on at what they do.

Where operations are written out instead of going through modules and autograd, or parameters lie in one tensor, these
are asked at each use.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from itertools import repeat
from operator import attrgetter, contains
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook


class _Trust(threading.local):
    """What a thread takes as known while nobody but sbac and torch does anything to a policy.

    Attributes:
        token: Stands for what the policy consists of, and is another where that is; None where nothing is known.
    """

    token: object | None = None


_trust = _Trust()


class Look:
    """What modules consist of, so that a change is noticed at little cost.

    Args:
        modules: Those that hold what is looked at; none where nobody has looked yet.
        calls: Those of them, by default all, that are called: into which somebody may have hooked.

    Attributes:
        parameters: Of all modules.
    """

    def __init__(self, modules: Sequence[nn.Module] = (), calls: Sequence[nn.Module] | None = None) -> None:
        called = modules if calls is None else calls
        self._holders = [holder for module in modules for holder in (module._modules, module._parameters)]
        self._held = [dict(holder) for holder in self._holders]
        parts = [(holder, *item) for holder in self._holders for item in holder.items()]
        self.parameters = [part for _, _, part in parts if isinstance(part, Tensor)]
        self._numbers = [place for place in parts if isinstance(place[2], Tensor) and place[2].numel() == 1]
        self._addresses = [*map(_address, self.parameters)]
        self._hooks = [hooks for module in called for hooks in _hooks(module)]
        self._attributes = [module.__dict__ for module in called]
        self._token = _trust.token  # under which it was true

    def is_still_so(self) -> bool:
        """Whether the modules hold the same parts and parameters, in the same memory; not if nobody has looked yet."""
        token = _trust.token
        if token is None or token is not self._token:
            if not self._is_the_same():
                return False
            self._token = token
        return True

    def _is_the_same(self) -> bool:
        try:
            # Python asks for equality only what is not the same object, and two tensors then have no single answer.
            if not self._held or self._holders != self._held:
                return False
        except (RuntimeError, TypeError):
            return False
        for holder, name, number in self._numbers:  # which do have one
            if holder[name] is not number:
                return False
        return [*map(_address, self.parameters)] == self._addresses

    def is_left_alone(self, with_way_back: bool = False) -> bool:
        """Whether nobody hooked into one of the modules, gave it another `forward`, or looks on at what torch does.

        Args:
            with_way_back: Nor is to be told of a parameter's gradient.
        """
        if _trust.token is not None:
            return True
        if self.is_hooked() or _is_watched():
            return False
        return not (with_way_back and any(any(map(hooks, self.parameters)) for hooks in _HOOKS_OF_GRADIENTS))

    def is_hooked(self) -> bool:
        """Whether somebody hooked into one of the modules, or gave it another `forward`."""
        if _trust.token is not None:
            return False
        return any(self._hooks) or any(map(contains, self._attributes, repeat("forward")))


_address = Tensor.data_ptr
_HOOKS_OF_GRADIENTS = attrgetter("_backward_hooks"), attrgetter("_post_accumulate_grad_hooks")


class Glance:
    """One look at a whole policy, at the beginning of an update, in place of one at each part whenever it is used."""

    def __init__(self) -> None:
        self._policy: nn.Module | None = None
        self._look = Look()
        self._are_ours = False
        self._token = object()
        self._found: object | None = None
        self._before: object | None = None

    def at(self, policy: nn.Module, model: object) -> Self:
        """Within this (``with``), what looks find of a policy is taken to hold, until `forget`.

        If somebody hooked into it, looks on, or wrote one of its modules or the model, then each part is looked at as
        ever: what is neither sbac's nor torch's own may change anything at any time.

        Args:
            policy: What is looked at.
            model: Whose update it is.
        """
        before, _trust.token = _trust.token, None
        if policy is not self._policy or not self._look.is_still_so():
            modules = [*policy.modules()]
            self._policy, self._look, self._token = policy, Look(modules), object()
            self._are_ours = all(map(_is_ours, modules))
        are_ours = self._are_ours and _is_ours(model) and "_update" not in vars(model)
        self._found = self._token if are_ours and self._look.is_left_alone(with_way_back=True) else None
        self._before = _trust.token = before
        return self

    def __enter__(self) -> None:
        _trust.token = self._found

    def __exit__(self, *exception: object) -> None:
        _trust.token = self._before


def forget() -> None:
    """Look at everything again: somebody found something changed, or changed it."""
    _trust.token = None


def _is_ours(thing: object) -> bool:
    return type(thing).__module__.startswith(("sbac.", "torch.nn."))


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody hooked into a module, or gave it another `forward`."""
    return _trust.token is None and ("forward" in module.__dict__ or any(_hooks(module)))


def _is_watched() -> bool:
    """Whether torch looks at each operation: it traces, compiles, transforms, counts or casts."""
    return bool(
        torch.is_autocast_enabled("cpu")
        or torch._C._is_tracing()
        or torch.compiler.is_compiling()
        or _has_any_global_hook()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.maybe_current_level() is not None
    )


def _hooks(module: nn.Module) -> tuple[Mapping[int, Any], ...]:
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks

"""Whether modules are still what they were when somebody looked, and whether anybody looks on at what they do.

Where operations are written out instead of going through modules and autograd, or parameters lie in one tensor, these
are asked at each use. Within an update, in which only sbac and torch do anything, one look at the whole policy answers
for all of its parts: `Glance`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from operator import attrgetter, contains
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook


class Look:
    """What modules consist of, so that a change is noticed at little cost.

    Args:
        modules: Those that hold what is looked at; none where nobody has looked yet.
        calls: Those of them, by default all, that are called: into which somebody may have hooked.

    Attributes:
        modules: All of them.
        parameters: Of all modules.
    """

    def __init__(self, modules: Sequence[nn.Module] = (), calls: Sequence[nn.Module] | None = None) -> None:
        called = modules if calls is None else calls
        self.modules = [*modules, *called] if calls is not None else [*modules]
        self._kinds = [*map(type, self.modules)]
        self._holders = [holder for module in modules for holder in (module._modules, module._parameters)]
        self._held = [dict(holder) for holder in self._holders]
        parts = [(holder, *item) for holder in self._holders for item in holder.items()]
        self.parameters = [part for _, _, part in parts if isinstance(part, Tensor)]
        self._numbers = [place for place in parts if isinstance(place[2], Tensor) and place[2].numel() == 1]
        self._addresses = [*map(_address, self.parameters)]
        self._hooks = [hooks for module in called for hooks in _hooks(module)]
        self._attributes = [module.__dict__ for module in called]
        self._sizes = [*map(len, self._attributes)]
        self._whole: Look | None = None

    def is_still_so(self) -> bool:
        """Whether the modules hold the same parts and parameters, in the same memory; not if nobody has looked yet."""
        if self._is_answered_for():
            return True
        if not self._is_the_same():
            return False
        whole = _answering.look
        self._whole = whole if whole is not None and whole._includes(self) else None
        return True

    def is_left_alone(self, with_way_back: bool = False) -> bool:
        """Whether nobody hooked into one of the modules, gave it another `forward`, or looks on at what torch does.

        Args:
            with_way_back: Nor is to be told of a parameter's gradient.
        """
        if self._is_answered_for():
            return True
        if self.is_hooked() or _is_watched():
            return False
        return not (with_way_back and any(any(map(hooks, self.parameters)) for hooks in _HOOKS_OF_GRADIENTS))

    def is_hooked(self) -> bool:
        """Whether somebody hooked into one of the modules, or gave it another `forward`."""
        if self._is_answered_for():
            return False
        return any(self._hooks) or any(map(contains, self._attributes, repeat("forward")))

    def _is_answered_for(self) -> bool:
        """Whether a look at all of a policy answers for this one, which found the modules so under the same look."""
        whole = _answering.look
        return whole is not None and whole is self._whole

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
        if [*map(type, self.modules)] != self._kinds or [*map(len, self._attributes)] != self._sizes:
            return False
        return [*map(_address, self.parameters)] == self._addresses

    def _includes(self, part: Look) -> bool:
        return {*map(id, part.modules)} <= {*map(id, self.modules)}


_address = Tensor.data_ptr
_HOOKS_OF_GRADIENTS = attrgetter("_backward_hooks"), attrgetter("_post_accumulate_grad_hooks")


class _Answering(threading.local):
    """Which look answers for others in a thread."""

    look: Look | None = None


_answering = _Answering()


class Glance:
    """One look at a whole policy, at the beginning of an update, in place of one at each part whenever it is used."""

    def __init__(self) -> None:
        self._policy: nn.Module | None = None
        self._look = Look()
        self._are_ours = False

    @contextlib.contextmanager
    def at(self, policy: nn.Module, model: object) -> Iterator[None]:
        """While it lasts, one look answers for those at parts of a policy, until `forget`.

        If somebody hooked into a module, looks on, or wrote a module, one of its methods or the model, then each part
        is looked at as ever: what is neither sbac's nor torch's own may change anything at any time. Classes of either
        are taken to be as they came.

        Args:
            policy: What is looked at.
            model: Whose update it is.
        """
        forget()
        if policy is not self._policy or not self._look.is_still_so():
            self._policy, self._look = policy, Look([*policy.modules()])
            self._are_ours = all(map(_is_ours, self._look.modules))
        are_ours = self._are_ours and _is_module_ours(type(model)) and _UPDATES.isdisjoint(vars(model))
        if are_ours and self._look.is_left_alone(with_way_back=True):
            _answering.look = self._look
        try:
            yield
        finally:
            forget()


def forget() -> None:
    """Let each part be looked at again: something was changed, or code is called that is neither sbac's nor torch's."""
    _answering.look = None


_UPDATES = {"_update", "_gradient", "_now"}  # methods of models, which somebody may have put others in place of


def _is_ours(module: nn.Module) -> bool:
    """Whether a module is of sbac's or torch's own classes, with their methods."""
    kind = type(module)
    others = (name for name, value in vars(module).items() if callable(value) and hasattr(kind, name))
    return _is_module_ours(kind) and next(others, None) is None


def _is_module_ours(kind: type) -> bool:
    return kind.__module__.startswith(("sbac.", "torch.nn."))


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody hooked into a module, or gave it another `forward`."""
    return "forward" in module.__dict__ or any(_hooks(module))


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

"""What torch does not have: RMSprop as in TensorFlow, statistics before the first step, and optimizers made at once."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Make, read or write optimizers without torch's compiler.

    torch keeps these functions out of whatever it compiles. To do so it imports its compiler with the first call, which
    takes longer than all else that a program of sbac needs to start. Nothing is compiled in here.
    """
    names = ("add_param_group", "state_dict", "load_state_dict")
    functions = [getattr(getattr(torch.optim.Optimizer, name), "__wrapped__", None) for name in names]
    if "torch._dynamo" in sys.modules or None in functions:
        yield
        return
    mark = "__dynamo_disable"  # under which torch finds what to call in its place
    bare = [function for function in functions if not hasattr(function, mark)]
    for function in bare:
        setattr(function, mark, function)
    try:
        yield
    finally:
        for function in bare:
            delattr(function, mark)


def _known_state(optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """`initial_state` of torch's RMSprop without momentum and of its fused Adam, the usual ones; None of any other."""
    group = optimizer.param_groups[0]
    parameter, is_fused = group["params"][0], bool(group.get("fused"))
    if group.get("capturable") or group.get("differentiable"):
        return None
    if type(optimizer) is torch.optim.RMSprop and not (group["momentum"] or group["centered"]):
        names = ["square_avg"]
    elif type(optimizer) is torch.optim.Adam and is_fused and not group["amsgrad"]:
        names = ["exp_avg", "exp_avg_sq"]
    else:
        return None
    step = torch.zeros((), dtype=torch.float32, device=parameter.device) if is_fused else torch.zeros(())
    return {"step": step, **{name: torch.zeros_like(parameter, requires_grad=False) for name in names}}


def initial_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's statistics of its only parameter as they are before the first step.

    torch makes them at the first step; to be shared between processes they must be there earlier.

    Args:
        optimizer: Of one parameter. Its class may name other first values than 0 in `initial_values`.

    Returns:
        By name; entries that are no tensors as they are after a step.

    Raises:
        ValueError: It keeps statistics in new tensors from step to step, in numbers, or begins with other ones.
    """
    known = _known_state(optimizer)
    if known is not None:
        return known
    own, shared = _trial(optimizer), _trial(optimizer)
    parameter, twin = own.param_groups[0]["params"][0], shared.param_groups[0]["params"][0]
    own.step()
    first = dict(own.state[parameter])
    values: Mapping[str, float] = getattr(optimizer, "initial_values", {})
    state = {
        name: torch.full_like(value, values.get(name, 0.0)) if isinstance(value, Tensor) else value
        for name, value in first.items()
    }
    # Begun with this state, it must do what it does by itself, and go on in the same tensors.
    shared.state[twin] = dict(state)
    initial = {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}
    shared.step()
    own_after, twin_after = own.state[parameter], shared.state[twin]
    is_shareable = torch.equal(parameter, twin) and all(
        torch.equal(own_after[name], twin_after[name]) and twin_after[name] is value
        if isinstance(value, Tensor)
        else own_after[name] == twin_after[name] == value
        for name, value in state.items()
    )
    if not is_shareable:
        raise ValueError(
            f"{type(optimizer).__name__} keeps statistics that processes cannot share: they begin with other numbers "
            "than 0, or are no tensors that are changed in place; torch.optim.RMSprop and Adam can be shared"
        )
    return initial


def require_statistics(optimizer: torch.optim.Optimizer, given: Mapping[str, Tensor]) -> None:
    """Refuse stored statistics that lack some of those that an optimizer keeps of its only parameter. More do no harm.

    Raises:
        ValueError: Naming those that differ by name or shape.
    """
    kept: Mapping[str, Any] | None = _known_state(optimizer)
    if kept is None:
        trial = _trial(optimizer)
        trial.step()
        kept = trial.state[trial.param_groups[0]["params"][0]]
    own = {name: tuple(torch.as_tensor(value).shape) for name, value in kept.items()}
    stored = {name: tuple(value.shape) for name, value in given.items()}
    differing = sorted(name for name in own if own[name] != stored.get(name))
    if differing:
        raise ValueError(
            f"the shapes of the statistics that {type(optimizer).__name__} keeps differ: "
            + ", ".join(f"{name} is {stored.get(name)}, not {own[name]}" for name in differing)
        )


def _trial(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """A copy at its beginning, with a gradient to step along."""
    trial = copy.deepcopy(optimizer)
    parameter = trial.param_groups[0]["params"][0]
    trial.state.clear()
    parameter.detach().zero_()  # others may move the original between one copy and the next
    parameter.grad = torch.linspace(-1, 1, parameter.numel()).view_as(parameter)
    return trial


class RMSpropTFLike(torch.optim.Optimizer):
    """RMSprop with epsilon inside the square root and squared gradients that start at 1, as in TensorFlow.

    v <- alpha v + (1 - alpha) g^2, theta <- theta - lr g / sqrt(v + eps), with v_0 = 1. Mnih et al. 2016,
    arXiv:1602.01783, section 4, "Optimization", has epsilon in the same place; `torch.optim.RMSprop` adds it to
    the root and starts at 0, which makes its first steps much larger.

    Args:
        params: Parameters to optimise.
        lr: Step size, at least 0.
        alpha: Decay of the squared gradient, in [0, 1).
        eps: Added under the square root, above 0.
        weight_decay: L2 penalty, at least 0.
        momentum: In [0, 1).
    """

    initial_values: ClassVar[Mapping[str, float]] = {"square_avg": 1.0}

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
    ) -> None:
        if not 0 <= alpha < 1 or eps <= 0 or lr < 0 or weight_decay < 0 or not 0 <= momentum < 1:
            raise ValueError(
                "RMSpropTFLike needs lr >= 0, alpha in [0, 1), eps > 0, weight_decay >= 0 and momentum in [0, 1), not "
                f"lr={lr}, alpha={alpha}, eps={eps}, weight_decay={weight_decay}, momentum={momentum}"
            )
        super().__init__(
            params, {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step along the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = parameter.grad
                if group["weight_decay"]:
                    gradient = gradient.add(parameter, alpha=group["weight_decay"])
                state = self.state[parameter]
                if not state:
                    state["square_avg"] = torch.full_like(parameter, self.initial_values["square_avg"])
                    if group["momentum"]:
                        state["momentum_buffer"] = torch.zeros_like(parameter)
                square_avg = state["square_avg"]
                square_avg.mul_(group["alpha"]).addcmul_(gradient, gradient, value=1 - group["alpha"])
                direction = gradient / (square_avg + group["eps"]).sqrt_()
                if group["momentum"]:
                    # As in TensorFlow, the learning rate is inside the momentum buffer.
                    state["momentum_buffer"].mul_(group["momentum"]).add_(direction, alpha=group["lr"])
                    parameter.sub_(state["momentum_buffer"])
                else:
                    parameter.sub_(direction, alpha=group["lr"])
        return loss

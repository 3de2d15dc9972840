"""Parameters that lie end to end in one tensor, and the steps that move them.

A small network has a dozen parameter tensors, and most of the time of clipping, stepping and copying them goes into
handling each. Laid flat, each of these is one operation on one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sbac.guards import NotFiniteError


# Layers that do the same in training and in evaluation. Any other, and any of a user's own, counts as one that may not.
_MODELESS = (
    nn.Linear,
    nn.Conv2d,
    nn.LayerNorm,
    nn.Flatten,
    nn.Identity,
    nn.Sequential,
    nn.ModuleList,
    nn.ReLU,
    nn.LeakyReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Tanh,
    nn.Sigmoid,
)


class Trainable(nn.Module):
    """A module whose trainable parameters are views of one flat tensor.

    Attributes:
        flat: All trainable parameters, (n_parameters,), with `flat.grad` likewise; set by `flatten`.
        optimizer: Steps along `flat.grad`; set by `set_optimizer`. Target networks have none.
    """

    flat: nn.Parameter
    optimizer: torch.optim.Optimizer

    def flatten(self) -> None:
        """Lay the parameters out in one tensor. To be called once, after construction and the move to a device."""
        self._leaves = [parameter for parameter in self.parameters() if parameter.requires_grad]
        kinds = {(leaf.dtype, leaf.device) for leaf in self._leaves}
        if len(kinds) != 1:
            raise ValueError(
                f"{type(self).__name__} needs trainable parameters of one dtype on one device, "
                f"got {sorted(map(str, kinds))}"
            )
        flat = nn.Parameter(torch.cat([leaf.detach().reshape(-1) for leaf in self._leaves]))
        flat.grad = torch.zeros_like(flat)
        start = 0
        for leaf in self._leaves:
            stop = start + leaf.numel()
            leaf.data = flat.detach()[start:stop].view_as(leaf)
            leaf.grad = flat.grad[start:stop].view_as(leaf)
            start = stop
        self._has_modes = any(
            type(module) not in _MODELESS and not type(module).__module__.startswith("sbac.")
            for module in self.modules()
        )
        self._buffer_list = list(self.buffers())
        # Not registered as a parameter of the module: it would appear twice in its state.
        object.__setattr__(self, "flat", flat)

    def set_optimizer(self, optimizer_class: type[torch.optim.Optimizer], learning_rate: float, **kwargs: Any) -> None:
        """Give the module its optimizer, fused where torch has such a kernel."""
        if optimizer_class in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD):
            kwargs.setdefault("fused", True)
        make: Callable[..., torch.optim.Optimizer] = optimizer_class
        self.optimizer = make([self.flat], lr=learning_rate, **kwargs)

    def set_learning_rate(self, learning_rate: float) -> None:
        """The step size from now on."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    def set_training_mode(self, mode: bool) -> None:
        """As `nn.Module.train`, but only for networks with layers to which the mode matters."""
        if self._has_modes and self.training is not mode:
            self.train(mode)

    def descend(self, loss: Tensor, max_grad_norm: float | None = None) -> Tensor:
        """One optimizer step down the gradient of a loss, with respect to this module's parameters only.

        Args:
            loss: A scalar.
            max_grad_norm: The gradient is scaled down to this Euclidean norm where it is longer; None leaves it.

        Returns:
            The norm of the gradient before clipping, a scalar.

        Raises:
            NotFiniteError: The loss or its gradient is NaN or infinite. The parameters are as they were.
        """
        gradient = self.flat.grad
        assert gradient is not None
        gradient.zero_()
        loss.backward(inputs=self._leaves)
        norm = torch.linalg.vector_norm(gradient)
        if not math.isfinite(norm + loss.detach()):
            raise NotFiniteError(
                f"{type(self).__name__}: the loss is {loss.item()} and the norm of its gradient {norm.item()}; the "
                "weights are those of before this update: try a smaller learning rate, max_grad_norm, or rewards of a "
                "smaller scale"
            )
        if max_grad_norm is not None:
            gradient.mul_((max_grad_norm / (norm + 1e-6)).clamp_(max=1.0))
        self.optimizer.step()
        return norm

    @torch.no_grad()
    def follow(self, source: Trainable, tau: float) -> None:
        """Soft update of a target network: theta' <- tau theta + (1 - tau) theta'. `tau=1` copies.

        Buffers that are no parameters (running statistics of normalisation layers) are copied.
        """
        self.flat.data.lerp_(source.flat.data, tau)
        for own, other in zip(self._buffer_list, source._buffer_list, strict=True):
            own.copy_(other)


class RMSpropTFLike(torch.optim.Optimizer):
    """RMSprop with epsilon inside the square root and squared gradients that start at 1, as in TensorFlow.

    v <- alpha v + (1 - alpha) g^2, theta <- theta - lr g / sqrt(v + eps), with v_0 = 1. Mnih et al. 2016,
    arXiv:1602.01783, section 4, equations S2 and S3, has epsilon in the same place; `torch.optim.RMSprop` adds it to
    the root and starts at 0, which makes its first steps much larger.

    Args:
        params: Parameters to optimise.
        lr: Step size, at least 0.
        alpha: Decay of the squared gradient, in [0, 1).
        eps: Added under the square root, above 0.
        weight_decay: L2 penalty, at least 0.
        momentum: In [0, 1).
    """

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
                    state["square_avg"] = torch.ones_like(parameter)
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

"""Perceptrons whose forward and backward passes are written out, for the plain ones that most policies consist of.

A small network spends most of its time in the bookkeeping of modules and of autograd's graph. Where a perceptron is
made of nothing but linear layers, ReLU and tanh, the same operations are called here in a row, forwards and backwards.
Everything else, and everything that somebody hooks into, goes through the modules themselves and autograd, which remain
the reference: both give the same numbers, to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

FEW = 2**18
"""Multiplications in the largest layer up to which NumPy, which needs less time to begin, does the work.

Beyond them its BLAS would share the work among threads, however many torch is allowed.
"""


class Gradient(NamedTuple):
    """Where a parameter's gradient is added up: one memory, seen twice."""

    tensor: Tensor
    array: np.ndarray | None  # None where NumPy cannot reach it


class _Layer(NamedTuple):
    """A linear layer and the activation behind it, as tensors and as arrays that share the parameters' memory."""

    weight: Tensor  # (n_out, n_in)
    weight_t: Tensor  # (n_in, n_out)
    bias: Tensor  # (n_out,)
    weight_array: np.ndarray
    weight_array_t: np.ndarray  # (n_in, n_out)
    bias_array: np.ndarray
    weight_id: int  # of the module's parameter
    bias_id: int
    activation: str | None = None  # "relu", "tanh", or None


class Perceptron:
    """The way through some parts of a network, short where they are plain.

    Args:
        owner: The network.
        *names: Of its parts, in order. An `nn.Sequential` stands for what is in it. The short way is for `nn.Linear`
            with a bias, each followed by at most one `nn.ReLU` or `nn.Tanh`, in float32 on the CPU.
    """

    def __init__(self, owner: nn.Module, *names: str) -> None:
        self._owner = owner
        self._names = names
        self._found = _Found()

    def __call__(self, x: Tensor) -> Tensor:
        """(B, n_in) -> (B, n_out)."""
        if torch.is_grad_enabled() or not self._takes(x):
            for name in self._names:
                x = getattr(self._owner, name)(x)
            return x
        layers, n_weights = self._found.layers, self._found.n_weights
        if len(x) * n_weights <= FEW:
            return torch.from_numpy(_forward_arrays(layers, x.detach().numpy())[-1])
        return _forward(layers, x.detach())[-1]

    def trace(self, x: Tensor) -> Trace | None:
        """As a call, with the way back; None where that is not written out, but left to autograd."""
        if not self._takes(x) or any(map(_has_hooks_of_gradients, self._found.parameters)):
            return None
        layers, n_weights = self._found.layers, self._found.n_weights
        if len(x) * n_weights <= FEW:
            return Trace(layers, _forward_arrays(layers, x.detach().numpy()))
        return Trace(layers, _forward(layers, x.detach()))

    def act(self, x: np.ndarray) -> np.ndarray | None:
        """As a call, from array to array, for a few rows; None where that is left to the modules."""
        if x.ndim != 2 or not self._is_plain() or len(x) * self._found.n_weights > FEW:
            return None
        if x.dtype != np.float32:
            with np.errstate(all="ignore"):
                x = x.astype(np.float32)
        return _forward_arrays(self._found.layers, x)[-1]

    def _takes(self, x: Tensor) -> bool:
        """Whether what is written out does the same to `x` as the modules."""
        return x.dim() == 2 and x.dtype is torch.float32 and self._is_plain()

    def _is_plain(self) -> bool:
        """Whether all parts are what is written out here, as they lie in memory now."""
        if not self._found.is_still_so(self._owner._modules):
            # Somebody replaced a module or a parameter, or gave one other memory.
            self._found = _look([(name, self._owner._modules[name]) for name in self._names])
        found = self._found
        return bool(found.layers) and not (any(found.hooks) or found.has_own_forward() or _is_watched())

    def __getstate__(self) -> dict[str, Any]:
        # Without views, which would become tensors of their own in a copy.
        return {**self.__dict__, "_found": _Found()}


class _Found(NamedTuple):
    """What the parts of a perceptron were when they were looked at, so that a change is noticed at little cost."""

    layers: Sequence[_Layer] = ()  # none where the short way would not be the same
    n_weights: int = 0  # of the largest layer
    parts: Sequence[tuple[str, Any]] = ()
    insides: Sequence[tuple[Mapping[str, Any], Sequence[Any]]] = ()  # of each `nn.Sequential`: now, and then
    holders: Sequence[Mapping[str, Any]] = ()  # of parameters, by name
    parameters: Sequence[Any] = ()
    ids: Sequence[int] = ()
    addresses: Sequence[int] = ()
    hooks: Sequence[Mapping[int, Any]] = ()  # of all modules; empty where nobody hooked into them
    attributes: Sequence[Mapping[str, Any]] = ()  # of all modules

    def is_still_so(self, owned: Mapping[str, Any]) -> bool:
        """Whether the owner's modules, and the memory of their parameters, are those that were found."""
        for name, part in self.parts:
            if owned[name] is not part:
                return False
        for inside, then in self.insides:
            if list(inside.values()) != then:
                return False
        parameters = [p for holder in self.holders for p in holder.values() if p is not None]
        if [*map(id, parameters)] != self.ids:  # others may lie in the same memory
            return False
        return bool(self.parts) and [*map(Tensor.data_ptr, parameters)] == self.addresses

    def has_own_forward(self) -> bool:
        """Whether somebody gave one of the modules another `forward`."""
        return any("forward" in attributes for attributes in self.attributes)


def _look(parts: Sequence[tuple[str, Any]]) -> _Found:
    """See what the parts of a perceptron are."""
    modules: list[nn.Module] = []
    for _, part in parts:
        modules += [part, *part._modules.values()] if type(part) is nn.Sequential else [part]
    layers = _plain_layers(modules, [part for _, part in parts])
    holders = [module._parameters for module in modules if module._parameters]
    parameters = [parameter for holder in holders for parameter in holder.values() if parameter is not None]
    return _Found(
        layers,
        max((layer.weight.numel() for layer in layers), default=0),
        parts,
        [(part._modules, list(part._modules.values())) for _, part in parts if type(part) is nn.Sequential],
        holders,
        parameters,
        [*map(id, parameters)],
        [parameter.data_ptr() for parameter in parameters],
        [hooks for module in modules for hooks in _hooks(module)],
        [module.__dict__ for module in modules],
    )


class Trace:
    """What a perceptron gave, with the way back from it.

    Args:
        layers: Its layers.
        kept: The input and what came out of each layer behind its activation.

    Attributes:
        output: (B, n_out).
    """

    def __init__(self, layers: Sequence[_Layer], kept: Sequence[Any]) -> None:
        self._layers, self._kept = layers, kept
        self._is_few = isinstance(kept[0], np.ndarray)
        self.output: Tensor = torch.from_numpy(kept[-1]) if self._is_few else kept[-1]

    def back(self, gradient: Tensor, into: Mapping[int, Gradient], is_input_asked: bool = False) -> Tensor | None:
        """Add to the gradients of the parameters.

        Args:
            gradient: Of the loss with respect to the output, (B, n_out).
            into: Where to add, by the ids of the parameters. Others are left out.
            is_input_asked: Whether to return the gradient with respect to the input, (B, n_in).
        """
        if self._is_few:
            with np.errstate(all="ignore"):
                array = _backward_arrays(self._layers, self._kept, gradient.numpy(), into, is_input_asked)
            return torch.from_numpy(array) if is_input_asked else None
        gradient = _backward(self._layers, self._kept, gradient, into, is_input_asked)
        return gradient if is_input_asked else None


_ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.Tanh: "tanh"}


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody hooked into a module, or gave it another `forward`."""
    return "forward" in module.__dict__ or any(_hooks(module))


def _hooks(module: nn.Module) -> tuple[Mapping[int, Any], ...]:
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def _has_hooks_of_gradients(parameter: Tensor | None) -> bool:
    return parameter is not None and bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


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


def _plain_layers(modules: Sequence[nn.Module], parts: Sequence[Any]) -> list[_Layer]:
    """The layers that the modules make up; none where the short way would not be the same.

    Args:
        modules: In order, with each part before what is in it.
        parts: Those that may be an `nn.Sequential`.
    """
    layers: list[_Layer] = []
    for module in modules:
        if type(module) is nn.Linear and _is_usual(module.weight) and _is_usual(module.bias):
            weight, bias = module.weight.detach(), module.bias.detach()
            arrays = weight.numpy(), weight.numpy().T, bias.numpy()
            layers.append(_Layer(weight, weight.t(), bias, *arrays, id(module.weight), id(module.bias)))
        elif type(module) in _ACTIVATIONS and layers and layers[-1].activation is None:
            layers[-1] = layers[-1]._replace(activation=_ACTIVATIONS[type(module)])
        elif type(module) is not nn.Sequential or all(module is not part for part in parts):
            return []
    return layers


def _is_usual(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.dtype is torch.float32 and parameter.device.type == "cpu"


def _forward_arrays(layers: Sequence[_Layer], x: np.ndarray) -> list[np.ndarray]:
    """The input and what comes out of each layer behind its activation: n + 1 arrays."""
    kept = [x]
    with np.errstate(all="ignore"):  # what is not finite is noticed later, as with torch
        for layer in layers:
            x = x.dot(layer.weight_array_t)  # of small matrices, sooner than matmul, which gives the same
            x += layer.bias_array
            if layer.activation == "relu":
                np.maximum(x, 0, out=x)
            elif layer.activation == "tanh":
                np.tanh(x, out=x)
            kept.append(x)
    return kept


def _forward(layers: Sequence[_Layer], x: Tensor) -> list[Tensor]:
    """As `_forward_arrays`, by torch."""
    kept = [x]
    for layer in layers:
        x = torch.addmm(layer.bias, x, layer.weight_t)
        if layer.activation == "relu":
            x.relu_()
        elif layer.activation == "tanh":
            x.tanh_()
        kept.append(x)
    return kept


def _backward_arrays(
    layers: Sequence[_Layer],
    kept: Sequence[np.ndarray],
    gradient: np.ndarray,
    into: Mapping[int, Gradient],
    is_input_asked: bool,
) -> np.ndarray:
    """Add to the gradients of those parameters that are in `into`; returns that of the input, if it is asked for."""
    for k in range(len(layers) - 1, -1, -1):
        layer, below, above = layers[k], kept[k], kept[k + 1]
        if layer.activation == "relu":
            gradient = gradient * (above > 0)
        elif layer.activation == "tanh":
            slope = above * above
            np.subtract(1, slope, out=slope)
            gradient = np.multiply(gradient, slope, out=slope)
        weight, bias = into.get(layer.weight_id), into.get(layer.bias_id)
        if weight is not None and weight.array is not None:
            weight.array.__iadd__(gradient.T.dot(below))
        if bias is not None and bias.array is not None:
            bias.array.__iadd__(gradient.sum(0))
        if k > 0 or is_input_asked:
            gradient = gradient.dot(layer.weight_array)
    return gradient


_relu_backward, _tanh_backward = torch.ops.aten.threshold_backward.default, torch.ops.aten.tanh_backward.default


def _backward(
    layers: Sequence[_Layer],
    kept: Sequence[Tensor],
    gradient: Tensor,
    into: Mapping[int, Gradient],
    is_input_asked: bool,
) -> Tensor:
    """As `_backward_arrays`, by torch."""
    for k in range(len(layers) - 1, -1, -1):
        layer, below, above = layers[k], kept[k], kept[k + 1]
        if layer.activation == "relu":
            gradient = _relu_backward(gradient, above, 0)
        elif layer.activation == "tanh":
            gradient = _tanh_backward(gradient, above)
        weight, bias = into.get(layer.weight_id), into.get(layer.bias_id)
        if weight is not None:
            weight.tensor.addmm_(gradient.t(), below)
        if bias is not None:
            bias.tensor.add_(gradient.sum(0))
        if k > 0 or is_input_asked:
            gradient = gradient.mm(layer.weight)
    return gradient

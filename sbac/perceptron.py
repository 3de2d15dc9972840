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

from sbac.look import Look

FEW = 2**18
"""Multiplications in the largest layer up to which NumPy, which needs less time to begin, does the work.

Beyond them its BLAS would share the work among threads, however many torch is allowed.
"""

FEW_OUTPUTS = 2**12
"""Numbers that come out of the widest layer, likewise.

NumPy goes over them more often than torch: for zeros before the product, the bias and the activation.
"""

FEW_COLUMNS = 24
"""Columns of a product up to which its transpose may be there sooner: BLAS is slow at matrices of few columns."""

ALL = slice(None)
"""Every input."""


class Gradient:
    """Where a parameter's gradient is added up: one memory, seen twice.

    Args:
        tensor: The memory.
        array: The same; None where NumPy cannot reach it.

    Attributes:
        is_zero: Whether the memory holds zeros, to which nothing was added yet.
    """

    __slots__ = ("array", "is_zero", "tensor")

    def __init__(self, tensor: Tensor, array: np.ndarray | None) -> None:
        self.tensor, self.array, self.is_zero = tensor, array, False

    def beta(self) -> int:
        """By what a product that is added multiplies what is there: 0, so that zeros need not be read, or 1."""
        beta, self.is_zero = 0 if self.is_zero else 1, False
        return beta


class Layer(NamedTuple):
    """A linear layer and the activation behind it, as tensors and as arrays that share the parameters' memory."""

    weight: Tensor  # (n_out, n_in)
    weight_t: Tensor  # (n_in, n_out)
    bias: Tensor  # (n_out,)
    weight_array: np.ndarray
    weight_array_t: np.ndarray  # (n_in, n_out)
    bias_array: np.ndarray  # (1, n_out), which is added to a single row sooner
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
        self._look = Look()
        self._plain = Plain()

    def __call__(self, x: Tensor) -> Tensor:
        """(B, n_in) -> (B, n_out)."""
        if torch.is_grad_enabled() or not (_is_matrix(x) and self._is_plain()):
            for name in self._names:
                x = getattr(self._owner, name)(x)
            return x
        return self._plain.trace(x).output

    def trace(self, x: Tensor) -> Trace | None:
        """As a call, with the way back; None where that is not written out, but left to autograd."""
        if not (_is_matrix(x) and self._is_plain(with_way_back=True)):
            return None
        return self._plain.trace(x)

    def act(self, x: np.ndarray) -> np.ndarray | None:
        """As a call, from array to array, for a few rows; None where that is left to the modules."""
        if x.ndim != 2 or not self._is_plain() or len(x) * self._plain.n_weights > FEW:
            return None
        if x.dtype != np.float32:
            with np.errstate(all="ignore"):
                x = x.astype(np.float32)
        return _forward_arrays(self._plain.layers, x)[-1]

    def plain(self) -> Plain:
        """What it is made of, as it lies in memory now."""
        if not self._look.is_still_so():
            # Somebody replaced a module or a parameter, or gave one other memory.
            parts: list[Any] = [self._owner._modules[name] for name in self._names]
            modules: list[Any] = []
            for part in parts:
                modules += [part, *part._modules.values()] if type(part) is nn.Sequential else [part]
            self._look = Look([self._owner, *modules], modules)
            self._plain = Plain.of(modules, parts)
        return self._plain

    def _is_plain(self, with_way_back: bool = False) -> bool:
        """Whether all parts are what is written out here, and nobody looks on."""
        return bool(self.plain().layers) and self._look.is_left_alone(with_way_back)

    def __getstate__(self) -> dict[str, Any]:
        # Without views, which would become tensors of their own in a copy.
        return {**self.__dict__, "_look": Look(), "_plain": Plain()}


class Plain(NamedTuple):
    """The layers of a perceptron; none where what is written out would not be the same."""

    layers: Sequence[Layer] = ()
    n_weights: int = 0  # of the largest layer
    width: int = 0  # of the widest one

    @classmethod
    def of(cls, modules: Sequence[nn.Module], parts: Sequence[nn.Module]) -> Plain:
        """Those that modules make up.

        Args:
            modules: In order, with each part before what is in it.
            parts: Those that may be an `nn.Sequential`.
        """
        layers = _plain_layers(modules, parts)
        widths = (len(layer.weight) for layer in layers)
        return cls(layers, max((layer.weight.numel() for layer in layers), default=0), max(widths, default=0))

    def is_by_numpy(self, n_rows: int) -> bool:
        """Whether so many rows are better left to NumPy."""
        return n_rows * self.n_weights <= FEW and n_rows * self.width <= FEW_OUTPUTS

    def trace(self, x: Tensor) -> Trace:
        """What they give for (B, n_in), with the way back."""
        if self.is_by_numpy(len(x)):
            return Trace(self.layers, _forward_arrays(self.layers, x.detach().numpy()))
        return Trace(self.layers, _forward(self.layers, x.detach()))


class Trace:
    """What a perceptron gave, with the way back from it.

    Args:
        layers: Its layers.
        kept: The input and what came out of each layer behind its activation.

    Attributes:
        output: (B, n_out).
    """

    def __init__(self, layers: Sequence[Layer], kept: Sequence[Any]) -> None:
        self._layers, self._kept = layers, kept
        self._is_few = isinstance(kept[0], np.ndarray)
        self.output: Tensor = torch.from_numpy(kept[-1]) if self._is_few else kept[-1]

    @staticmethod
    def joined(parts: Sequence[Trace]) -> Trace:
        """Several that the same layers gave, one behind the other along B."""
        join: Any = np.concatenate if parts[0]._is_few else torch.cat
        return Trace(parts[0]._layers, [join(kept) for kept in zip(*(part._kept for part in parts), strict=True)])

    def back(self, gradient: Tensor, into: Mapping[int, Gradient], asked: slice | None = None) -> Tensor | None:
        """Add to the gradients of the parameters.

        Args:
            gradient: Of the loss with respect to the output, (B, n_out).
            into: Where to add, by the ids of the parameters. Others are left out.
            asked: With respect to which inputs the gradient is to be returned, (B, n); None for none.
        """
        if self._is_few:
            with np.errstate(all="ignore"):
                array = _backward_arrays(self._layers, self._kept, gradient.numpy(), into, asked)
            return None if asked is None else torch.from_numpy(array)
        gradient = backward(self._layers, self._kept, gradient, into, asked)
        return None if asked is None else gradient


_ZERO = np.zeros((), np.float32)
_ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.Tanh: "tanh"}


def _is_matrix(x: Tensor) -> bool:
    return x.dim() == 2 and x.dtype is torch.float32


def _plain_layers(modules: Sequence[nn.Module], parts: Sequence[nn.Module]) -> list[Layer]:
    layers: list[Layer] = []
    for module in modules:
        if type(module) is nn.Linear and is_usual(module.weight) and is_usual(module.bias):
            weight, bias = module.weight.detach(), module.bias.detach()
            arrays = weight.numpy(), weight.numpy().T, bias.numpy()[None]
            layers.append(Layer(weight, weight.t(), bias, *arrays, id(module.weight), id(module.bias)))
        elif type(module) in _ACTIVATIONS and layers and layers[-1].activation is None:
            layers[-1] = layers[-1]._replace(activation=_ACTIVATIONS[type(module)])
        elif type(module) is not nn.Sequential or all(module is not part for part in parts):
            return []
    return layers


def is_usual(parameter: Tensor | None) -> bool:
    """Whether a parameter is there, in float32 on the CPU."""
    return parameter is not None and parameter.dtype is torch.float32 and parameter.device.type == "cpu"


def _forward_arrays(layers: Sequence[Layer], x: np.ndarray) -> list[np.ndarray]:
    """The input and what comes out of each layer behind its activation: n + 1 arrays."""
    kept = [x]
    with np.errstate(all="ignore"):  # what is not finite is noticed later, as with torch
        for layer in layers:
            x = x.dot(layer.weight_array_t)  # of small matrices, sooner than matmul, which gives the same
            x += layer.bias_array
            if layer.activation == "relu":
                np.maximum(x, _ZERO, out=x)
            elif layer.activation == "tanh":
                np.tanh(x, out=x)
            kept.append(x)
    return kept


def _forward(layers: Sequence[Layer], x: Tensor) -> list[Tensor]:
    """As `_forward_arrays`, by torch."""
    kept = [x]
    for layer in layers:
        x = activate_(layer.activation, torch.addmm(layer.bias, x, layer.weight_t))
        kept.append(x)
    return kept


def activate_(activation: str | None, x: Tensor) -> Tensor:
    """Apply an activation to what a layer gave, in its place."""
    if activation == "relu":
        return x.relu_()
    return x.tanh_() if activation == "tanh" else x


def _backward_arrays(
    layers: Sequence[Layer],
    kept: Sequence[np.ndarray],
    gradient: np.ndarray,
    into: Mapping[int, Gradient],
    asked: slice | None,
) -> np.ndarray:
    """Add to the gradients of those parameters that are in `into`; returns that of the inputs that are asked for."""
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
            weight.is_zero = False
            weight.array.__iadd__(gradient.T.dot(below))
        if bias is not None and bias.array is not None:
            bias.is_zero = False
            bias.array.__iadd__(gradient.sum(0))
        if k > 0:
            gradient = gradient.dot(layer.weight_array)
        elif asked is not None:
            gradient = gradient.dot(layer.weight_array[:, asked])
    return gradient


_relu_backward, _tanh_backward = torch.ops.aten.threshold_backward, torch.ops.aten.tanh_backward


def through_activation(activation: str | None, gradient: Tensor, output: Tensor, in_place: bool = False) -> Tensor:
    """The gradient with respect to what an activation read, from that with respect to what it gave, and from this.

    In its place, large gradients need no other memory, which has to be fetched.
    """
    if activation is None:
        return gradient
    if activation == "relu":
        if in_place:
            return _relu_backward.grad_input(gradient, output, 0, grad_input=gradient)
        return _relu_backward.default(gradient, output, 0)
    if in_place:
        return _tanh_backward.grad_input(gradient, output, grad_input=gradient)
    return _tanh_backward.default(gradient, output)


def backward(
    layers: Sequence[Layer],
    kept: Sequence[Tensor],
    gradient: Tensor,
    into: Mapping[int, Gradient],
    asked: slice | None,
) -> Tensor:
    """As `_backward_arrays`, by torch."""
    for k in range(len(layers) - 1, -1, -1):
        layer, below, above = layers[k], kept[k], kept[k + 1]
        gradient = through_activation(layer.activation, gradient, above, in_place=k < len(layers) - 1)
        weight, bias = into.get(layer.weight_id), into.get(layer.bias_id)
        if weight is not None:
            add_product(weight.tensor, weight.beta(), gradient, below)
        if bias is not None:
            add_sum(bias.tensor, bias.beta(), gradient)
        if k > 0:
            gradient = times(gradient, layer.weight)
        elif asked is not None:
            gradient = times(gradient, layer.weight[:, asked])
    return gradient


def times(gradient: Tensor, weight: Tensor) -> Tensor:
    """(..., B, n_out) times (..., n_out, n_in), as (..., B, n_in)."""
    n_out, n_in = weight.shape[-2:]
    if n_out == 1:  # as a critic has; takes no matrix product
        return gradient * weight
    if 1 < n_in <= FEW_COLUMNS // 3 and n_out >= 256:  # else, to be laid out in order, the transpose is no sooner
        return _product(weight.transpose(-1, -2), gradient.transpose(-1, -2)).transpose(-1, -2).contiguous()
    return _product(gradient, weight)


def add_product(place: Tensor, beta: int, gradient: Tensor, below: Tensor) -> None:
    """Add the gradient of weights, (..., n_out, n_in).

    Args:
        place: To what it is added.
        beta: 0 where that counts as zeros, else 1.
        gradient: With respect to what the layer gave, (..., B, n_out).
        below: What it read, (..., B, n_in).
    """
    n_rows, n_in = below.shape[-2:]
    if n_in <= min(n_rows // 8, FEW_COLUMNS):
        product = _product(below.transpose(-1, -2), gradient).transpose(-1, -2)
        (place.add_ if beta else place.copy_)(product)
    elif place.dim() == 2:
        place.addmm_(gradient.t(), below, beta=beta)
    else:
        place.baddbmm_(gradient.transpose(1, 2), below, beta=beta)


def add_sum(place: Tensor, beta: int, gradient: Tensor) -> None:
    """Add the gradient of biases, (..., n_out); the arguments are those of `add_product`."""
    if beta:
        place.add_(gradient.sum(-2))
    else:
        torch.sum(gradient, -2, out=place)


def _product(one: Tensor, other: Tensor) -> Tensor:
    return one.mm(other) if one.dim() == 2 else one.bmm(other)

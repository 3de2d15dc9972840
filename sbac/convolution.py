"""Convolutions whose way back is written out, as that of perceptrons: what autograd would call, in a row.

What is no plain convolution with a ReLU behind it, and what somebody hooks into, goes through the modules and autograd.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sbac.look import Look
from sbac.perceptron import ALL, Gradient, Trace, is_usual, through_activation


class Convolution(NamedTuple):
    """A convolution, which a ReLU follows."""

    weight: Tensor  # (n_out, n_in, height, width)
    bias: Tensor  # (n_out,)
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int
    weight_id: int  # of the module's parameter
    bias_id: int


class Convolutions:
    """The way through an `nn.Sequential` of `nn.Conv2d`, each with a bias and an `nn.ReLU` behind it, and `nn.Flatten`.

    Args:
        owner: The network.
        name: Of its part.
    """

    def __init__(self, owner: nn.Module, name: str) -> None:
        self._owner, self._name = owner, name
        self._look = Look()
        self._layers: Sequence[Convolution] = ()

    def trace(self, x: Tensor) -> ConvolutionsTrace | None:
        """What they give for images (B, n_in, height, width), with the way back; None where autograd is to see them."""
        if not self._look.is_still_so():
            part: Any = self._owner._modules[self._name]
            self._look = Look([self._owner, part, *part._modules.values()], [part, *part._modules.values()])
            self._layers = _plain_layers(part)
        is_plain = self._layers and self._look.is_left_alone(with_way_back=True)
        if not is_plain or x.dim() != 4 or x.dtype is not torch.float32:
            return None
        kept = [x.detach()]
        for layer in self._layers:
            how = layer.stride, layer.padding, layer.dilation, False, [0, 0], layer.groups
            kept.append(torch.convolution(kept[-1], layer.weight, layer.bias, *how).relu_())
        return ConvolutionsTrace(self._layers, kept)

    def __getstate__(self) -> dict[str, Any]:
        # Without views, which would become tensors of their own in a copy.
        return {**self.__dict__, "_look": Look(), "_layers": ()}


class ConvolutionsTrace:
    """What convolutions gave, with the way back from it.

    Args:
        layers: In order.
        kept: The input and what came out of each ReLU.

    Attributes:
        output: Laid flat, (B, n_out).
    """

    def __init__(self, layers: Sequence[Convolution], kept: Sequence[Tensor]) -> None:
        self.layers, self.kept = layers, kept
        self.output = kept[-1].flatten(1)

    def back(self, gradient: Tensor, into: Mapping[int, Gradient]) -> None:
        """Add to the gradients of the parameters, from that of a loss with respect to `output`, (B, n_out)."""
        learning = [k for k, layer in enumerate(self.layers) if layer.weight_id in into or layer.bias_id in into]
        gradient = gradient.view(self.kept[-1].shape)
        for k in range(len(self.layers) - 1, min(learning, default=len(self.layers)) - 1, -1):
            layer, below, above = self.layers[k], self.kept[k], self.kept[k + 1]
            if above.is_contiguous(memory_format=torch.channels_last):
                gradient = gradient.contiguous(memory_format=torch.channels_last)
            gradient = through_activation("relu", gradient, above)
            weight, bias = into.get(layer.weight_id), into.get(layer.bias_id)
            found = torch.ops.aten.convolution_backward.default(
                gradient,
                below,
                layer.weight,
                list(layer.bias.shape),
                layer.stride,
                layer.padding,
                layer.dilation,
                False,
                [0, 0],
                layer.groups,
                [k > learning[0], weight is not None, bias is not None],
            )
            for place, own in ((weight, found[1]), (bias, found[2])):
                if place is not None:
                    place.tensor.add_(own)
                    place.is_zero = False
            gradient = found[0]


class Chain:
    """Convolutions and a perceptron behind them, with the way back.

    Args:
        below: What the convolutions gave.
        above: What the perceptron made of it.

    Attributes:
        output: (B, n_out).
    """

    def __init__(self, below: ConvolutionsTrace, above: Trace) -> None:
        self._below, self._above = below, above
        self.output = above.output

    @classmethod
    def joined(cls, parts: Sequence[Chain]) -> Chain:
        """Several that were made by the same layers, one behind the other along B."""
        below, above = parts[0]._below, parts[0]._above
        images = [torch.cat(kept) for kept in zip(*(part._below.kept for part in parts), strict=True)]
        return cls(ConvolutionsTrace(below.layers, images), above.joined([part._above for part in parts]))

    def back(self, gradient: Tensor, into: Mapping[int, Gradient]) -> None:
        """Add to the gradients of the parameters, from that of a loss with respect to `output`, (B, n_out)."""
        of_flat = self._above.back(gradient, into, ALL)
        assert of_flat is not None
        self._below.back(of_flat, into)


def _plain_layers(part: nn.Module) -> list[Convolution]:
    """Those of a part; none where what is written out would not be the same."""
    modules = list(part.children())
    if type(part) is not nn.Sequential or len(modules) < 3 or type(modules[-1]) is not nn.Flatten:
        return []
    flatten: Any = modules.pop()
    if (flatten.start_dim, flatten.end_dim) != (1, -1) or len(modules) % 2:
        return []
    layers: list[Convolution] = []
    for module, activation in zip(modules[::2], modules[1::2], strict=True):
        if type(module) is not nn.Conv2d or type(activation) is not nn.ReLU:
            return []
        is_plain = module.padding_mode == "zeros" and not isinstance(module.padding, str)
        if not (is_plain and is_usual(module.weight) and is_usual(module.bias) and module.bias is not None):
            return []
        padding = [int(size) for size in module.padding]
        how = list(module.stride), padding, list(module.dilation), module.groups
        ids = id(module.weight), id(module.bias)
        layers.append(Convolution(module.weight.detach(), module.bias.detach(), *how, *ids))
    return layers

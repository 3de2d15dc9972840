"""Perceptrons of one form that lie evenly in one memory: one product for the same layer of all of them.

Critics that read the same input take as many calls as there are of them, and small ones consist of calls. As a batch of
matrices they take those of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from sbac.perceptron import Gradient, Layer, activate_, add_product, add_sum, backward, through_activation, times

MANY = 2**24
"""Multiplications in the largest layer of each perceptron up to which the way back pays to be taken together.

Beyond them a core's cache no longer holds what it needs of all at once, which costs more than calls do.
"""


class _Layers(NamedTuple):
    """The same layer of M perceptrons, in their memory."""

    weight: Tensor  # (M, n_out, n_in)
    weight_t: Tensor  # (M, n_in, n_out)
    bias: Tensor  # (M, 1, n_out)
    activation: str | None


class _Gradients(NamedTuple):
    """Those of the same layer of M perceptrons, in their memory."""

    weight: Tensor  # (M, n_out, n_in)
    bias: Tensor  # (M, n_out)
    of_weights: Sequence[Gradient]  # the same as `weight`, one by one
    of_biases: Sequence[Gradient]


class Ensemble:
    """M perceptrons side by side; `Ensemble.of` makes it.

    Args:
        members: The layers of each.
        layers: Of all.

    Attributes:
        n_weights: Of the largest layer of each.
    """

    def __init__(self, members: Sequence[Sequence[Layer]], layers: Sequence[_Layers]) -> None:
        self._members, self._layers = members, layers
        self.n_weights = max(layer.weight[0].numel() for layer in layers)
        self._into: Mapping[int, Gradient] | None = None
        self._gradients: list[_Gradients] = []

    @classmethod
    def of(cls, members: Sequence[Sequence[Layer]]) -> Ensemble | None:
        """Perceptrons of these layers; None where there is only one, or they have no common form."""
        layers = _stack_layers(members)
        return cls(members, layers) if layers else None

    def trace(self, x: Tensor) -> EnsembleTrace:
        """What they give, with the way back.

        Args:
            x: (B, n_in) for all, or (M, B, n_in), of float32.
        """
        x = x.detach()
        if x.dim() == 2:
            x = x.expand(len(self._members), *x.shape)
        kept = [x]
        for layer in self._layers:
            x = activate_(layer.activation, torch.baddbmm(layer.bias, x, layer.weight_t))
            kept.append(x)
        return EnsembleTrace(self, self._members, self._layers, kept)

    def gradients(self, into: Mapping[int, Gradient]) -> list[_Gradients]:
        """Those of each layer; none where some are left out, or lie elsewhere."""
        if into is not self._into:
            self._into, self._gradients = into, _stack_gradients(self._members, into)
        return self._gradients


class EnsembleTrace:
    """What M perceptrons gave, with the way back from it.

    Args:
        ensemble: Knows where gradients lie.
        members: The layers of each.
        layers: Of all.
        kept: The input and what came out of each layer behind its activation, (M, B, n).

    Attributes:
        output: (M, B, n_out).
    """

    def __init__(
        self, ensemble: Ensemble, members: Sequence[Sequence[Layer]], layers: Sequence[_Layers], kept: Sequence[Tensor]
    ) -> None:
        self._ensemble, self._members, self._layers, self._kept = ensemble, members, layers, kept
        self.output = kept[-1]

    def back(self, gradient: Tensor, into: Mapping[int, Gradient], asked: slice | None = None) -> Tensor | None:
        """As `Trace.back`, of (M, B, n_out) and to (M, B, n_in)."""
        gradients = self._ensemble.gradients(into)
        if not gradients or self.output.shape[1] * self._ensemble.n_weights > MANY:
            inputs = []
            for k, layers in enumerate(self._members):
                inputs.append(backward(layers, [kept[k] for kept in self._kept], gradient[k], into, asked))
            return None if asked is None else torch.stack(inputs)
        for k in range(len(self._layers) - 1, -1, -1):
            layer = self._layers[k]
            is_own = k < len(self._layers) - 1
            gradient = through_activation(layer.activation, gradient, self._kept[k + 1], in_place=is_own)
            of_weight, of_bias, of_weights, of_biases = gradients[k]
            add_product(of_weight, max([one.beta() for one in of_weights]), gradient, self._kept[k])
            add_sum(of_bias, max([one.beta() for one in of_biases]), gradient)
            if k > 0:
                gradient = times(gradient, layer.weight)
            elif asked is not None:
                gradient = times(gradient, layer.weight[..., asked])
        return None if asked is None else gradient


def _stack_layers(members: Sequence[Sequence[Layer]]) -> list[_Layers]:
    """The layers of all; none where they are of several forms or do not lie evenly."""
    if len(members) < 2 or not all(members) or len({*map(len, members)}) != 1:
        return []
    stacked: list[_Layers] = []
    for layers in zip(*members, strict=True):
        weight, bias = _stack([layer.weight for layer in layers]), _stack([layer.bias for layer in layers])
        if weight is None or bias is None or len({layer.activation for layer in layers}) != 1:
            return []
        stacked.append(_Layers(weight, weight.transpose(1, 2), bias.unsqueeze(1), layers[0].activation))
    return stacked


def _stack_gradients(members: Sequence[Sequence[Layer]], into: Mapping[int, Gradient]) -> list[_Gradients]:
    stacked: list[_Gradients] = []
    for layers in zip(*members, strict=True):
        of_weights = [into[layer.weight_id] for layer in layers if layer.weight_id in into]
        of_biases = [into[layer.bias_id] for layer in layers if layer.bias_id in into]
        if not len(of_weights) == len(of_biases) == len(layers):
            return []
        weight, bias = _stack([one.tensor for one in of_weights]), _stack([one.tensor for one in of_biases])
        if weight is None or bias is None:
            return []
        stacked.append(_Gradients(weight, bias, of_weights, of_biases))
    return stacked


def _stack(tensors: Sequence[Tensor]) -> Tensor | None:
    """A view of tensors of one form that lie at equal distances in one memory, (M, *shape); None where they do not."""
    first = tensors[0]
    forms = {(tensor.shape, tensor.stride(), tensor.untyped_storage().data_ptr()) for tensor in tensors}
    distances = {after.storage_offset() - before.storage_offset() for before, after in pairwise(tensors)}
    if len(forms) != 1 or len(distances) != 1 or min(distances) < first.numel():
        return None
    return first.as_strided((len(tensors), *first.shape), (*distances, *first.stride()))

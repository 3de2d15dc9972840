"""Weights of Stable-Baselines3's policies under the names that they have here, and what they tell of the networks.

The layers' sizes are read off the weights that are there, never from what a file says beside them, and each is compared
with what the spaces ask for. So no network is made that is larger than the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from sbac.archive import tensor_to_array
from sbac.distributions import DistributionFamily
from sbac.networks import after_convolutions, fits_nature_cnn
from sbac.preprocessing import flat_dim, is_image_space

FLATTEN, CNN, COMBINED = "FlattenExtractor", "NatureCNN", "CombinedExtractor"
_CONVOLUTIONS = ((0, 32, 8), (2, 64, 4), (4, 64, 3))  # place, channels and kernel of each of NatureCNN's


@dataclass
class Parameter:
    """One parameter here and there.

    Attributes:
        own: Its name in sbac's policy.
        theirs: Its name in ``policy.pth``.
        columns: Which of their inputs each of ours is, where the order differs; else None.
    """

    own: str
    theirs: str
    columns: np.ndarray | None


class PolicyWeights:
    """The weights of one policy.

    Args:
        tensors: By their names in ``policy.pth``, in its order.
        observation_space: Of the model.
        action_space: Of the model.
        extractor: The body's class: `FLATTEN`, `CNN` or `COMBINED`.

    Attributes:
        networks: The parameters of each network that has an optimizer, or is a target, in the order in which sbac has
            them.
        net_arch: Hidden layers, by network.
        extractor_kwargs: What the body was made with.
        n_critics: How many Q-networks there are; 0 in a policy with V(s).
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        extractor: str,
    ) -> None:
        self._tensors = tensors
        self._space = observation_space
        self._action_space = action_space
        self._extractor = extractor
        self._network = ""
        self._copies: set[str] = set()
        self._shares_body = False
        self.networks: dict[str, list[Parameter]] = {}
        self.net_arch: dict[str, list[int]] = {}
        self.extractor_kwargs: dict[str, int] = {}
        self.n_critics = 0

    def read_stochastic(self, shares_body: bool) -> None:
        """Find pi and V of an ``ActorCriticPolicy``.

        Raises:
            ValueError: Weights are missing, are too many, or do not fit the spaces.
        """
        self._network, self._shares_body = "policy", shares_body
        family = DistributionFamily(self._action_space)
        if family.n_dims:
            self._take("log_std", "log_std", (family.n_dims,))
        n_features, columns = self._body("features_extractor.", "features_extractor.")
        twins = ("pi_features_extractor.", "vf_features_extractor.") if shares_body else ("pi_features_extractor.",)
        self._copies = {name for name in self._tensors if name.startswith(twins)}
        if not shares_body:
            self._body("vf_features_extractor.", "vf_features_extractor.")
        pi = self._perceptron("policy_net", "mlp_extractor.policy_net", n_features, columns)
        vf = self._perceptron("value_net", "mlp_extractor.value_net", n_features, columns)
        self.net_arch = {"pi": pi, "vf": vf}
        self._linear(f"value_net.{2 * len(vf)}", "value_net", vf[-1] if vf else n_features, 1, None if vf else columns)
        self._linear("action_net", "action_net", pi[-1] if pi else n_features, family.width, None if pi else columns)
        self._refuse_others()

    def read_deterministic(self) -> None:
        """Find mu, Q and their targets of a ``TD3Policy``.

        Raises:
            ValueError: Weights are missing, are too many, or do not fit the spaces.
        """
        action_dim = math.prod(self._action_space.shape or ())
        for suffix in ("", "_target"):
            self._network = f"actor{suffix}"
            n_features, columns = self._body(f"{self._network}.features_extractor.")
            widths = self._perceptron(f"{self._network}.mu", f"{self._network}.mu", n_features, columns)
            self._require_output(widths, action_dim)
            self.net_arch.setdefault("pi", widths[:-1])

            self._network = f"critic{suffix}"
            n_features, columns = self._body(f"{self._network}.features_extractor.")
            if columns is not None:
                columns = np.append(columns, n_features + np.arange(action_dim))
            n_critics = 0
            while f"{self._network}.qf{n_critics}.0.weight" in self._tensors:
                own, theirs = f"{self._network}.q_networks.{n_critics}.q_net", f"{self._network}.qf{n_critics}"
                widths = self._perceptron(own, theirs, n_features + action_dim, columns)
                self._require_output(widths, 1)
                if self.net_arch.setdefault("qf", widths[:-1]) != widths[:-1]:
                    raise ValueError(f"policy.pth: {theirs} has other layers than the first critic")
                n_critics += 1
            if not n_critics or self.n_critics not in (0, n_critics):
                raise ValueError(f"policy.pth holds {n_critics} critics in {self._network}")
            self.n_critics = n_critics
        self._refuse_others()

    def arrays(self) -> dict[str, np.ndarray]:
        """The weights as a model file of sbac has them."""
        found = {
            parameter.own: tensor_to_array(_arranged(self._tensors[parameter.theirs], parameter.columns))
            for parameters in self.networks.values()
            for parameter in parameters
        }
        if self._shares_body:  # which then stands under both of its names
            body = "features_extractor."
            found |= {f"vf_{name}": array for name, array in found.items() if name.startswith(body)}
        return {f"policy/{name}": array for name, array in found.items()}

    def optimizer_arrays(self, network: str, saved: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
        """What an optimizer remembers of a network, as a model file of sbac has it: laid flat.

        Args:
            network: "policy", "actor" or "critic".
            saved: The optimizer's ``state_dict``, from a file.

        Returns:
            The arrays; None where the optimizer remembers something of some parameters only.
        """
        ours = self.networks[network]
        mine = {parameter.theirs for parameter in ours}
        theirs = [name for name in self._tensors if name in mine]
        numbers = saved["param_groups"][0]["params"]
        if len(saved["param_groups"]) != 1 or len(numbers) != len(theirs):
            return None
        entries = {name: saved["state"].get(number, {}) for name, number in zip(theirs, numbers, strict=True)}
        keys = entries[theirs[0]].keys()
        if any(entry.keys() != keys for entry in entries.values()):
            return None
        arrays = {}
        for key in keys:
            pieces = [entries[parameter.theirs][key] for parameter in ours]
            pieces = [torch.tensor(float(piece)) if isinstance(piece, (int, float)) else piece for piece in pieces]
            if not all(isinstance(piece, Tensor) for piece in pieces):
                return None
            if all(piece.shape == self._tensors[p.theirs].shape for piece, p in zip(pieces, ours, strict=True)):
                flat = [_arranged(piece, p.columns).reshape(-1) for piece, p in zip(pieces, ours, strict=True)]
                kept = torch.cat(flat)
            elif all(piece.shape == () and piece == pieces[0] for piece in pieces):
                kept = pieces[0]
            else:
                return None
            arrays[f"optimizer/{network}/0/{key}"] = tensor_to_array(kept)
        return arrays

    def _take(self, own: str, theirs: str, shape: tuple[int, ...], columns: np.ndarray | None = None) -> None:
        tensor = self._tensors.get(theirs)
        if tensor is None:
            raise ValueError(f"policy.pth lacks {theirs}, which a policy for {self._space} has")
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
            raise ValueError(
                f"policy.pth: {theirs} has shape {tuple(tensor.shape)} and {tensor.dtype}, where {shape} and "
                f"torch.float32 belong in a policy from {self._space} to {self._action_space}"
            )
        self.networks.setdefault(self._network, []).append(Parameter(own, theirs, columns))

    def _linear(self, own: str, theirs: str, n_in: int, n_out: int, columns: np.ndarray | None = None) -> None:
        self._take(f"{own}.weight", f"{theirs}.weight", (n_out, n_in), columns)
        self._take(f"{own}.bias", f"{theirs}.bias", (n_out,))

    def _units(self, name: str) -> int:
        """How many units a layer has."""
        tensor = self._tensors.get(f"{name}.weight")
        if tensor is None or tensor.ndim != 2:
            raise ValueError(f"policy.pth lacks the weights of the layer {name}")
        return len(tensor)

    def _perceptron(self, own: str, theirs: str, n_in: int, columns: np.ndarray | None) -> list[int]:
        """Take all layers of a perceptron; returns the units of each."""
        widths: list[int] = []
        while f"{theirs}.{2 * len(widths)}.weight" in self._tensors:
            place = 2 * len(widths)
            widths.append(self._units(f"{theirs}.{place}"))
            self._linear(f"{own}.{place}", f"{theirs}.{place}", n_in, widths[-1], columns)
            n_in, columns = widths[-1], None
        return widths

    def _require_output(self, widths: list[int], n_out: int) -> None:
        if not widths or widths[-1] != n_out:
            raise ValueError(
                f"policy.pth: the layers of {self._network} have {widths} units, and {n_out} must come out"
            )

    def _body(self, theirs: str, own: str | None = None) -> tuple[int, np.ndarray | None]:
        """Take the weights of a body.

        Returns:
            How many features come out of it; and which of their features each of ours is, where the order differs.
        """
        own = theirs if own is None else own
        if self._extractor == FLATTEN:
            return flat_dim(self._space), None
        if self._extractor == CNN:
            return self._cnn(self._space, theirs, own, "features_dim"), None
        assert isinstance(self._space, spaces.Dict)
        # Here the parts of a Dict are in the order of their names, there in that of the space.
        sizes = {}
        for index, key in enumerate(sorted(self._space.spaces)):
            leaf = self._space[key]
            if is_image_space(leaf) and fits_nature_cnn(leaf):
                sizes[key] = self._cnn(leaf, f"{theirs}extractors.{key}.", f"{own}bodies.{index}.", "cnn_output_dim")
            else:
                sizes[key] = flat_dim(leaf)
        starts, start = {}, 0
        for key in self._space.spaces:
            starts[key], start = start, start + sizes[key]
        if list(starts) == sorted(starts):
            return start, None
        return start, np.concatenate([starts[key] + np.arange(sizes[key]) for key in sorted(starts)])

    def _cnn(self, space: spaces.Space[Any], theirs: str, own: str, argument: str) -> int:
        if not fits_nature_cnn(space):
            raise ValueError(f"NatureCNN cannot read {space}")
        channels, height, width = space.shape or ()
        for place, n_out, kernel in _CONVOLUTIONS:
            self._take(f"{own}cnn.{place}.weight", f"{theirs}cnn.{place}.weight", (n_out, channels, kernel, kernel))
            self._take(f"{own}cnn.{place}.bias", f"{theirs}cnn.{place}.bias", (n_out,))
            channels = n_out
        units = self._units(f"{theirs}linear.0")
        n_flat = channels * after_convolutions(height) * after_convolutions(width)
        self._linear(f"{own}linear.0", f"{theirs}linear.0", n_flat, units)
        if self.extractor_kwargs.setdefault(argument, units) != units:
            raise ValueError(f"policy.pth: {theirs}linear.0 has {units} units, other bodies have not")
        return units

    def _refuse_others(self) -> None:
        taken = {parameter.theirs for parameters in self.networks.values() for parameter in parameters}
        others = [name for name in self._tensors if name not in taken and name not in self._copies]
        if others:
            raise ValueError(
                f"policy.pth holds weights of layers that sbac's policy has not: {', '.join(others[:5])}"
                f"{', ...' if len(others) > 5 else ''}; only Stable-Baselines3's own layers can be converted"
            )


def _arranged(tensor: Tensor, columns: np.ndarray | None) -> Tensor:
    return tensor if columns is None else tensor[:, torch.as_tensor(columns)].contiguous()

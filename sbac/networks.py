"""Bodies, heads, initialisations, and parameters that lie end to end in one tensor.

A small network has a dozen parameter tensors, and most of the time of clipping, stepping and copying them goes into
handling each. Laid flat, each of these is one operation on one tensor.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor, nn

from sbac.guards import NotFiniteError
from sbac.optimization import initial_state
from sbac.preprocessing import flat_dim, is_image_space
from sbac.trees import Tree, leaves, space_tree


class BaseFeaturesExtractor(nn.Module):
    """A body that turns a batch of observations into features.

    Args:
        observation_space: Of one environment.
        features_dim: How many features `forward` returns for each observation.
    """

    def __init__(self, observation_space: spaces.Space[Any], features_dim: int) -> None:
        super().__init__()
        self.observation_space = observation_space
        self.features_dim = features_dim

    def extra_repr(self) -> str:
        return f"features_dim={self.features_dim}"


class FlattenExtractor(BaseFeaturesExtractor):
    """Lays each observation flat, as `preprocess` gives it.

    Args:
        observation_space: Of the observations.
    """

    def __init__(self, observation_space: spaces.Space[Any]) -> None:
        super().__init__(observation_space, flat_dim(observation_space))

    def forward(self, obs: Tensor) -> Tensor:
        """From (B, *obs_shape), one-hot where Discrete or MultiDiscrete, to (B, features_dim)."""
        return obs.reshape(len(obs), self.features_dim)


class NatureCNN(BaseFeaturesExtractor):
    """Three convolutions and one linear layer (Mnih et al. 2015, "Human-level control", Nature 518).

    Args:
        observation_space: A Box of three dimensions, channels first, of at least 36 x 36 pixels.
        features_dim: How many features `forward` returns for each image.

    Raises:
        ValueError: The space is no such Box.
    """

    def __init__(self, observation_space: spaces.Space[Any], features_dim: int = 512) -> None:
        super().__init__(observation_space, features_dim)
        if not fits_nature_cnn(observation_space):
            raise ValueError(
                f"NatureCNN reads images of at least {SMALLEST_IMAGE} x {SMALLEST_IMAGE} pixels, channels first, not "
                f"{observation_space}; MlpPolicy reads any Box, and gymnasium.wrappers.ResizeObservation makes images "
                "larger"
            )
        n_channels, height, width = observation_space.shape or ()
        self.cnn = nn.Sequential(
            nn.Conv2d(n_channels, 32, kernel_size=8, stride=4),
            nn.ReLU(),
            nn.Conv2d(32, 64, kernel_size=4, stride=2),
            nn.ReLU(),
            nn.Conv2d(64, 64, kernel_size=3, stride=1),
            nn.ReLU(),
            nn.Flatten(),
        )
        n_flat = 64 * after_convolutions(height) * after_convolutions(width)
        self.linear = nn.Sequential(nn.Linear(n_flat, features_dim), nn.ReLU())

    def forward(self, obs: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, features_dim)."""
        return self.linear(self.cnn(obs))


SMALLEST_IMAGE = 36
"""Pixels of a side, below which nothing is left after the convolutions of `NatureCNN`."""


def after_convolutions(side: int) -> int:
    """What the convolutions of `NatureCNN` leave of a side of an image, in pixels."""
    for kernel, stride in ((8, 4), (4, 2), (3, 1)):
        side = (side - kernel) // stride + 1
    return side


def fits_nature_cnn(space: spaces.Space[Any]) -> bool:
    """Whether `NatureCNN` can read a space: a Box of three dimensions, the last two of at least 36."""
    return isinstance(space, spaces.Box) and len(space.shape) == 3 and min(space.shape[1:]) >= SMALLEST_IMAGE


class CombinedExtractor(BaseFeaturesExtractor):
    """A tree of observations (Dict or Tuple), one body for each leaf, joined.

    Images go through a `NatureCNN` each, if they are large enough for it, and everything else is laid flat.

    Args:
        observation_space: Of one environment.
        cnn_output_dim: Features of each image.
    """

    def __init__(self, observation_space: spaces.Space[Any], cnn_output_dim: int = 256) -> None:
        bodies: list[BaseFeaturesExtractor] = []
        for _, leaf in leaves(space_tree(observation_space)):
            is_picture = is_image_space(leaf) and fits_nature_cnn(leaf)
            bodies.append(NatureCNN(leaf, cnn_output_dim) if is_picture else FlattenExtractor(leaf))
        super().__init__(observation_space, sum(body.features_dim for body in bodies))
        self.bodies = nn.ModuleList(bodies)

    def forward(self, obs: Tree) -> Tensor:
        """From a tree of (B, *leaf_shape) to (B, features_dim)."""
        return torch.cat([body(leaf) for body, (_, leaf) in zip(self.bodies, leaves(obs), strict=True)], dim=1)


def default_extractor(observation_space: spaces.Space[Any]) -> type[BaseFeaturesExtractor]:
    """The body that reads a space where none was asked for."""
    is_tree = isinstance(observation_space, (spaces.Dict, spaces.Tuple))
    return CombinedExtractor if is_tree else FlattenExtractor


def create_mlp(
    input_dim: int,
    output_dim: int,
    net_arch: Sequence[int],
    activation_fn: type[nn.Module] = nn.ReLU,
    layer_norm: bool = False,
    dropout: float = 0.0,
) -> list[nn.Module]:
    """The layers of a perceptron, for `nn.Sequential`.

    Args:
        input_dim: Number of inputs.
        output_dim: Number of outputs; 0 leaves the last layer out, so that a head can be put on.
        net_arch: Units of each hidden layer.
        activation_fn: After each hidden layer.
        layer_norm: Whether to normalise before each activation (Ba et al. 2016, arXiv:1607.06450).
        dropout: Share of each hidden layer's units that training leaves out, in [0, 1), before the normalisation
            (Hiraoka et al. 2022, arXiv:2110.02034).

    Returns:
        Linear layers and activations in turn.
    """
    layers: list[nn.Module] = []
    for units in net_arch:
        layers.append(nn.Linear(input_dim, units))
        if dropout > 0:
            layers.append(nn.Dropout(dropout))
        if layer_norm:
            layers.append(nn.LayerNorm(units))
        layers.append(activation_fn())
        input_dim = units
    if output_dim > 0:
        layers.append(nn.Linear(input_dim, output_dim))
    return layers


@torch.no_grad()
def init_orthogonal(module: nn.Module, gain: float) -> None:
    """Orthogonal weights and zero biases (Saxe et al. 2014) for each linear and convolutional layer of a module."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.orthogonal_(layer.weight, gain=gain)
            if layer.bias is not None:
                layer.bias.zero_()


@torch.no_grad()
def init_fan_in(module: nn.Module) -> None:
    """Weights and biases uniform in +-1/sqrt(f), f the number of a layer's inputs (Lillicrap et al. 2015, section 7).

    The fan-in of a torch layer is the second dimension of its weight, not the first.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            init_uniform(layer, 1 / math.sqrt(layer.in_features))


@torch.no_grad()
def init_uniform(layer: nn.Linear, bound: float) -> None:
    """Weights and biases uniform in +-bound."""
    layer.weight.uniform_(-bound, bound)
    layer.bias.uniform_(-bound, bound)


def describe(network: nn.Module) -> str:
    """The layers of a network, one a line: where each stands, what it is, and how many parameters it has."""
    rows = []
    for path, layer in network.named_modules():
        if next(layer.children(), None) is None and path:
            size = sum(parameter.numel() for parameter in layer.parameters())
            rows.append((path, str(layer), f"{size:,}"))
    loose = [(name, f"Parameter{tuple(p.shape)}", f"{p.numel():,}") for name, p in network.named_parameters("", False)]
    rows = [*rows, *loose, ("total", "", f"{sum(parameter.numel() for parameter in network.parameters()):,}")]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(f"{path:<{widths[0]}}  {layer:<{widths[1]}}  {size:>{widths[2]}}" for path, layer, size in rows)


# Layers that do the same in training and in evaluation. Any other, and any of a user's own, counts as one that may not.
_MODELESS = (
    nn.Linear,
    nn.Conv2d,
    nn.LSTMCell,
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

    Others may replace a parameter's storage or gradient (`zero_grad`, `vector_to_parameters`, `double().float()`),
    freeze it or thaw it: `gradient`, `step` and `follow` notice, and lay the values into the same flat tensor again.

    Attributes:
        flat: All trainable parameters, (n_parameters,), with `flat.grad` likewise; set by `flatten`.
        optimizer: Steps along `flat.grad`; set by `set_optimizer`. Target networks have none.
    """

    flat: nn.Parameter
    optimizer: torch.optim.Optimizer

    def flatten(self) -> None:
        """Lay the parameters out in one tensor. To be called once, after construction and the move to a device.

        Raises:
            ValueError: There is none that requires a gradient, or they are of several dtypes or devices.
        """
        self._leaves = [parameter for parameter in self.parameters() if parameter.requires_grad]
        self._left_out = [parameter for parameter in self.parameters() if not parameter.requires_grad]
        kinds = {(leaf.dtype, leaf.device) for leaf in self._leaves}
        if len(kinds) != 1:
            raise ValueError(
                f"{type(self).__name__} needs trainable parameters of one dtype on one device, "
                f"got {sorted(map(str, kinds))}"
            )
        # Not registered as a parameter of the module: it would appear twice in its state.
        object.__setattr__(self, "flat", nn.Parameter(torch.cat([leaf.detach().reshape(-1) for leaf in self._leaves])))
        self._lay()
        self._has_modes = any(
            type(module) not in _MODELESS and not type(module).__module__.startswith("sbac.")
            for module in self.modules()
        )

    def _lay(self) -> None:
        """Make the leaves views of `flat`, which takes over their values."""
        flat = self.flat.detach()
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        for leaf in self._leaves:
            if (leaf.dtype, leaf.device) != (flat.dtype, flat.device):
                raise ValueError(
                    f"{type(self).__name__} was made with parameters of {flat.dtype} on {flat.device}, but "
                    f"{names.get(id(leaf))} is now of {leaf.dtype} on {leaf.device}: move it back before it learns on"
                )
        for parameter in self._left_out:
            if parameter.requires_grad:
                raise ValueError(
                    f"{type(self).__name__}: {names.get(id(parameter))} was frozen when the network was made, and "
                    "cannot learn now: make it with requires_grad=True, and freeze it afterwards"
                )

        flat.copy_(torch.cat([leaf.detach().reshape(-1) for leaf in self._leaves]))
        self._bind()

    def _bind(self) -> None:
        """Make the leaves views of `flat`, whose values they take over."""
        flat = self.flat.detach()
        self._before = flat.clone()
        self._gradient = self.flat.grad = torch.zeros_like(flat)
        self._layout: list[tuple[nn.Parameter, Tensor, int, bool]] = []
        self._frozen: list[slice] = []
        start = 0
        for leaf in self._leaves:
            span = slice(start, start + leaf.numel())
            leaf.data = flat[span].view_as(leaf)
            view = leaf.grad = self._gradient[span].view_as(leaf)
            self._layout.append((leaf, view, leaf.data_ptr(), leaf.requires_grad))
            if not leaf.requires_grad:
                self._frozen.append(span)
            start = span.stop
        self._learning = [leaf for leaf in self._leaves if leaf.requires_grad]
        self._buffer_list = list(self.buffers())

    def _lay_if_moved(self) -> None:
        """As `_lay`, where somebody replaced what it made, or froze or thawed a parameter."""
        moved = self.flat.grad is not self._gradient
        for leaf, view, address, learns in self._layout:
            if leaf.grad is not view or leaf.data_ptr() != address or leaf.requires_grad is not learns:
                moved = True
        if moved or (self._left_out and any(parameter.requires_grad for parameter in self._left_out)):
            self._lay()

    def __getstate__(self) -> dict[str, Any]:
        # Views become tensors of their own in a copy or a pickle: leave out what `_lay` makes anew.
        made = ("_before", "_gradient", "_layout", "_frozen", "_learning", "_buffer_list")
        return {name: value for name, value in self.__dict__.items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "flat" in state:
            self._lay()

    def set_optimizer(
        self,
        optimizer_class: type[torch.optim.Optimizer],
        learning_rate: float,
        optimizer_kwargs: Mapping[str, Any] | None = None,
        **defaults: Any,
    ) -> None:
        """Give the module its optimizer, fused where torch has such a kernel.

        Args:
            optimizer_class: Such as `torch.optim.Adam`.
            learning_rate: Step size.
            optimizer_kwargs: Its further arguments.
            **defaults: Arguments that `optimizer_kwargs` may override.

        Raises:
            ValueError: No class of an optimizer, or arguments that it does not have or does not take.
        """
        if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)):
            raise ValueError(
                "optimizer_class (an argument, or in policy_kwargs) must be a subclass of torch.optim.Optimizer, such "
                f"as torch.optim.Adam, not {optimizer_class!r}"
            )
        if not (optimizer_kwargs is None or isinstance(optimizer_kwargs, Mapping)):
            raise ValueError(
                f"policy_kwargs: optimizer_kwargs must be a dict of the optimizer's arguments, not {optimizer_kwargs!r}"
            )
        kwargs = {**defaults, **(optimizer_kwargs or {})}
        if "lr" in kwargs:
            raise ValueError("policy_kwargs: optimizer_kwargs must not hold lr, which learning_rate sets")
        if optimizer_class in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD):
            kwargs.setdefault("fused", True)
        make: Callable[..., torch.optim.Optimizer] = optimizer_class
        try:
            self.optimizer = make([self.flat], lr=learning_rate, **kwargs)
        except (TypeError, ValueError) as error:
            raise ValueError(f"policy_kwargs: optimizer_kwargs {kwargs}: {error}") from error

    def set_learning_rate(self, learning_rate: float) -> None:
        """The step size from now on."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    def set_training_mode(self, mode: bool) -> None:
        """As `nn.Module.train`, but only for networks with layers to which the mode matters."""
        if self._has_modes and self.training is not mode:
            self.train(mode)

    def descend(self, loss: Tensor, max_grad_norm: float | None = None) -> Tensor:
        """One optimizer step down the gradient of a loss: `gradient` and `step`.

        Args:
            loss: A scalar.
            max_grad_norm: The gradient is scaled down to this Euclidean norm where it is longer; None leaves it.

        Returns:
            The norm of the gradient before clipping, a scalar.

        Raises:
            NotFiniteError: The loss, its gradient or the parameters after the step are NaN or infinite. The parameters
                are as they were.
        """
        norm = self.gradient(loss, max_grad_norm)
        self.step()
        return norm

    def gradient(self, loss: Tensor, max_grad_norm: float | None = None) -> Tensor:
        """Compute the gradient of a loss with respect to this module's parameters only, for `step`.

        Args:
            loss: A scalar.
            max_grad_norm: The gradient is scaled down to this Euclidean norm where it is longer; None leaves it.

        Returns:
            The norm of the gradient before clipping, a scalar.

        Raises:
            NotFiniteError: The loss or its gradient is NaN or infinite.
        """
        self._lay_if_moved()
        gradient = self._gradient
        gradient.zero_()
        if self._learning:
            loss.backward(inputs=self._learning)
        norm = torch.linalg.vector_norm(gradient)
        if not math.isfinite(norm + loss.detach()):
            raise NotFiniteError(
                f"{type(self).__name__}: the loss is {loss.item()} and the norm of its gradient {norm.item()}; the "
                "weights are those of before this update: try a smaller learning rate, max_grad_norm, or rewards of a "
                "smaller scale"
            )
        if max_grad_norm is not None:
            gradient.mul_((max_grad_norm / (norm + 1e-6)).clamp_(max=1.0))
        return norm

    def step(self) -> None:
        """One optimizer step along the gradient that `gradient` computed. Frozen parameters stay.

        Raises:
            NotFiniteError: A parameter would be NaN or infinite. The parameters are as they were.
        """
        flat = self.flat.detach()
        self._before.copy_(flat)
        if self._learning:
            self.optimizer.step()
        for span in self._frozen:
            # Momentum and weight decay move what has no gradient.
            flat[span] = self._before[span]
        # A sum is finite only if every element is; where it overflows, the elements are looked at after all.
        if not math.isfinite(flat.sum()) and not flat.isfinite().all():
            self.undo_step()
            raise NotFiniteError(
                f"{type(self).__name__}: the optimizer's step leads to weights that are NaN or infinite; the weights "
                "are those of before this update: try a smaller learning rate"
            )

    def undo_step(self) -> None:
        """Give the parameters the values that they had before the last `step`. The optimizer's moments stay."""
        self.flat.detach().copy_(self._before)

    @contextlib.contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """If what follows this network's last step within the same update fails, the step is taken back."""
        try:
            yield
        except NotFiniteError:
            self.undo_step()
            raise

    @torch.no_grad()
    def follow(self, source: Trainable, tau: float) -> None:
        """Soft update of a target network: theta' <- tau theta + (1 - tau) theta'. `tau=1` copies.

        Buffers that are no parameters (running statistics of normalisation layers) are copied.
        """
        self._lay_if_moved()
        source._lay_if_moved()
        self.flat.data.lerp_(source.flat.data, tau)
        for own, other in zip(self._buffer_list, source._buffer_list, strict=True):
            own.copy_(other)

    def state_tensors(self) -> dict[str, Tensor]:
        """All that a network in training consists of: ``flat``, what is frozen, buffers, the optimizer's statistics.

        Raises:
            ValueError: The optimizer's statistics cannot be shared; see `initial_state`.
        """
        self._lay_if_moved()
        if self.flat not in self.optimizer.state:
            self.optimizer.state[self.flat] = initial_state(self.optimizer)
        statistics = self.optimizer.state[self.flat]
        return {
            "flat": self.flat.data,
            **{f"frozen/{index}": parameter.data for index, parameter in enumerate(self._left_out)},
            **{f"buffer/{index}": buffer for index, buffer in enumerate(self._buffer_list)},
            **{f"optimizer/{name}": value for name, value in statistics.items() if isinstance(value, Tensor)},
        }

    def live_in(self, tensors: Mapping[str, Tensor]) -> None:
        """Be made of the given tensors from now on, with their values.

        Args:
            tensors: Of the names, shapes and dtypes of `state_tensors`; in shared memory, say.
        """
        self.flat.data = tensors["flat"]
        self._bind()
        for index, parameter in enumerate(self._left_out):
            parameter.data = tensors[f"frozen/{index}"]
        for index, buffer in enumerate(self._buffer_list):
            buffer.data = tensors[f"buffer/{index}"]
        statistics = self.optimizer.state[self.flat] = initial_state(self.optimizer)
        statistics.update({name: tensors[f"optimizer/{name}"] for name in statistics if f"optimizer/{name}" in tensors})

    @torch.no_grad()
    def step_along(self, other: Trainable) -> None:
        """`step` along the gradient that a network of the same form computed, and take in its buffers.

        The step is made on a copy, so that those who share the parameters never see numbers that are not finite, and
        what they wrote in the meantime is kept.

        Raises:
            NotFiniteError: As `step`.
        """
        shared = self.flat.data
        before = shared.clone()
        self.flat.data = before.clone()
        self._gradient.copy_(other._gradient)
        try:
            self.step()
            after = self.flat.data
        finally:
            self.flat.data = shared
        if torch.equal(shared, before):
            shared.copy_(after)  # exactly the numbers of the optimizer
        else:
            shared.add_(after - before)
        self.take_in_buffers(other)

    def take_in_buffers(self, other: Trainable) -> None:
        """Copy the buffers of a network of the same form that has seen other data."""
        for own, theirs in zip(self._buffer_list, other._buffer_list, strict=True):
            own.copy_(theirs)

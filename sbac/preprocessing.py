"""From observations as environments send them, and buffers keep them, to those that networks read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from sbac.trees import Tree, leaves, space_tree, tree_map

if TYPE_CHECKING:
    from sbac.normalization import Normalizer


def preprocess(obs: Tree, space: spaces.Space[Any], normalize_images: bool = True) -> Tree:
    """Observations as floating-point numbers throughout. Buffers keep them as they are.

    Args:
        obs: A tensor (B, *obs_shape), or a tree of them where the space is one.
        space: Of one observation.
        normalize_images: Whether to divide the pixels of images, which are uint8 Boxes of three dimensions from 0 to
            255, by 255.

    Returns:
        As float32: a Box or MultiBinary in its shape, a Discrete as one-hot (B, n), a MultiDiscrete as the one-hot
        vectors of its parts in a row, a tree leaf by leaf.
    """
    return tree_map(lambda read, leaf: read(leaf), _readers(space, normalize_images), obs)


def _readers(space: spaces.Space[Any], normalize_images: bool) -> Tree:
    """What `preprocess` does with each leaf of a space, so that it need not look at the space each time."""
    return tree_map(lambda leaf: _reader(leaf, normalize_images), space_tree(space))


def _reader(space: spaces.Space[Any], normalize_images: bool) -> Callable[[Tensor], Tensor]:
    if isinstance(space, spaces.Discrete):
        return partial(_one_hot, start=int(space.start), n=int(space.n))
    if isinstance(space, spaces.MultiDiscrete):
        n_values = space.nvec.reshape(-1)
        first = torch.as_tensor(np.cumsum(n_values) - n_values - space.start.reshape(-1))
        return partial(_one_hot_row, first=first, width=int(n_values.sum()))
    return _unit_range if normalize_images and is_image_space(space) else Tensor.float


def _one_hot(values: Tensor, start: int, n: int) -> Tensor:
    return nn.functional.one_hot(values.long() - start, n).float()


def _one_hot_row(values: Tensor, first: Tensor, width: int) -> Tensor:
    hot = torch.zeros(len(values), width, device=values.device)
    return hot.scatter_(1, values.reshape(len(values), -1).long() + first.to(values.device), 1.0)


def _unit_range(pixels: Tensor) -> Tensor:
    return pixels.float() / 255


def flat_dim(space: spaces.Space[Any]) -> int:
    """How many numbers `preprocess` makes of one observation that is no tree."""
    if isinstance(space, spaces.Discrete):
        return int(space.n)
    if isinstance(space, spaces.MultiDiscrete):
        return int(space.nvec.sum())
    return int(np.prod(space.shape or (), dtype=np.int64))


def is_image_space(space: spaces.Space[Any]) -> bool:
    """Whether observations are images: uint8 in three dimensions, from 0 to 255."""
    return (
        isinstance(space, spaces.Box)
        and len(space.shape) == 3
        and space.dtype == np.uint8
        and bool((space.low == 0).all() and (space.high == 255).all())
    )


def has_channels_last(space: spaces.Space[Any]) -> bool:
    """Whether an image's last dimension is its channels: where it is smaller than the first."""
    assert space.shape is not None
    return space.shape[-1] < space.shape[0]


class Preprocessor(nn.Module):
    """All that happens to an observation before the networks' bodies read it.

    Where asked for, numbers are normalised by what was observed before. Images are turned so that channels come first,
    then `preprocess` makes numbers of everything.

    Args:
        observation_space: Of one environment.
        normalize_images: Whether the pixels of images are divided by 255.
        channels_last: Whether images have their channels in the last dimension; None sees by the sizes.
        normalizer: Normalises observations first, or None.

    Attributes:
        space: Of one observation as the bodies get it: that of the environment, but for images, whose channels come
            first.
        is_of_vectors: Whether observations are vectors of numbers.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        normalize_images: bool = True,
        channels_last: bool | None = None,
        normalizer: Normalizer | None = None,
    ) -> None:
        super().__init__()
        if not (channels_last is None or isinstance(channels_last, (bool, np.bool_))):
            raise ValueError(f"policy_kwargs: channels_last must be True, False or None, not {channels_last!r}")
        if channels_last and not any(is_image_space(leaf) for _, leaf in leaves(space_tree(observation_space))):
            raise ValueError(
                "policy_kwargs: channels_last=True is for images, which are Boxes of uint8 in three dimensions, from 0 "
                f"to 255; there is none in {observation_space}: gymnasium.wrappers.TransformObservation can make one"
            )
        self.normalizer = normalizer

        def turns(leaf: spaces.Space[Any]) -> bool:
            return is_image_space(leaf) and (has_channels_last(leaf) if channels_last is None else bool(channels_last))

        self._turns = tree_map(turns, space_tree(observation_space))
        self._turns_any = any(turn for _, turn in leaves(self._turns))
        self.space = _turned(observation_space, self._turns)
        self._readers = _readers(self.space, normalize_images)
        self.is_of_vectors = isinstance(observation_space, spaces.Box) and len(observation_space.shape) == 1

    @property
    def is_identity(self) -> bool:
        """Whether nothing happens to observations, but that they become float32."""
        return self.is_of_vectors and self.normalizer is None and type(self) is Preprocessor

    def forward(self, obs: Tree) -> Tree:
        """Tensors (B, *obs_shape) as they are kept -> float32 (B, *shape of `space`), or one-hot."""
        if self.normalizer is not None:
            obs = self.normalizer(obs)
        if self._turns_any:
            obs = tree_map(lambda turn, leaf: leaf.permute(0, 3, 1, 2) if turn else leaf, self._turns, obs)
        return tree_map(lambda read, leaf: read(leaf), self._readers, obs)

    def describe_images(self) -> list[str]:
        """A line for each image: where it stands, its size, and which dimension was taken for its channels."""
        lines = []
        for (name, turn), (_, leaf) in zip(leaves(self._turns), leaves(space_tree(self.space)), strict=True):
            if is_image_space(leaf):
                channels, height, width = leaf.shape
                lines.append(
                    f"{name or 'observation'}: an image of {height} x {width} pixels with {channels} "
                    f"channel{'s' if channels != 1 else ''}, which come {'last' if turn else 'first'} (policy_kwargs: "
                    f"channels_last={not turn} reads it the other way)"
                )
        return lines


def _turned(space: spaces.Space[Any], turns: Tree) -> spaces.Space[Any]:
    if isinstance(space, spaces.Dict):
        return spaces.Dict({key: _turned(branch, turns[key]) for key, branch in space.spaces.items()})
    if isinstance(space, spaces.Tuple):
        return spaces.Tuple([_turned(branch, turn) for branch, turn in zip(space.spaces, turns, strict=True)])
    if turns:
        height, width, channels = space.shape or ()
        return spaces.Box(0, 255, (channels, height, width), np.uint8)
    return space


def obs_to_tensor(obs: Tree, device: torch.device) -> Tree:
    """The door from NumPy to torch for observations: no copy where none is needed."""
    return tree_map(lambda leaf: torch.as_tensor(leaf, device=device), obs)

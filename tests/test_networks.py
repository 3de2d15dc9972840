"""What an extractor is given: the same as with stable-baselines3."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.preprocessing import preprocess_obs
from torch import Tensor, nn

from sbac.deterministic import DeterministicActorCritic
from sbac.networks import BaseFeaturesExtractor, CombinedExtractor, FlattenExtractor
from sbac.policies import StochasticActorCritic
from sbac.preprocessing import Preprocessor, is_image_space, preprocess
from sbac.trees import Tree, leaves, tree_map

CPU = torch.device("cpu")
IMAGE = spaces.Box(0, 255, (6, 5, 3), np.uint8)
SPACES: dict[str, spaces.Space[Any]] = {
    "vector": spaces.Box(-1, 1, (3,), np.float32),
    "float64": spaces.Box(-1, 1, (3,), np.float64),
    "whole numbers": spaces.Box(-5, 5, (3,), np.int64),
    "image": IMAGE,
    "three dimensions of few values": spaces.Box(0, 10, (6, 5, 3), np.uint8),
    "three dimensions of float": spaces.Box(0, 255, (6, 5, 3), np.float32),
    "bytes in a row": spaces.Box(0, 255, (8,), np.uint8),
    "discrete": spaces.Discrete(4),
}
TREE = spaces.Dict({"eye": IMAGE, "place": spaces.Discrete(4), "speed": SPACES["float64"]})


def batch(space: spaces.Space[Any], n: int = 3) -> Tree:
    space.seed(0)
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        drawn = [space.sample() for _ in range(n)]
        return tree_map(lambda *parts: torch.as_tensor(np.stack(parts)), *drawn)
    return torch.as_tensor(np.stack([np.asarray(space.sample(), dtype=space.dtype) for _ in range(n)]))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", SPACES)
def test_observations_are_those_of_stable_baselines3(name: str, normalize: bool) -> None:
    space = SPACES[name]
    obs = batch(space)
    before = obs.clone()
    ours = preprocess(obs, space, normalize)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, preprocess_obs(obs, space, normalize).float())
    assert torch.equal(obs, before)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_tree_is_read_leaf_by_leaf(normalize: bool) -> None:
    obs = batch(TREE)
    ours = preprocess(obs, TREE, normalize)
    theirs = preprocess_obs(obs, TREE, normalize)
    for name, leaf in leaves(ours):
        assert leaf.dtype == torch.float32
        assert torch.equal(leaf, theirs[name].float())

    pair = spaces.Tuple([spaces.Discrete(3, start=5), TREE])
    place, inner = preprocess((torch.tensor([5, 7]), batch(TREE, 2)), pair, normalize)
    assert place.tolist() == [[1, 0, 0], [0, 0, 1]]
    assert inner["eye"].shape == (2, 6, 5, 3)


def test_pixels_are_divided_by_255() -> None:
    obs = torch.tensor([[[[0, 51, 255]]]], dtype=torch.uint8)
    space = spaces.Box(0, 255, (1, 1, 3), np.uint8)
    assert preprocess(obs, space).flatten().tolist() == pytest.approx([0, 0.2, 1])
    assert preprocess(obs, space, normalize_images=False).flatten().tolist() == [0, 51, 255]


def test_float32_is_not_copied() -> None:
    obs = batch(SPACES["vector"])
    assert preprocess(obs, SPACES["vector"]) is obs


def test_images_are_bytes_in_three_dimensions() -> None:
    assert [name for name, space in SPACES.items() if is_image_space(space)] == ["image"]


def test_extractors_flatten_and_join_what_they_are_given() -> None:
    image = torch.rand(3, 6, 5, 3, dtype=torch.float64)
    flat = FlattenExtractor(IMAGE)(image)
    assert torch.equal(flat, image.reshape(3, -1))
    features = CombinedExtractor(TREE)(preprocess(batch(TREE), TREE))
    assert features.shape == (3, 6 * 5 * 3 + 4 + 3)
    assert features.dtype == torch.float32
    assert features[:, : 6 * 5 * 3].max() <= 1


class Watching(BaseFeaturesExtractor):
    """Remembers what it was given."""

    def __init__(self, observation_space: spaces.Space[Any]) -> None:
        super().__init__(observation_space, 2)
        self.layer = nn.Linear(1, 2)
        self.seen: list[Tree] = []

    def forward(self, obs: Tree) -> Tensor:
        self.seen.append(obs)
        first = next(leaves(obs))[1]
        return self.layer(first.reshape(len(first), -1).mean(1, keepdim=True))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("space", [*SPACES.values(), TREE], ids=[*SPACES, "tree"])
@pytest.mark.parametrize("kind", ["shared", "apart", "deterministic"])
def test_an_extractor_of_a_users_own_is_given_these_wherever_it_stands(
    kind: str, space: spaces.Space[Any], normalize: bool
) -> None:
    action_space = spaces.Box(-1, 1, (2,), np.float32)
    kwargs: dict[str, Any] = {
        "net_arch": [4],
        "features_extractor_class": Watching,
        "normalize_images": normalize,
    }
    obs = batch(space)
    numpy_obs = tree_map(lambda leaf: leaf.numpy(), obs)
    action = torch.zeros(3, 2)
    if kind == "deterministic":
        deterministic = DeterministicActorCritic(space, action_space, CPU, **kwargs)
        deterministic.act(numpy_obs, deterministic=True)
        deterministic(obs)
        deterministic.critic(obs, action)
        deterministic.critic.q1_forward(obs, action)
        deterministic.actor_target(obs)
        deterministic.critic_target(obs, action)
        bodies, calls = [m for m in deterministic.modules() if isinstance(m, Watching)], 6
        assert len(bodies) == 4
    else:
        policy = StochasticActorCritic(space, action_space, CPU, share_features_extractor=kind == "shared", **kwargs)
        policy.act(numpy_obs, deterministic=True)
        policy.predict_values(obs)
        policy.evaluate_actions(obs, action)
        policy(obs)
        bodies, calls = [m for m in policy.modules() if isinstance(m, Watching)], 5 if kind == "shared" else 6
    given = [tree for body in bodies for tree in body.seen]
    assert len(given) == calls
    expected = dict(leaves(Preprocessor(space, normalize)(obs)))
    for tree in given:
        for name, leaf in leaves(tree):
            assert leaf.dtype == torch.float32
            assert torch.equal(leaf, expected[name])

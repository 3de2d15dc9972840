"""Every Gymnasium space: actions of each kind reach the environment as its space has them, masks hold, images turn."""

from __future__ import annotations

import math
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from sbac import A2C, A3C, DDPG, TD3, EnvironmentFault, evaluate_policy
from sbac.bodies import choose_policy
from sbac.distributions import DistributionFamily
from sbac.envs import ActionCodec, Spaces, make_environments
from sbac.networks import CombinedExtractor, FlattenExtractor, NatureCNN
from sbac.observations import n_choices
from sbac.policies import StochasticActorCritic
from sbac.preprocessing import Preprocessor, has_channels_last
from sbac.trees import leaves, rows, space_tree, tree_map

OBSERVED = spaces.Box(-1, 1, (3,), np.float32)
BIT = spaces.Discrete(2)
CPU = torch.device("cpu")
ACTIONS: dict[str, spaces.Space[Any]] = {
    "discrete": spaces.Discrete(3, start=-1),
    "several discrete": spaces.MultiDiscrete([[2, 3], [4, 2]], start=[[0, -1], [5, 0]]),
    "switches": spaces.MultiBinary((2, 3)),
    "box": spaces.Box(np.float32([[0], [-1]]), np.float32([[10], [1]])),
    "hybrid": spaces.Dict(
        {
            "move": spaces.Box(0, 10, (2, 2), np.float32),
            "kind": spaces.Discrete(3, start=5),
            "more": spaces.Tuple([spaces.MultiBinary(2), spaces.MultiDiscrete([2, 3])]),
        }
    ),
    "pair": spaces.Tuple([spaces.Discrete(2), spaces.Box(-1, 1, (1,), np.float32)]),
}


class Witness(gymnasium.Env[Any, Any]):
    """Accepts only actions that its space contains, in the space's own dtypes, and observes noise."""

    def __init__(self, action_space: spaces.Space[Any], observation_space: spaces.Space[Any] | None = None) -> None:
        self.action_space = action_space
        self.observation_space = observation_space or spaces.Box(-1, 1, (3,), np.float32)
        self.received: list[Any] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        self.received.append(action)
        self.steps += 1
        return self.observation_space.sample(), 1.0, self.steps == 7, False, {}


# Actions.


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("name", ACTIONS)
def test_actions_of_every_space_reach_the_environment(name: str, squash: bool) -> None:
    space = ACTIONS[name]
    has_box = any(isinstance(leaf, spaces.Box) for _, leaf in leaves(space_tree(space)))
    kwargs = {"squash": squash and has_box}
    witnesses = [Witness(space) for _ in range(3)]
    model = A2C("MlpPolicy", [lambda w=w: w for w in witnesses], seed=0, n_steps=4, policy_kwargs=kwargs).learn(120)
    assert all(len(witness.received) == 40 for witness in witnesses)
    single, _ = model.predict(np.zeros(3, np.float32))
    assert space.contains(single)
    several, _ = model.predict(np.zeros((5, 3), np.float32), deterministic=False)
    assert all(space.contains(rows(several, i)) for i in range(5))
    evaluate_policy(model, lambda: Witness(space), n_eval_episodes=2)


@pytest.mark.parametrize("name", ACTIONS)
def test_the_units_of_an_algorithm_and_back(name: str) -> None:
    space = ACTIONS[name]
    space.seed(1)
    codec = ActionCodec(space)
    for _ in range(20):
        native = space.sample()
        units = codec.from_env(native)
        for _, leaf in leaves(units):
            assert np.asarray(leaf).min() >= -1 if np.asarray(leaf).dtype.kind == "f" else np.asarray(leaf).min() >= 0
        back = codec.to_env(tree_map(np.asarray, units))
        for (_, ours), (_, theirs) in zip(leaves(back), leaves(native), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("name", ACTIONS)
def test_rollouts_and_files_hold_actions_of_every_space(name: str, tmp_path: Any) -> None:
    def model(path: str | None = None) -> A2C:
        def make() -> Witness:
            return Witness(ACTIONS[name])

        return A2C("MlpPolicy", make, seed=0, n_steps=5) if path is None else A2C.load(path, env=make)

    whole = model().learn(13)  # stops within a rollout
    assert whole.rollout_buffer.pos == 0
    cut = model()
    cut.learn(13, callback=lambda locals_, _: locals_["self"].num_timesteps < 8)
    assert cut.rollout_buffer.pos == 3
    cut.save(tmp_path / "cut", full=True)
    loaded = model(str(tmp_path / "cut"))
    held, stored = loaded.rollout_buffer.get().action, cut.rollout_buffer.get().action
    for (_, ours), (_, theirs) in zip(leaves(held), leaves(stored), strict=True):
        assert torch.equal(ours, theirs)
    obs = np.ones((4, 3), np.float32)
    for (_, ours), (_, theirs) in zip(leaves(loaded.predict(obs)[0]), leaves(cut.predict(obs)[0]), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_combined_log_probability_is_the_sum_of_its_parts() -> None:
    space = ACTIONS["hybrid"]
    family = DistributionFamily(space)
    # In the order of their names: 3 kinds; 2 switches, then 2 and 3 values; 4 dimensions.
    assert (family.width, family.n_dims, family.n_choices) == (3 + 2 + 5 + 4, 4, 8)
    torch.manual_seed(0)
    parameters, log_std = torch.randn(6, family.width), torch.randn(4)
    distribution = family(parameters, log_std)
    action = distribution.sample(torch.Generator().manual_seed(0))
    kind, switches, choices, move = parameters.split([3, 2, 5, 4], dim=1)
    expected = (
        torch.distributions.Categorical(logits=kind).log_prob(action["kind"])
        + torch.distributions.Normal(move, log_std.exp()).log_prob(action["move"]).sum(1)
        + torch.distributions.Bernoulli(logits=switches).log_prob(action["more"][0]).sum(1)
        + torch.distributions.Categorical(logits=choices[:, :2]).log_prob(action["more"][1][:, 0])
        + torch.distributions.Categorical(logits=choices[:, 2:]).log_prob(action["more"][1][:, 1])
    )
    torch.testing.assert_close(distribution.log_prob(action), expected)
    entropies = [
        torch.distributions.Categorical(logits=kind).entropy(),
        torch.distributions.Normal(move, log_std.exp()).entropy().sum(1),
        torch.distributions.Bernoulli(logits=switches).entropy().sum(1),
        torch.distributions.Categorical(logits=choices[:, :2]).entropy(),
        torch.distributions.Categorical(logits=choices[:, 2:]).entropy(),
    ]
    torch.testing.assert_close(distribution.entropy(), sum(entropies))


def test_policy_and_buffer_agree_on_the_order_of_the_parts() -> None:
    """The space names its parts in another order than the alphabet."""
    space = spaces.Dict([("z", spaces.Discrete(2)), ("a", spaces.Box(-1, 1, (2,), np.float32))])
    policy = StochasticActorCritic(spaces.Box(-1, 1, (3,), np.float32), space, CPU)
    obs = np.zeros((4, 3), np.float32)
    action = policy.act(obs, deterministic=False, generator=torch.Generator().manual_seed(0))
    assert {name: leaf.shape for name, leaf in leaves(action)} == {"a": (4, 2), "z": (4,)}
    tensors = {"z": torch.as_tensor(action["z"]), "a": torch.as_tensor(action["a"])}
    _, log_prob, _ = policy.evaluate_actions(torch.as_tensor(obs), tensors)
    expected = policy.get_distribution(torch.as_tensor(obs)).log_prob(tensors)
    torch.testing.assert_close(log_prob, expected)


def test_squash_needs_finite_bounds() -> None:
    known = Spaces(spaces.Box(-1, 1, (3,), np.float32), spaces.Box(-np.inf, np.inf, (2,), np.float32), 1)
    with pytest.raises(ValueError, match="squash needs finite bounds, which Box"):
        A2C("MlpPolicy", known, policy_kwargs={"squash": True})
    with pytest.raises(ValueError, match=r"squash is for actions in a Box, and there is none in Discrete\(2\)"):
        A2C("MlpPolicy", known._replace(action_space=spaces.Discrete(2)), policy_kwargs={"squash": True})


@pytest.mark.parametrize("cls", [DDPG, TD3])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 2)])
def test_boxes_of_every_shape_reach_the_environment(cls: Any, shape: tuple[int, ...]) -> None:
    witness = Witness(spaces.Box(3, 5, shape, np.float32))
    cls("MlpPolicy", witness, learning_starts=10, batch_size=4, buffer_size=50, seed=0).learn(30)
    assert {np.shape(action) for action in witness.received} == {shape}


UNBOUNDED = spaces.Box(np.float32([-np.inf, 0]), np.float32([1, np.inf]))
BOTH = "A2C and A3C act in it as it is"
NEITHER = {"text": spaces.Text(5), "part": spaces.Dict({"a": spaces.Box(-1, 1), "b": spaces.Sequence(BIT)})}
REFUSED: list[tuple[Any, spaces.Space[Any], str]] = [
    *((cls, space, BOTH) for cls in (DDPG, TD3) for name, space in ACTIONS.items() if name != "box"),
    *((cls, UNBOUNDED, BOTH) for cls in (DDPG, TD3)),
    *((cls, spaces.Dict({"a": spaces.Box(-1, 1)}), BOTH) for cls in (DDPG, TD3)),
    *((cls, space, "TransformAction can make") for cls in (A2C, A3C, DDPG, TD3) for space in NEITHER.values()),
]


@pytest.mark.parametrize(("cls", "space", "nearest"), REFUSED)
def test_actions_that_an_algorithm_cannot_choose_are_refused_with_what_can(
    cls: Any, space: spaces.Space[Any], nearest: str
) -> None:
    """Whatever the policy, the error names the space, the algorithm, and the nearest thing that works, which does."""
    for policy in ("MlpPolicy", "auto"):
        with pytest.raises(ValueError, match=nearest) as caught:
            cls(policy, Spaces(OBSERVED, space, 1))
        assert str(caught.value).startswith(f"{cls.__name__} acts in ")
        assert f"{space}" in str(caught.value)
    if nearest == BOTH:
        for other in (A2C, A3C):
            other("MlpPolicy", Spaces(OBSERVED, space, 1), policy_kwargs={"net_arch": [8]})


@pytest.mark.parametrize("cls", [A2C, A3C, DDPG, TD3])
def test_observations_that_no_algorithm_reads_are_refused_with_what_makes_them_readable(cls: Any) -> None:
    for space in NEITHER.values():
        with pytest.raises(ValueError, match=r"gymnasium\.wrappers\.FlattenObservation or TransformObs") as caught:
            cls("MlpPolicy", Spaces(space, spaces.Box(-1, 1), 1))
        assert str(caught.value).startswith(f"{cls.__name__} reads ")
        assert f"{space}" in str(caught.value)


@pytest.mark.parametrize("cls", [DDPG, TD3])
def test_bounds_as_the_error_says_let_it_act(cls: Any) -> None:
    with pytest.raises(ValueError, match="finite bounds") as caught:
        cls("MlpPolicy", Witness(spaces.Box(-np.inf, np.inf, (2,), np.float32)))
    advice = str(caught.value).split("bounds that suit it, such as ")[1]
    env = Witness(spaces.Box(-np.inf, np.inf, (2,), np.float32))
    wrapped = eval(advice, {"gymnasium": gymnasium, "spaces": spaces, "env": env})
    cls("MlpPolicy", wrapped, learning_starts=5, buffer_size=50, batch_size=4, seed=0).learn(6)
    assert len(env.received) == 6


# Observations.

OBSERVATIONS = spaces.Dict(
    {
        "eye": spaces.Box(0, 255, (40, 36, 3), np.uint8),
        "dial": spaces.MultiDiscrete([3, 2], start=[1, 0]),
        "lamps": spaces.MultiBinary((2, 2)),
        "rest": spaces.Tuple([spaces.Discrete(3), spaces.Dict({"v": spaces.Box(-5, 5, (2, 2), np.int16)})]),
    }
)


@pytest.mark.parametrize("cls", [A2C, A3C, DDPG, TD3])
def test_images_and_everything_else_train_together(cls: Any, capsys: Any) -> None:
    off = {"learning_starts": 8, "batch_size": 4, "buffer_size": 50}
    kwargs: dict[Any, dict[str, Any]] = {A2C: {}, A3C: {"n_workers": 1}, DDPG: off, TD3: off}
    model = cls("auto", lambda: Witness(spaces.Box(-1, 1, (2,), np.float32), OBSERVATIONS), seed=0, **kwargs[cls])
    told = capsys.readouterr().out
    assert f"{cls.__name__}: policy 'auto' is MultiInputPolicy, since observations are a Dict" in told
    assert (
        "eye: an image of 40 x 36 pixels with 3 channels, which come last (policy_kwargs: channels_last=False" in told
    )
    before = [p.detach().clone() for p in model.policy.parameters()]
    model.learn(20)
    after = list(model.policy.parameters())
    moved = [not torch.equal(old, new) for old, new in zip(before, after, strict=True)]
    # Convolutions learn too: each network has its own, and targets follow.
    assert all(moved)
    assert model.predict(OBSERVATIONS.sample())[0].shape == (2,)


def test_each_leaf_has_its_body_and_cnn_output_dim_its_size() -> None:
    space = Preprocessor(OBSERVATIONS).space
    extractor = CombinedExtractor(space, cnn_output_dim=7)
    assert [type(body) for body in extractor.bodies] == [FlattenExtractor, NatureCNN] + [FlattenExtractor] * 3
    assert extractor.features_dim == 5 + 7 + 4 + 3 + 4
    assert extractor.bodies[1].cnn[0].in_channels == 3


@pytest.mark.parametrize(
    ("shape", "last"),
    [((84, 84, 4), True), ((4, 84, 84), False), ((210, 160, 3), True), ((1, 40, 50), False), ((40, 40, 40), False)],
)
def test_channels_are_found_and_can_be_told(shape: tuple[int, ...], last: bool) -> None:
    image = spaces.Box(0, 255, shape, np.uint8)
    assert has_channels_last(image) is last
    turned = (shape[2], *shape[:2])
    assert Preprocessor(image).space.shape == (turned if last else shape)
    assert Preprocessor(image, channels_last=True).space.shape == turned
    assert Preprocessor(image, channels_last=False).space.shape == shape

    obs = torch.randint(0, 256, (2, *shape), dtype=torch.uint8)
    expected = obs.permute(0, 3, 1, 2) if last else obs
    assert torch.equal(Preprocessor(image)(obs), expected / 255)
    assert torch.equal(Preprocessor(image, normalize_images=False)(obs), expected.float())


def test_channels_last_is_true_false_or_none() -> None:
    with pytest.raises(ValueError, match="channels_last must be True, False or None, not 'last'"):
        Preprocessor(spaces.Box(0, 255, (40, 40, 3), np.uint8), channels_last="last")


@pytest.mark.parametrize("space", [spaces.Box(0, 1, (40, 40, 3)), spaces.Box(0, 255, (5,), np.uint8)])
def test_channels_last_of_what_is_no_image_is_an_error(space: spaces.Box) -> None:
    with pytest.raises(ValueError, match=r"channels_last=True is for images.*there is none in Box"):
        Preprocessor(space, channels_last=True)
    Preprocessor(spaces.Dict({"eye": spaces.Box(0, 255, (40, 40, 3), np.uint8), "rest": space}), channels_last=True)


def test_an_image_network_does_not_care_where_its_channels_were() -> None:
    first, last = spaces.Box(0, 255, (3, 40, 44), np.uint8), spaces.Box(0, 255, (40, 44, 3), np.uint8)
    models = [A2C("CnnPolicy", Spaces(space, spaces.Discrete(3), 1), seed=0) for space in (first, last)]
    obs = np.random.default_rng(0).integers(0, 256, (5, 3, 40, 44), dtype=np.uint8)
    values = [
        model.policy.predict_values(torch.as_tensor(image))
        for model, image in zip(models, (obs, obs.transpose(0, 2, 3, 1)), strict=True)
    ]
    assert torch.equal(*values)
    assert isinstance(models[0].policy.features_extractor, NatureCNN)
    assert models[0].policy.features_extractor.features_dim == 512
    assert len(models[0].policy.policy_net) == 0  # nothing between the body and the heads


def test_the_nature_network_has_the_layers_of_the_paper() -> None:
    network = NatureCNN(spaces.Box(0, 255, (4, 84, 84), np.uint8))
    shapes = [tuple(parameter.shape) for name, parameter in network.named_parameters() if name.endswith("weight")]
    assert shapes == [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (512, 64 * 7 * 7)]
    smallest = NatureCNN(spaces.Box(0, 255, (1, 36, 36), np.uint8))
    assert smallest(torch.zeros(2, 1, 36, 36)).shape == (2, 512)


def test_what_cnn_policy_cannot_read_is_refused() -> None:
    action = spaces.Box(-1, 1, (1,), np.float32)
    for cls in (A2C, DDPG, TD3):
        for space, advice in (
            (spaces.Box(-1, 1, (3,), np.float32), "use MlpPolicy"),
            (spaces.Dict({"a": spaces.Discrete(2)}), "MultiInputPolicy reads Dict and Tuple"),
            (spaces.Box(0, 255, (3, 35, 84), np.uint8), "at least 36 x 36"),
        ):
            with pytest.raises(ValueError, match=advice):
                cls("CnnPolicy", Spaces(space, action, 1))


def test_which_policy_auto_is() -> None:
    def name(*shape: int, dtype: Any = np.uint8) -> str:
        return choose_policy(spaces.Box(0, 255, shape, dtype))[0]

    assert name(84, 84, 3) == name(4, 36, 36) == "CnnPolicy"
    assert name(8, 8, 3) == name(84, 84) == name(84, 84, 3, dtype=np.float32) == "MlpPolicy"
    assert choose_policy(spaces.Tuple([spaces.Discrete(2)]))[0] == "MultiInputPolicy"
    assert choose_policy(spaces.MultiBinary(2))[0] == "MlpPolicy"


# Masks.


class Masked(gymnasium.Env[Any, Any]):
    """Two of six actions are allowed in each state, others others; complains when a forbidden one is taken."""

    action_space: spaces.Space[Any] = spaces.Discrete(6, start=10)

    def __init__(self, among: bool, length: int = 5, nothing_at: int = -1) -> None:
        self.among, self.length, self.nothing_at = among, length, nothing_at
        self.observation_space: spaces.Space[Any] = spaces.Box(0, 1, (3,), np.float32)
        if among:
            mask = spaces.MultiBinary(6)
            self.observation_space = spaces.Dict({"board": self.observation_space, "action_mask": mask})
        self.taken: list[int] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self._now()

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.mask[action - 10], (action, self.mask)
        self.taken.append(action)
        self.steps += 1
        obs, info = self._now()
        return obs, 1.0, self.steps == self.length, False, info

    def _now(self) -> tuple[Any, dict[str, Any]]:
        self.mask = np.zeros(6, np.int8)
        if self.steps not in (self.length, self.nothing_at):  # after the end nothing is allowed
            self.mask[self.np_random.choice(6, 2, replace=False)] = 1
        board = self.np_random.random(3, dtype=np.float32)
        if self.among:
            return {"board": board, "action_mask": self.mask}, {}
        return board, {"action_mask": self.mask}


@pytest.mark.parametrize("mode", list(gymnasium.vector.AutoresetMode))
@pytest.mark.parametrize("among", [True, False], ids=["in the observation", "in the info"])
def test_no_forbidden_action_is_taken(among: bool, mode: Any, tmp_path: Any) -> None:
    env = gymnasium.vector.SyncVectorEnv([lambda: Masked(among)] * 3, autoreset_mode=mode)
    model = A2C("MultiInputPolicy" if among else "MlpPolicy", env, seed=0, n_steps=4, ent_coef=0.1).learn(300)
    assert {action for one in env.envs for action in one.taken} == set(range(10, 16))
    evaluate_policy(model, lambda: Masked(among), n_eval_episodes=10)
    evaluate_policy(model, lambda: Masked(among), n_eval_episodes=10, deterministic=False)
    model.save(tmp_path / "model", full=True)
    evaluate_policy(A2C.load(tmp_path / "model"), lambda: Masked(among), n_eval_episodes=5)


def test_rollouts_hold_the_masks_that_were_acted_on() -> None:
    env = gymnasium.vector.SyncVectorEnv([lambda: Masked(among=False)] * 2)
    model = A2C("MlpPolicy", env, seed=0, n_steps=8)
    model.learn(10, callback=lambda locals_, _: locals_["self"].num_timesteps < 6)
    batch = model.rollout_buffer.get()
    _, log_prob, entropy = model.policy.evaluate_actions(batch.obs, batch.action)
    assert log_prob.exp().sub(0.5).abs().max() < 0.1  # one of two, and not of six
    assert entropy.sub(math.log(2)).abs().max() < 0.1
    unmasked = model.policy.evaluate_actions(batch.obs["observation"], batch.action)[1]
    assert unmasked.exp().sub(1 / 6).abs().max() < 0.1


def test_predict_takes_the_mask_beside_the_observation() -> None:
    model = A2C("MlpPolicy", lambda: Masked(among=False), seed=0)
    board = np.zeros(3, np.float32)
    for allowed in range(6):
        mask = np.arange(6) == allowed
        assert model.predict({"observation": board, "action_mask": mask})[0] == 10 + allowed
    several = {"observation": np.zeros((6, 3), np.float32), "action_mask": np.eye(6, dtype=np.int8)}
    assert model.predict(several, deterministic=False)[0].tolist() == list(range(10, 16))


def test_a_state_that_allows_nothing_is_named() -> None:
    model = A2C("MlpPolicy", [lambda: Masked(among=False), lambda: Masked(among=False, nothing_at=3)], seed=0)
    with pytest.raises(EnvironmentFault, match="environment 1 sent an action_mask that allows nothing at step 3"):
        model.learn(20)


def test_predict_names_the_length_of_a_mask() -> None:
    model = A2C("MlpPolicy", Spaces(spaces.Box(-1, 1, (2,)), spaces.Discrete(3), 1))
    obs = {"observation": np.zeros(2, np.float32), "action_mask": np.array([True, False])}
    with pytest.raises(ValueError, match=r"action_mask that came with .* has 2 numbers.*3 actions to allow"):
        model.predict(obs)


def test_masks_of_another_length_are_named() -> None:
    class Short(Masked):
        action_space = spaces.Discrete(7, start=10)

    with pytest.raises(EnvironmentFault, match=r"action_mask of shape \(1, 6\) at reset; .* 7 numbers"):
        A2C("MlpPolicy", lambda: Short(among=False), seed=0).learn(5)
    with pytest.raises(ValueError, match=r"action_mask .* 6 numbers, but there are 7 actions"):
        A2C("MultiInputPolicy", lambda: Short(among=True), seed=0)


def test_masks_without_choices_are_ordinary_infos() -> None:
    class Continuous(Witness):
        def step(self, action: Any) -> Any:
            return (*super().step(action)[:4], {"action_mask": np.ones(2)})

    A2C("MlpPolicy", lambda: Continuous(ACTIONS["box"]), seed=0).learn(10)


def test_zero_masked_samples_in_a_million() -> None:
    torch.manual_seed(0)
    n = 1_000_000
    logits, mask = torch.randn(n, 5) * 5, torch.rand(n, 5) < 0.4
    mask[torch.arange(n), torch.randint(5, (n,))] = True
    family = DistributionFamily(spaces.Discrete(5))
    distribution = family(logits, mask=mask)
    action = distribution.sample(torch.Generator().manual_seed(0))
    assert int((~mask).gather(1, action[:, None]).sum()) == 0
    assert int((~mask).gather(1, distribution.mode()[:, None]).sum()) == 0
    # Without the mask, a third of them would be.
    free = family(logits).sample(torch.Generator().manual_seed(0))
    assert int((~mask).gather(1, free[:, None]).sum()) > 200_000

    # The renormalised distribution, in float64.
    odds = logits.double().exp() * mask
    expected = (odds / odds.sum(1, keepdim=True)).gather(1, action[:, None]).squeeze(1).log()
    torch.testing.assert_close(distribution.log_prob(action).double(), expected, atol=1e-4, rtol=1e-5)


def test_masks_of_several_choices_stand_in_a_row() -> None:
    space = spaces.Dict({"a": spaces.MultiDiscrete([2, 3]), "b": spaces.Discrete(2), "c": spaces.MultiBinary(2)})
    assert n_choices(space) == 7
    mask = torch.tensor([[True, False, False, False, True, False, True]] * 500)
    action = DistributionFamily(space)(torch.randn(500, 9), mask=mask).sample(torch.Generator().manual_seed(0))
    assert set(map(tuple, action["a"].tolist())) == {(0, 2)}
    assert set(action["b"].tolist()) == {1}
    assert set(map(tuple, action["c"].int().tolist())) == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_gradients_of_masked_terms_are_finite() -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    mask = torch.tensor([[True, False, True]] * 4)
    distribution = DistributionFamily(spaces.Discrete(3))(logits, mask=mask)
    (distribution.log_prob(torch.tensor([0, 2, 0, 2])).sum() + distribution.entropy().sum()).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (logits.grad[:, 1] == 0).all()
    assert (logits.grad[:, 0] != 0).all()


def test_the_door_hands_masks_on_with_the_observation() -> None:
    door = make_environments([lambda: Masked(among=False)] * 2)
    obs = door.reset(seed=0)
    assert obs.keys() == {"observation", "action_mask"}
    assert (obs["action_mask"].sum(1) == 2).all()
    step = door.step(obs["action_mask"].argmax(1))
    assert step.obs.keys() == {"observation", "action_mask"}
    assert step.successor.shape == (2, 3)


@pytest.mark.parametrize("among", [True, False], ids=["in the observation", "in the info"])
def test_masked_training_goes_on_exactly(among: bool, tmp_path: Any) -> None:
    def model() -> A2C:
        return A2C("MultiInputPolicy" if among else "MlpPolicy", lambda: Masked(among), n_envs=2, n_steps=4, seed=0)

    whole = model().learn(120)
    cut = model()
    cut.learn(120, callback=lambda locals_, _: locals_["self"].num_timesteps < 54)  # within a rollout and an episode
    cut.save(tmp_path / "cut", full=True)
    loaded = A2C.load(tmp_path / "cut", env=lambda: Masked(among))
    loaded.learn(120 - loaded.num_timesteps, reset_num_timesteps=False)
    assert torch.equal(loaded.policy.flat, whole.policy.flat)

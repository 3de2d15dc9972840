"""Policies: what all have in common, and a stochastic actor with a state-value critic, for A2C and A3C."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from sbac.adapters import Step
from sbac.bodies import Body, NetArch, check_module_class, image_extractor, make_extractor, split_net_arch
from sbac.buffers import RolloutBatch
from sbac.convolution import Chain
from sbac.distributions import Distribution, DistributionFamily
from sbac.envs import ActionCodec
from sbac.guards import require_constant
from sbac.kept import Kept
from sbac.look import is_hooked
from sbac.networks import NatureCNN, create_mlp, has_nothing_to_learn, init_orthogonal
from sbac.normalization import Normalizer, make_normalizer
from sbac.observations import MASK, as_batch, split_mask
from sbac.part import Part
from sbac.perceptron import ALL, Perceptron
from sbac.preprocessing import Preprocessor, obs_to_tensor
from sbac.trainable import Trainable
from sbac.trees import Tree, leaves, rows, space_tree


class BasePolicy(nn.Module, ABC):
    """What both policies offer to those who hold a policy without its algorithm.

    Attributes:
        observation_space: Of one environment.
        action_space: Of one environment, in its own units.
        device: Where the networks live.
        preprocessor: Makes observations ready for the networks.
        codec: From the policy's actions to the environment's.
    """

    preprocessor = Part[Preprocessor]()

    def _set_spaces(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: torch.device,
        rescale_actions: bool = True,
    ) -> None:
        self.observation_space = observation_space
        self.action_space = action_space
        self.device = device
        self.codec = ActionCodec(action_space, rescale_actions)
        # For `predict`, so that torch's global generator is left alone; of its seed, so that models' seeds reach it.
        self._predict_generator = torch.Generator().manual_seed(torch.initial_seed())

    def _make_preprocessor(
        self,
        normalize_images: bool,
        channels_last: bool | None,
        normalize_obs: bool,
        normalize_reward: bool,
        normalizer_kwargs: Mapping[str, Any] | None,
    ) -> Preprocessor:
        """What stands in front of all bodies, with the statistics that it needs."""
        normalizer = None
        if normalize_obs or normalize_reward:
            normalizer = make_normalizer(self.observation_space, normalize_obs, normalize_reward, normalizer_kwargs)
        return Preprocessor(self.observation_space, normalize_images, channels_last, normalizer)

    @property
    def normalizer(self) -> Normalizer | None:
        """The running statistics of observations and returns, where there are such."""
        return self.preprocessor.normalizer

    # What happens in training, beside learning.

    def begin_episodes(self) -> None:
        """All environments begin new episodes."""
        if self.normalizer is not None:
            self.normalizer.begin_episodes()

    def cut_episodes(self, indices: Sequence[int]) -> None:
        """The environments of these numbers begin new episodes, although their old ones had not ended."""
        if self.normalizer is not None and len(self.normalizer.running_return):
            self.normalizer.running_return[list(indices)] = 0.0

    def observe(self, obs: Tree, step: Step, gamma: float) -> None:
        """Take note of a step of training.

        Args:
            obs: What was acted on, (n, *obs_shape).
            step: What came of it.
            gamma: The discount factor.
        """
        if self.normalizer is not None:
            self.normalizer.observe(split_mask(obs, self.observation_space, 0)[0], step, gamma)

    def normalize_reward(self, reward: Tensor) -> Tensor:
        """Rewards as the loss is to see them."""
        return reward if self.normalizer is None else self.normalizer.normalize_reward(reward)

    def get_running_state(self) -> dict[str, np.ndarray]:
        """What belongs to the episodes that are running, for a full checkpoint."""
        return {} if self.normalizer is None else {"running_return": self.normalizer.running_return}

    def set_running_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on with what `get_running_state` returned."""
        if self.normalizer is not None and "running_return" in state:
            self.normalizer.running_return = state["running_return"]

    @abstractmethod
    def act(self, obs: Tree, deterministic: bool, generator: torch.Generator | None = None) -> Tree:
        """Actions (n, *action_shape), in the units of an algorithm, for observations (n, *obs_shape)."""

    def act_with_state(
        self,
        obs: Tree,
        state: Any,
        episode_start: Any,
        deterministic: bool,
        generator: torch.Generator | None = None,
    ) -> tuple[Tree, Any]:
        """As `act`, outside of training, for policies that remember: with the state that the last call returned.

        Args:
            obs: (n, *obs_shape).
            state: Of an earlier call; None begins anew.
            episode_start: Where an episode begins, so that its state is forgotten, (n,) bool, or None.
            deterministic: The most probable action, or a draw.
            generator: Draws.

        Returns:
            Actions (n, *action_shape), and the state; that which was given where the policy has none.
        """
        return self.act(obs, deterministic, generator), state

    @abstractmethod
    def set_training_mode(self, mode: bool) -> None:
        """As `nn.Module.train`, but only for networks with layers to which the mode matters."""

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = True,
    ) -> tuple[Tree, Any]:
        """The policy's action; as `BaseAlgorithm.predict`, for scripts that hold only the policy.

        Args:
            observation: One observation, (*obs_shape), or a batch, (n, *obs_shape).
            state: Of a recurrent policy; passed through.
            episode_start: For recurrent policies: where an episode begins, (n,) bool.
            deterministic: The most probable action, or a draw. Draws come from a generator of the policy's own.

        Returns:
            The action in the environment's own units, (*action_shape) or (n, *action_shape), and the state.

        Raises:
            ValueError: The observation does not have the form of the observation space.
            NotFiniteError: The observation holds NaN or infinity.
        """
        obs, single = as_batch(observation, self.observation_space)
        self.set_training_mode(False)
        action, state = self.act_with_state(obs, state, episode_start, deterministic, self._predict_generator)
        return self.codec.to_env(rows(action, 0) if single else action), state

    def obs_to_tensor(self, observation: Any) -> tuple[Tree, bool]:
        """Observations as the networks take them.

        Args:
            observation: One observation, (*obs_shape), or a batch, (n, *obs_shape).

        Returns:
            A tensor (n, *obs_shape), or a tree of them, and whether a batch was given.

        Raises:
            ValueError: The observation does not have the form of the observation space.
            NotFiniteError: The observation holds NaN or infinity.
        """
        obs, single = as_batch(observation, self.observation_space)
        return obs_to_tensor(obs, self.device), not single


class Evaluation(NamedTuple):
    """What networks say of a rollout of T steps of n environments, and the way back to their parameters.

    `back` takes the gradients of a loss with respect to `value`, `log_prob` and `entropy`, in this order, and adds what
    follows to the gradients of the parameters.
    """

    value: Tensor  # V(s), (T n,)
    log_prob: Tensor  # log pi(a|s), (T n,)
    entropy: Tensor  # of pi(.|s), (T n,)
    bootstrap_value: Tensor  # V of `RolloutBatch.bootstrap_obs`, (M,), from the networks as they evaluate
    back: Callable[[Tensor, Tensor, Tensor], None]


class _Images(NamedTuple):
    """What a body made of images."""

    chain: Chain  # the features, (B, features_dim), with the way back
    mask: Tensor | None  # of allowed actions, which came with the images


class StochasticActorCritic(Trainable, BasePolicy):
    """pi(a|s) and V(s), for A2C and A3C.

    Args:
        observation_space: Box, Discrete, MultiDiscrete, MultiBinary, or Dict and Tuple of these.
        action_space: Discrete, Box, MultiDiscrete, MultiBinary, or Dict and Tuple of these.
        device: Where the networks live.
        net_arch: Hidden layers; a list for both networks, or ``dict(pi=[...], vf=[...])``.
        activation_fn: After each hidden layer.
        ortho_init: Orthogonal initialisation, with gains sqrt 2 (bodies), 0.01 (actions), 1 (value); else torch's own.
        log_std_init: Logarithm of the first standard deviation of a Gaussian policy, in units of [-1, 1].
        squash: Whether actions of a Box, which must be finite, are squashed into it by tanh, rather than clipped.
        rescale_actions: Whether actions in a finite Box are made in [-1, 1] and rescaled to its bounds; False makes
            them in the Box's own units, as Stable-Baselines' A2C does.
        layer_norm: Whether to normalise before each activation.
        dropout: Share of each hidden layer's units that training leaves out, in [0, 1).
        features_extractor_class: The body in front of both networks, a class or a module; or a dict with one for each,
            ``dict(pi=..., vf=...)``. By default `CombinedExtractor` for Dict and Tuple observations, else
            `FlattenExtractor`.
        features_extractor_kwargs: Its further arguments.
        share_features_extractor: One body for both, or one for each.
        normalize_images: Whether the pixels of images are divided by 255 in front of the body; see `preprocess`.
        channels_last: Whether images have their channels in the last dimension; None sees by the sizes.
        normalize_obs: Whether observations are normalised by their running mean and deviation.
        normalize_reward: Whether rewards are divided by the running deviation of the discounted return.
        normalizer_kwargs: Further arguments of the `Normalizer`: ``clip_obs``, ``clip_reward``, ``epsilon``, ``keys``.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: torch.device,
        net_arch: NetArch = (64, 64),
        activation_fn: type[nn.Module] = nn.Tanh,
        ortho_init: bool = True,
        log_std_init: float = 0.0,
        squash: bool = False,
        rescale_actions: bool = True,
        layer_norm: bool = False,
        dropout: float = 0.0,
        features_extractor_class: Body | Mapping[str, Body] | None = None,
        features_extractor_kwargs: Mapping[str, Any] | None = None,
        share_features_extractor: bool = True,
        normalize_images: bool = True,
        channels_last: bool | None = None,
        normalize_obs: bool = False,
        normalize_reward: bool = False,
        normalizer_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._set_spaces(observation_space, action_space, device, rescale_actions)
        self.preprocessor = self._make_preprocessor(
            normalize_images, channels_last, normalize_obs, normalize_reward, normalizer_kwargs
        )

        pi_arch, vf_arch = split_net_arch(net_arch, ("pi", "vf"))
        check_module_class("activation_fn", activation_fn, "torch.nn.Tanh")
        require_constant("policy_kwargs: log_std_init", log_std_init)
        require_constant("policy_kwargs: dropout", dropout, minimum=0, below=1)
        if squash:
            _require_squashable(action_space)
            if not rescale_actions:
                raise ValueError("policy_kwargs: squash makes actions in [-1, 1]: leave rescale_actions=False out")
        if isinstance(features_extractor_class, Mapping):
            share_features_extractor = False
        self.share_features_extractor = share_features_extractor
        extractor_arguments = self.preprocessor.space, features_extractor_class, features_extractor_kwargs
        self.features_extractor = make_extractor(*extractor_arguments, "pi")
        if share_features_extractor:
            self.vf_features_extractor = self.features_extractor
        else:
            self.vf_features_extractor = make_extractor(*extractor_arguments, "vf")

        features_dim = self._make_core(self.features_extractor.features_dim)
        vf_features_dim = features_dim if share_features_extractor else self.vf_features_extractor.features_dim
        self.policy_net = nn.Sequential(*create_mlp(features_dim, 0, pi_arch, activation_fn, layer_norm, dropout))
        self.value_net = nn.Sequential(*create_mlp(vf_features_dim, 1, vf_arch, activation_fn, layer_norm, dropout))
        self.family = DistributionFamily(action_space, squash)
        _require_mask_length(observation_space, self.family.n_choices)
        self.action_net = nn.Linear(pi_arch[-1] if pi_arch else features_dim, self.family.width)
        if self.family.n_dims:
            self.log_std = nn.Parameter(torch.full((self.family.n_dims,), float(log_std_init)))

        self._pi, self._v = Perceptron(self, "policy_net", "action_net"), Perceptron(self, "value_net")
        self._kept: Kept[_Images] = Kept()

        if ortho_init:
            init_orthogonal(self, gain=2**0.5)
            init_orthogonal(self.action_net, gain=0.01)
            init_orthogonal(self.value_net[-1], gain=1.0)
        self.to(device)
        self.flatten()

    def _make_core(self, features_dim: int) -> int:
        """Make what stands between the body and the networks behind it; returns how many features come out of it."""
        return features_dim

    def begin_rollout(self) -> None:
        """Count in what was observed so far. Within a rollout, the policy that acts is the one that learns."""
        if self.normalizer is not None:
            self.normalizer.refresh()
        self._kept = Kept(is_on=True)

    def observe(self, obs: Tree, step: Step, gamma: float) -> None:
        super().observe(obs, step, gamma)
        self._kept.note(obs)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kept": Kept()}

    def take_in_buffers(self, other: Trainable) -> None:
        """Copy buffers, but count in what the other's normaliser observed: several may send theirs in turn."""
        before = None if self.normalizer is None else self.normalizer.moments.cpu().numpy().copy()
        super().take_in_buffers(other)
        if self.normalizer is not None and before is not None and isinstance(other, StochasticActorCritic):
            self.normalizer.take_in(before, other.normalizer)

    def evaluate_rollout(self, batch: RolloutBatch) -> Evaluation:
        """What the loss needs of T steps of n environments."""
        mode = self.training
        self.set_training_mode(False)
        with torch.no_grad():
            bootstrap_value = self.predict_values(batch.bootstrap_obs)
        self.set_training_mode(mode)
        return self._evaluate_written_out(batch, bootstrap_value) or self._evaluate_by_autograd(
            self.evaluate_actions(batch.obs, batch.action), bootstrap_value
        )

    def _evaluate_by_autograd(self, found: tuple[Tensor, Tensor, Tensor], bootstrap_value: Tensor) -> Evaluation:
        value, log_prob, entropy = found
        back = partial(self.back_by_autograd, found)
        return Evaluation(value.detach(), log_prob.detach(), entropy.detach(), bootstrap_value, back)

    @torch.no_grad()
    def _evaluate_written_out(self, batch: RolloutBatch, bootstrap_value: Tensor) -> Evaluation | None:
        """The evaluation, where the way back through all networks is written out."""
        read = self._trace_rollout(batch)
        if read is None:
            return None
        features, chain, mask = read
        pi, v = self._pi.trace(features), self._v.trace(features)
        if pi is None or v is None:
            return None
        action, distribution = self.family.flat(batch.action), self._distribution(pi.output, mask)
        asked = None if chain is None else ALL

        def back(of_value: Tensor, of_log_prob: Tensor, of_entropy: Tensor) -> None:
            of_features = v.back(of_value.unsqueeze(-1), self._in_place, asked)
            slopes = distribution.slopes(action, of_log_prob, of_entropy)
            if slopes is None:
                leaf = pi.output.detach().requires_grad_()
                log_std = [p for p in self._learning if p is getattr(self, "log_std", None)]
                with torch.enable_grad():
                    same = self._distribution(leaf, mask)
                    found = (same.log_prob(action) * of_log_prob).sum() + (same.entropy() * of_entropy).sum()
                found.backward(inputs=[leaf, *log_std])
                of_parameters = leaf.grad
            else:
                of_parameters, of_log_std = slopes
                if of_log_std is not None and id(self.log_std) in self._in_place:
                    self._in_place[id(self.log_std)].tensor.add_(of_log_std)
            assert of_parameters is not None
            also_of_features = pi.back(of_parameters, self._in_place, asked)
            if chain is not None and of_features is not None and also_of_features is not None:
                chain.back(of_features + also_of_features, self._in_place)

        value = v.output.squeeze(-1)
        return Evaluation(value, distribution.log_prob(action), distribution.entropy(), bootstrap_value, back)

    def get_distribution(self, obs: Tree) -> Distribution:
        """pi(.|s) for a batch of observations (B, *obs_shape)."""
        obs, mask = self._read(obs)
        return self._distribution(self._pi(self._actor_features(obs)), mask)

    def predict_values(self, obs: Tree) -> Tensor:
        """V(s) for a batch of observations: (B,)."""
        if not torch.is_grad_enabled() and self._has_plain_bodies():
            features, _ = self._read_plain(obs)
        else:
            features = self._critic_features(self._read(obs)[0])
        return self._v(features).squeeze(-1)

    def evaluate_actions(self, obs: Tree, action: Tree) -> tuple[Tensor, Tensor, Tensor]:
        """What the loss needs.

        Args:
            obs: (B, *obs_shape).
            action: (B, *action_shape), or a tree of them where the action space is one.

        Returns:
            V(s), log pi(a|s) and the entropy of pi(.|s), each (B,).
        """
        obs, mask = self._read(obs)
        features = self._actor_features(obs)
        vf_features = features if self.share_features_extractor else self._critic_features(obs)
        distribution = self._distribution(self._pi(features), mask)
        value = self._v(vf_features).squeeze(-1)
        return value, distribution.log_prob(self.family.flat(action)), distribution.entropy()

    def act(self, obs: Tree, deterministic: bool, generator: torch.Generator | None = None) -> Tree:
        """Actions (n, *action_shape) for observations (n, *obs_shape): the most probable ones, or a draw of each."""
        parameters = None
        if type(obs) is np.ndarray and self.preprocessor.is_identity and self._has_plain_bodies():
            parameters = self._pi.act(obs)
            if parameters is not None and type(self.family) is DistributionFamily:
                action = self.family.act(parameters, deterministic, generator)
                if action is not None:
                    return action
        with torch.no_grad():
            if parameters is None:
                distribution = self._distribution_to_act(obs)
            else:
                distribution = self._distribution(torch.from_numpy(parameters), None)
            return self.family.to_numpy(distribution.mode() if deterministic else distribution.sample(generator))

    def forward(
        self, obs: Tree, deterministic: bool = False, generator: torch.Generator | None = None
    ) -> tuple[Tree, Tensor, Tensor]:
        """Actions, V(s) and log pi(a|s) for a batch of observations."""
        distribution = self.get_distribution(obs)
        action = distribution.mode() if deterministic else distribution.sample(generator)
        return action, self.predict_values(obs), distribution.log_prob(action)

    def _has_plain_bodies(self) -> bool:
        """Whether nothing in front of the perceptrons learns, and nobody has written anything else to be done there."""
        parts = self._modules
        body, vf_body = parts["features_extractor"], parts["vf_features_extractor"]
        if type(self) is not StochasticActorCritic or not (_is_plain_body(body) and not is_hooked(self.preprocessor)):
            return False
        return vf_body is body or _is_plain_body(vf_body)

    def _distribution_to_act(self, obs: Tree) -> Distribution:
        """pi(.|s) of observations as they were sent. In training, what the body makes of images is kept to learn by."""
        tensors = obs_to_tensor(obs, self.device)
        found = self._trace_images(tensors)
        if found is None:
            return self.get_distribution(tensors)
        self._kept.see(obs, found, self.flat)
        return self._distribution(self._pi(found.chain.output), found.mask)

    def _trace_images(self, obs: Tree) -> _Images | None:
        """What the body makes of images, with the way back; None where autograd is to see it."""
        body = self.features_extractor
        if not (type(body) is NatureCNN and self.share_features_extractor and self.device.type == "cpu"):
            return None
        if type(self) not in (StochasticActorCritic, CnnActorCritic) or is_hooked(self.preprocessor):
            return None
        if not (self._pi.plain().layers and self._v.plain().layers):
            return None
        images, mask = self._read(obs)
        chain = body.trace(images)
        return None if chain is None else _Images(chain, mask)

    def _trace_rollout(self, batch: RolloutBatch) -> tuple[Tensor, Chain | None, Tensor | None] | None:
        """The features of a rollout, the way back through the body where it learns, and the mask.

        None where autograd is to see it.
        """
        if self._has_plain_bodies():
            features, mask = self._read_plain(batch.obs)
            return features, None, mask
        # Step by step, so that it makes no difference which of them were kept.
        n_steps, n_envs = batch.reward.shape
        self._lay_if_moved()
        kept, self._kept = self._kept.of_steps(n_steps, self.flat), Kept()
        found: list[_Images] = []
        for t, known in enumerate(kept):
            obs = rows(batch.obs, slice(t * n_envs, (t + 1) * n_envs))
            is_same = known is not None and _are_equal(known[0], obs)  # a buffer may change what it gives to learn from
            step = known[1] if known is not None and is_same else self._trace_images(obs)
            if step is None:
                return None
            found.append(step)
        chain = Chain.joined([step.chain for step in found])
        masks = [step.mask for step in found if step.mask is not None]
        return chain.output, chain, torch.cat(masks) if masks else None

    def _actor_features(self, obs: Tree) -> Tensor:
        return self.features_extractor(obs)

    def _critic_features(self, obs: Tree) -> Tensor:
        return self.vf_features_extractor(obs)

    def _read(self, obs: Tree) -> tuple[Tree, Tensor | None]:
        """Observations as the bodies read them, and the mask of allowed actions that came with them."""
        obs, mask = split_mask(obs, self.observation_space, self.family.n_choices)
        if mask is None:
            return self.preprocessor(obs), None
        mask = mask.reshape(len(mask), -1) > 0
        if mask.shape[1] != self.family.n_choices:
            raise ValueError(
                f"the {MASK} that came with an observation has {mask.shape[1]} numbers, but there are "
                f"{self.family.n_choices} actions to allow"
            )
        return self.preprocessor(obs), mask

    def _read_plain(self, obs: Tree) -> tuple[Tensor, Tensor | None]:
        """As `_read`, and through the bodies, where they are plain ones."""
        if self.preprocessor.is_identity and isinstance(obs, Tensor) and obs.dtype is torch.float32:
            return obs, None
        obs, mask = self._read(obs)
        return self.features_extractor(obs), mask

    def _distribution(self, parameters: Tensor, mask: Tensor | None) -> Distribution:
        return self.family(parameters, self.log_std if self.family.n_dims else None, mask)


class CnnActorCritic(StochasticActorCritic):
    """As `StochasticActorCritic`, for observations that are one image: "CnnPolicy".

    Args:
        observation_space: An image.
        action_space: As of `StochasticActorCritic`.
        device: Where the networks live.
        net_arch: Hidden layers behind the body.
        features_extractor_class: The body in front of both networks.
        **kwargs: As of `StochasticActorCritic`.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: torch.device,
        net_arch: NetArch = (),
        features_extractor_class: Body | Mapping[str, Body] | None = None,
        **kwargs: Any,
    ) -> None:
        body = image_extractor(observation_space, features_extractor_class)
        super().__init__(observation_space, action_space, device, net_arch, features_extractor_class=body, **kwargs)


def _are_equal(seen: Tree, obs: Tree) -> bool:
    """Whether arrays hold the same as tensors of the CPU."""
    arrays, tensors = dict(leaves(seen)), dict(leaves(obs))
    return arrays.keys() == tensors.keys() and all(
        np.array_equal(array, tensors[name].numpy()) for name, array in arrays.items()
    )


def _is_plain_body(body: Any) -> bool:
    return has_nothing_to_learn(body) and not is_hooked(body)


def _require_squashable(space: spaces.Space[Any]) -> None:
    boxes = [leaf for _, leaf in leaves(space_tree(space)) if isinstance(leaf, spaces.Box)]
    for box in boxes:
        if not (np.isfinite(box.low).all() and np.isfinite(box.high).all()):
            raise ValueError(f"policy_kwargs: squash needs finite bounds, which {box} lacks; leave it out")
    if not boxes:
        raise ValueError(f"policy_kwargs: squash is for actions in a Box, and there is none in {space}; leave it out")


def _require_mask_length(observation_space: spaces.Space[Any], n_choices: int) -> None:
    if n_choices and isinstance(observation_space, spaces.Dict) and MASK in observation_space.spaces:
        mask = observation_space[MASK]
        if not isinstance(mask, (spaces.Box, spaces.MultiBinary)) or int(np.prod(mask.shape)) != n_choices:
            raise ValueError(
                f"{MASK} in the observations is {mask}, which has {int(np.prod(mask.shape or ()))} numbers, but there "
                f"are {n_choices} actions to allow: give it as spaces.MultiBinary({n_choices}), or another name"
            )

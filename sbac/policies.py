"""Policies: a stochastic actor with a state-value critic, and a deterministic actor with action-value critics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from sbac.distributions import CategoricalDistribution, DiagGaussianDistribution, Distribution
from sbac.envs import ActionCodec
from sbac.guards import require_constant, require_whole
from sbac.networks import (
    BaseFeaturesExtractor,
    Trainable,
    create_mlp,
    default_extractor,
    init_fan_in,
    init_orthogonal,
    init_uniform,
    preprocess,
)
from sbac.observations import as_batch
from sbac.trees import Tree, batch_size, tree_map

NetArch = Sequence[int] | Mapping[str, Sequence[int]]
"""Units of the hidden layers: one list for both networks, or a dict with a list for each."""


def split_net_arch(net_arch: NetArch, names: tuple[str, str]) -> tuple[list[int], list[int]]:
    """The hidden layers of actor and critic.

    Args:
        net_arch: One list for both, or a dict with the two `names`.
        names: Such as ``("pi", "vf")``.

    Raises:
        ValueError: A dict with other keys, or units that are no positive whole numbers.
    """
    if isinstance(net_arch, Mapping):
        if set(net_arch) != set(names):
            raise ValueError(
                f"policy_kwargs: net_arch needs the keys {names[0]!r} and {names[1]!r}, not {sorted(net_arch)}"
            )
        archs = (net_arch[names[0]], net_arch[names[1]])
    else:
        archs = (net_arch, net_arch)
    if isinstance(net_arch, Sequence) and any(isinstance(entry, Mapping) for entry in net_arch):
        raise ValueError(
            "policy_kwargs: net_arch with a dict inside a list is the form of older Stable-Baselines; write "
            f"net_arch=dict({names[0]}=[64, 64], {names[1]}=[64, 64]) with all layers of each network, not {net_arch!r}"
        )
    if not all(_is_arch(arch) for arch in archs):
        raise ValueError(
            f"policy_kwargs: net_arch lists the units of each hidden layer as positive whole numbers, not {net_arch!r}"
        )
    return [int(n) for n in archs[0]], [int(n) for n in archs[1]]


def _is_arch(arch: object) -> bool:
    return (
        isinstance(arch, Sequence)
        and not isinstance(arch, str)
        and all(isinstance(n, (int, np.integer)) and not isinstance(n, bool) and n > 0 for n in arch)
    )


def check_module_class(name: str, value: object, example: str) -> None:
    """Refuse an argument of a policy that is no class of layers.

    Raises:
        ValueError: Naming the argument and what was received.
    """
    if not (isinstance(value, type) and issubclass(value, nn.Module)):
        raise ValueError(
            f"policy_kwargs: {name} must be a subclass of torch.nn.Module, such as {example}, and not an instance or a "
            f"function; it is {value!r}"
        )


def make_extractor(
    observation_space: spaces.Space[Any],
    features_extractor_class: type[BaseFeaturesExtractor] | None,
    features_extractor_kwargs: Mapping[str, Any] | None,
) -> BaseFeaturesExtractor:
    """The body that was asked for, or the one for the space.

    Raises:
        ValueError: What was asked for is no class of layers, or its arguments are no dict.
    """
    if features_extractor_class is None:
        features_extractor_class = default_extractor(observation_space)
    check_module_class("features_extractor_class", features_extractor_class, "a subclass of BaseFeaturesExtractor")
    if not (features_extractor_kwargs is None or isinstance(features_extractor_kwargs, Mapping)):
        raise ValueError(
            "policy_kwargs: features_extractor_kwargs must be a dict of the extractor's arguments, "
            f"not {features_extractor_kwargs!r}"
        )
    return features_extractor_class(observation_space, **dict(features_extractor_kwargs or {}))


class BasePolicy(nn.Module, ABC):
    """What both policies offer to those who hold a policy without its algorithm.

    Attributes:
        observation_space: Of one environment.
        action_space: Of one environment, in its own units.
        device: Where the networks live.
    """

    def _set_spaces(
        self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any], device: torch.device
    ) -> None:
        self.observation_space = observation_space
        self.action_space = action_space
        self.device = device
        self._codec = ActionCodec(action_space)
        # For `predict`, so that torch's global generator is left alone; of its seed, so that models' seeds reach it.
        self._predict_generator = torch.Generator().manual_seed(torch.initial_seed())

    @abstractmethod
    def act(self, obs: Tree, deterministic: bool, generator: torch.Generator | None = None) -> np.ndarray:
        """Actions (n, *action_shape), in the units of an algorithm, for observations (n, *obs_shape)."""

    @abstractmethod
    def set_training_mode(self, mode: bool) -> None:
        """As `nn.Module.train`, but only for networks with layers to which the mode matters."""

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, Any]:
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
        native = self._codec.to_env(self.act(obs, deterministic, self._predict_generator))
        return (native[0] if single else native), state

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


class StochasticActorCritic(Trainable, BasePolicy):
    """pi(a|s) and V(s), for A2C and A3C.

    Args:
        observation_space: Box or Discrete.
        action_space: Box or Discrete.
        device: Where the networks live.
        net_arch: Hidden layers; a list for both networks, or ``dict(pi=[...], vf=[...])``.
        activation_fn: After each hidden layer.
        ortho_init: Orthogonal initialisation, with gains sqrt 2 (bodies), 0.01 (actions), 1 (value); else torch's own.
        log_std_init: Logarithm of the first standard deviation of a Gaussian policy, in units of [-1, 1].
        layer_norm: Whether to normalise before each activation.
        dropout: Share of each hidden layer's units that training leaves out, in [0, 1).
        features_extractor_class: The body in front of both networks; by default `CombinedExtractor` for Dict and
            Tuple observations, else `FlattenExtractor`.
        features_extractor_kwargs: Its further arguments.
        share_features_extractor: One body for both, or one for each.
        normalize_images: Whether the pixels of images are divided by 255 in front of the body; see `preprocess`.
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
        layer_norm: bool = False,
        dropout: float = 0.0,
        features_extractor_class: type[BaseFeaturesExtractor] | None = None,
        features_extractor_kwargs: Mapping[str, Any] | None = None,
        share_features_extractor: bool = True,
        normalize_images: bool = True,
    ) -> None:
        super().__init__()
        self._set_spaces(observation_space, action_space, device)
        self.normalize_images = normalize_images

        pi_arch, vf_arch = split_net_arch(net_arch, ("pi", "vf"))
        check_module_class("activation_fn", activation_fn, "torch.nn.Tanh")
        require_constant("policy_kwargs: log_std_init", log_std_init)
        require_constant("policy_kwargs: dropout", dropout, minimum=0, below=1)
        self.share_features_extractor = share_features_extractor
        extractor_arguments = observation_space, features_extractor_class, features_extractor_kwargs
        self.features_extractor = make_extractor(*extractor_arguments)
        if share_features_extractor:
            self.vf_features_extractor = self.features_extractor
        else:
            self.vf_features_extractor = make_extractor(*extractor_arguments)

        features_dim = self.features_extractor.features_dim
        self.policy_net = nn.Sequential(*create_mlp(features_dim, 0, pi_arch, activation_fn, layer_norm, dropout))
        self.value_net = nn.Sequential(*create_mlp(features_dim, 1, vf_arch, activation_fn, layer_norm, dropout))
        pi_features = pi_arch[-1] if pi_arch else features_dim
        if isinstance(action_space, spaces.Discrete):
            self.action_net = nn.Linear(pi_features, int(action_space.n))
        else:
            action_dim = int(np.prod(action_space.shape or ()))
            self.action_net = nn.Linear(pi_features, action_dim)
            self.log_std = nn.Parameter(torch.full((action_dim,), float(log_std_init)))

        if ortho_init:
            init_orthogonal(self, gain=2**0.5)
            init_orthogonal(self.action_net, gain=0.01)
            init_orthogonal(self.value_net[-1], gain=1.0)
        self.to(device)
        self.flatten()

    def get_distribution(self, obs: Tensor) -> Distribution:
        """pi(.|s) for a batch of observations (B, *obs_shape)."""
        return self._distribution(self.policy_net(self.features_extractor(self._preprocess(obs))))

    def predict_values(self, obs: Tensor) -> Tensor:
        """V(s) for a batch of observations: (B,)."""
        return self.value_net(self.vf_features_extractor(self._preprocess(obs))).squeeze(-1)

    def evaluate_actions(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the loss needs.

        Args:
            obs: (B, *obs_shape).
            action: (B,) for Discrete, (B, *action_shape) for Box.

        Returns:
            V(s), log pi(a|s) and the entropy of pi(.|s), each (B,).
        """
        obs = self._preprocess(obs)
        features = self.features_extractor(obs)
        vf_features = features if self.share_features_extractor else self.vf_features_extractor(obs)
        distribution = self._distribution(self.policy_net(features))
        if isinstance(distribution, DiagGaussianDistribution):
            action = action.reshape(distribution.mean.shape)
        value = self.value_net(vf_features).squeeze(-1)
        return value, distribution.log_prob(action), distribution.entropy()

    @torch.no_grad()
    def act(self, obs: Tree, deterministic: bool, generator: torch.Generator | None = None) -> np.ndarray:
        """Actions (n, *action_shape) for observations (n, *obs_shape): the most probable ones, or a draw of each."""
        distribution = self.get_distribution(obs_to_tensor(obs, self.device))
        action = distribution.mode() if deterministic else distribution.sample(generator)
        return action.cpu().numpy().reshape(batch_size(obs), *(self.action_space.shape or ()))

    def forward(
        self, obs: Tensor, deterministic: bool = False, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Actions, V(s) and log pi(a|s) for a batch of observations."""
        distribution = self.get_distribution(obs)
        action = distribution.mode() if deterministic else distribution.sample(generator)
        return action, self.predict_values(obs), distribution.log_prob(action)

    def _preprocess(self, obs: Tree) -> Tree:
        return preprocess(obs, self.observation_space, self.normalize_images)

    def _distribution(self, latent: Tensor) -> Distribution:
        parameters = self.action_net(latent)
        if isinstance(self.action_space, spaces.Discrete):
            return CategoricalDistribution(parameters)
        return DiagGaussianDistribution(parameters, self.log_std)


class Actor(Trainable):
    """mu(s), in [-1, 1].

    Args:
        observation_space: Of one environment.
        action_space: A Box.
        extractor: The body in front.
        net_arch: Hidden layers.
        activation_fn: After each hidden layer.
        layer_norm: Whether to normalise before each activation.
        final_init: The last layer's weights and biases are uniform in +-`final_init`; None keeps the fan-in rule.
        normalize_images: Whether the pixels of images are divided by 255 in front of the body.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        extractor: BaseFeaturesExtractor,
        net_arch: Sequence[int],
        activation_fn: type[nn.Module],
        layer_norm: bool,
        final_init: float | None,
        normalize_images: bool,
    ) -> None:
        super().__init__()
        self.observation_space = observation_space
        self.normalize_images = normalize_images
        self.features_extractor = extractor
        action_dim = int(np.prod(action_space.shape or ()))
        layers = create_mlp(extractor.features_dim, action_dim, net_arch, activation_fn, layer_norm)
        self.mu = nn.Sequential(*layers, nn.Tanh())
        init_fan_in(self.mu)
        if final_init is not None:
            init_uniform(self.mu[-2], final_init)  # type: ignore[arg-type]

    def forward(self, obs: Tensor) -> Tensor:
        """(B, *obs_shape) -> (B, action_dim)."""
        return self.mu(self.features_extractor(preprocess(obs, self.observation_space, self.normalize_images)))


class QNetwork(nn.Module):
    """Q(s, a), with the action joining at a layer of choice.

    Args:
        features_dim: Number of the state's features.
        action_dim: Number of action dimensions.
        net_arch: Hidden layers.
        activation_fn: After each hidden layer.
        layer_norm: Whether to normalise before each activation.
        dropout: Share of each hidden layer's units that training leaves out, in [0, 1).
        action_layer: The layer whose input the action joins: 0 is the first, 1 the second (Lillicrap et al. 2015).
        final_init: As for `Actor`.
    """

    def __init__(
        self,
        features_dim: int,
        action_dim: int,
        net_arch: Sequence[int],
        activation_fn: type[nn.Module],
        layer_norm: bool,
        dropout: float,
        action_layer: int,
        final_init: float | None,
    ) -> None:
        super().__init__()
        below, above = net_arch[:action_layer], net_arch[action_layer:]
        self.state_net = nn.Sequential(*create_mlp(features_dim, 0, below, activation_fn, layer_norm, dropout))
        joined_dim = (below[-1] if below else features_dim) + action_dim
        self.q_net = nn.Sequential(*create_mlp(joined_dim, 1, above, activation_fn, layer_norm, dropout))
        init_fan_in(self)
        if final_init is not None:
            init_uniform(self.q_net[-1], final_init)  # type: ignore[arg-type]

    def forward(self, features: Tensor, action: Tensor) -> Tensor:
        """(B, features_dim), (B, action_dim) -> (B,)."""
        joined = torch.cat([self.state_net(features), action], dim=1)
        return self.q_net(joined).squeeze(-1)


class Critic(Trainable):
    """An ensemble of Q(s, a) behind one body.

    Args:
        observation_space: Of one environment.
        extractor: The body in front.
        q_networks: The members.
        normalize_images: Whether the pixels of images are divided by 255 in front of the body.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        extractor: BaseFeaturesExtractor,
        q_networks: Sequence[QNetwork],
        normalize_images: bool,
    ) -> None:
        super().__init__()
        self.observation_space = observation_space
        self.normalize_images = normalize_images
        self.features_extractor = extractor
        self.q_networks = nn.ModuleList(q_networks)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """(B, *obs_shape), (B, action_dim) -> (n_critics, B)."""
        features = self._features(obs)
        return torch.stack([q_network(features, action) for q_network in self.q_networks])

    def q1_forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """Q(s, a) of the first member only: (B,)."""
        return self.q_networks[0](self._features(obs), action)

    def _features(self, obs: Tree) -> Tensor:
        return self.features_extractor(preprocess(obs, self.observation_space, self.normalize_images))


class DeterministicActorCritic(BasePolicy):
    """mu(s), Q(s, a) and their targets, for DDPG and TD3.

    Args:
        observation_space: Box or Discrete.
        action_space: A finite Box.
        device: Where the networks live.
        net_arch: Hidden layers; a list for both networks, or ``dict(pi=[...], qf=[...])``.
        activation_fn: After each hidden layer.
        layer_norm: Whether to normalise before each activation.
        dropout: Share of each hidden layer's units that training leaves out of the critics, in [0, 1).
        n_critics: How many Q-networks.
        action_layer: Where the action joins the critic: 0 at the input, 1 at the second layer, ...; None is the second
            layer, or the input of a critic without hidden layers.
        final_init: Last layers' weights and biases are uniform in +-`final_init`; None leaves them to the fan-in rule.
        features_extractor_class: The body in front of each network; by default `CombinedExtractor` for Dict and
            Tuple observations, else `FlattenExtractor`.
        features_extractor_kwargs: Its further arguments.
        normalize_images: Whether the pixels of images are divided by 255 in front of the body; see `preprocess`.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: torch.device,
        net_arch: NetArch = (256, 256),
        activation_fn: type[nn.Module] = nn.ReLU,
        layer_norm: bool = False,
        dropout: float = 0.0,
        n_critics: int = 2,
        action_layer: int | None = 0,
        final_init: float | None = None,
        features_extractor_class: type[BaseFeaturesExtractor] | None = None,
        features_extractor_kwargs: Mapping[str, Any] | None = None,
        normalize_images: bool = True,
    ) -> None:
        super().__init__()
        self._set_spaces(observation_space, action_space, device)
        pi_arch, qf_arch = split_net_arch(net_arch, ("pi", "qf"))
        check_module_class("activation_fn", activation_fn, "torch.nn.ReLU")
        if action_layer is None:
            action_layer = min(1, len(qf_arch))
        if not isinstance(action_layer, (int, np.integer)) or not 0 <= action_layer <= len(qf_arch):
            raise ValueError(
                f"policy_kwargs: action_layer must be from 0 to {len(qf_arch)}, the critic's last layer, "
                f"not {action_layer!r}"
            )
        joins_at = int(action_layer)
        require_whole("n_critics", n_critics, 1)
        require_constant("policy_kwargs: dropout", dropout, minimum=0, below=1)
        if final_init is not None:
            require_constant("policy_kwargs: final_init", final_init, minimum=0)
        action_dim = int(np.prod(action_space.shape or ()))

        def extractor() -> BaseFeaturesExtractor:
            return make_extractor(observation_space, features_extractor_class, features_extractor_kwargs)

        def actor() -> Actor:
            body = extractor()
            return Actor(
                observation_space, action_space, body, pi_arch, activation_fn, layer_norm, final_init, normalize_images
            )

        def critic() -> Critic:
            body = extractor()

            def q_network() -> QNetwork:
                dim = body.features_dim
                return QNetwork(dim, action_dim, qf_arch, activation_fn, layer_norm, dropout, joins_at, final_init)

            return Critic(observation_space, body, [q_network() for _ in range(n_critics)], normalize_images)

        self.actor, self.critic = actor(), critic()
        self.actor_target, self.critic_target = actor(), critic()
        self.to(device)
        for network in (self.actor, self.critic, self.actor_target, self.critic_target):
            network.flatten()
        self.actor_target.load_state_dict(self.actor.state_dict())
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.eval()

    @torch.no_grad()
    def act(self, obs: Tree, deterministic: bool, generator: torch.Generator | None = None) -> np.ndarray:
        """mu(s) for observations (n, *obs_shape): (n, *action_shape). There is nothing to draw."""
        action = self.actor(obs_to_tensor(obs, self.device))
        return action.cpu().numpy().reshape(batch_size(obs), *(self.action_space.shape or ()))

    def forward(self, obs: Tensor) -> Tensor:
        """mu(s) for a batch of observations: (B, action_dim)."""
        return self.actor(obs)

    def set_training_mode(self, mode: bool) -> None:
        """As `nn.Module.train`, for actor and critic; targets always evaluate."""
        self.actor.set_training_mode(mode)
        self.critic.set_training_mode(mode)


def obs_to_tensor(obs: Tree, device: torch.device) -> Tree:
    """The door from NumPy to torch for observations: no copy where none is needed."""
    return tree_map(lambda leaf: torch.as_tensor(leaf, device=device), obs)

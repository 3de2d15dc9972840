"""Policies: a stochastic actor with a state-value critic, and a deterministic actor with action-value critics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from sbac.distributions import CategoricalDistribution, DiagGaussianDistribution, Distribution
from sbac.guards import require_number, require_whole
from sbac.networks import (
    BaseFeaturesExtractor,
    Trainable,
    create_mlp,
    default_extractor,
    init_fan_in,
    init_orthogonal,
    init_uniform,
)
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
            raise ValueError(f"net_arch needs the keys {names[0]!r} and {names[1]!r}, not {sorted(net_arch)}")
        archs = (net_arch[names[0]], net_arch[names[1]])
    else:
        archs = (net_arch, net_arch)
    if not all(isinstance(arch, Sequence) and all(isinstance(n, int) and n > 0 for n in arch) for arch in archs):
        raise ValueError(f"net_arch lists the units of each hidden layer as positive whole numbers, not {net_arch!r}")
    return list(archs[0]), list(archs[1])


class StochasticActorCritic(Trainable):
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
    ) -> None:
        super().__init__()
        self.observation_space = observation_space
        self.action_space = action_space
        self.device = device

        pi_arch, vf_arch = split_net_arch(net_arch, ("pi", "vf"))
        kwargs = dict(features_extractor_kwargs or {})
        features_extractor_class = features_extractor_class or default_extractor(observation_space)
        self.features_extractor = features_extractor_class(observation_space, **kwargs)
        self.share_features_extractor = share_features_extractor
        if share_features_extractor:
            self.vf_features_extractor = self.features_extractor
        else:
            self.vf_features_extractor = features_extractor_class(observation_space, **kwargs)

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
        return self._distribution(self.policy_net(self.features_extractor(obs)))

    def predict_values(self, obs: Tensor) -> Tensor:
        """V(s) for a batch of observations: (B,)."""
        return self.value_net(self.vf_features_extractor(obs)).squeeze(-1)

    def evaluate_actions(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the loss needs.

        Args:
            obs: (B, *obs_shape).
            action: (B,) for Discrete, (B, *action_shape) for Box.

        Returns:
            V(s), log pi(a|s) and the entropy of pi(.|s), each (B,).
        """
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

    def _distribution(self, latent: Tensor) -> Distribution:
        parameters = self.action_net(latent)
        if isinstance(self.action_space, spaces.Discrete):
            return CategoricalDistribution(parameters)
        return DiagGaussianDistribution(parameters, self.log_std)


class Actor(Trainable):
    """mu(s), in [-1, 1].

    Args:
        action_space: A Box.
        extractor: The body in front.
        net_arch: Hidden layers.
        activation_fn: After each hidden layer.
        layer_norm: Whether to normalise before each activation.
        final_init: The last layer's weights and biases are uniform in +-`final_init`; None keeps the fan-in rule.
    """

    def __init__(
        self,
        action_space: spaces.Space[Any],
        extractor: BaseFeaturesExtractor,
        net_arch: Sequence[int],
        activation_fn: type[nn.Module],
        layer_norm: bool,
        final_init: float | None,
    ) -> None:
        super().__init__()
        self.features_extractor = extractor
        action_dim = int(np.prod(action_space.shape or ()))
        layers = create_mlp(extractor.features_dim, action_dim, net_arch, activation_fn, layer_norm)
        self.mu = nn.Sequential(*layers, nn.Tanh())
        init_fan_in(self.mu)
        if final_init is not None:
            init_uniform(self.mu[-2], final_init)  # type: ignore[arg-type]

    def forward(self, obs: Tensor) -> Tensor:
        """(B, *obs_shape) -> (B, action_dim)."""
        return self.mu(self.features_extractor(obs))


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
        extractor: The body in front.
        q_networks: The members.
    """

    def __init__(self, extractor: BaseFeaturesExtractor, q_networks: Sequence[QNetwork]) -> None:
        super().__init__()
        self.features_extractor = extractor
        self.q_networks = nn.ModuleList(q_networks)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """(B, *obs_shape), (B, action_dim) -> (n_critics, B)."""
        features = self.features_extractor(obs)
        return torch.stack([q_network(features, action) for q_network in self.q_networks])

    def q1_forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """Q(s, a) of the first member only: (B,)."""
        return self.q_networks[0](self.features_extractor(obs), action)


class DeterministicActorCritic(nn.Module):
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
        action_layer: Where the action joins the critic: 0 at the input, 1 at the second layer.
        final_init: Last layers' weights and biases are uniform in +-`final_init`; None leaves them to the fan-in rule.
        features_extractor_class: The body in front of each network; by default `CombinedExtractor` for Dict and
            Tuple observations, else `FlattenExtractor`.
        features_extractor_kwargs: Its further arguments.
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
        action_layer: int = 0,
        final_init: float | None = None,
        features_extractor_class: type[BaseFeaturesExtractor] | None = None,
        features_extractor_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.observation_space = observation_space
        self.action_space = action_space
        self.device = device
        pi_arch, qf_arch = split_net_arch(net_arch, ("pi", "qf"))
        if not 0 <= action_layer <= len(qf_arch):
            raise ValueError(
                f"action_layer must be from 0 to {len(qf_arch)}, the critic's last layer, not {action_layer}"
            )
        require_whole("n_critics", n_critics, 1)
        require_number("dropout", dropout, minimum=0, below=1)
        action_dim = int(np.prod(action_space.shape or ()))

        def extractor() -> BaseFeaturesExtractor:
            make = features_extractor_class or default_extractor(observation_space)
            return make(observation_space, **dict(features_extractor_kwargs or {}))

        def actor() -> Actor:
            return Actor(action_space, extractor(), pi_arch, activation_fn, layer_norm, final_init)

        def critic() -> Critic:
            body = extractor()

            def q_network() -> QNetwork:
                dim = body.features_dim
                return QNetwork(dim, action_dim, qf_arch, activation_fn, layer_norm, dropout, action_layer, final_init)

            return Critic(body, [q_network() for _ in range(n_critics)])

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

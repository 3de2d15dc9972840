"""A deterministic actor with action-value critics, for DDPG and TD3."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from sbac.adapters import Step
from sbac.bodies import Body, NetArch, check_module_class, image_extractor, make_extractor, split_net_arch
from sbac.ensemble import Ensemble, EnsembleTrace
from sbac.guards import require_constant, require_whole
from sbac.look import Look, is_hooked
from sbac.networks import (
    BaseFeaturesExtractor,
    FlattenExtractor,
    create_mlp,
    has_nothing_to_learn,
    init_fan_in,
    init_uniform,
)
from sbac.part import Part
from sbac.perceptron import Gradient, Perceptron, Plain, Trace
from sbac.policies import BasePolicy
from sbac.preprocessing import Preprocessor, obs_to_tensor
from sbac.trainable import Trainable
from sbac.trees import Tree


class _Front:
    """What observations of an actor or a critic go through before its perceptrons, as it was when it was looked at."""

    def __init__(self) -> None:
        self._preprocessor: nn.Module | None = None
        self._look = Look()
        self._is_plain = False

    def leaves_as_it_is(self, network: Actor | Critic) -> bool:
        """Whether the perceptrons read observations as they are, but for the dtype, and nobody looks on at that."""
        preprocessor = network.preprocessor
        if self._preprocessor is not preprocessor or not self._look.is_still_so():
            body = network.features_extractor
            self._preprocessor, self._look = preprocessor, Look([network, body, preprocessor])
            is_preprocessor_plain = type(preprocessor) is Preprocessor and preprocessor.is_of_vectors
            self._is_plain = type(body) is FlattenExtractor and is_preprocessor_plain
        return self._is_plain and preprocessor.normalizer is None and not self._look.is_hooked()

    def __reduce__(self) -> tuple[type[_Front], tuple[()]]:
        return _Front, ()  # a copy of the network has a front of its own


class Actor(Trainable):
    """mu(s), in [-1, 1].

    Args:
        preprocessor: Makes observations ready for the body.
        action_space: A Box.
        extractor: The body in front.
        net_arch: Hidden layers.
        activation_fn: After each hidden layer.
        layer_norm: Whether to normalise before each activation.
        final_init: The last layer's weights and biases are uniform in +-`final_init`; None keeps the fan-in rule.
    """

    preprocessor: Preprocessor
    features_extractor = Part[BaseFeaturesExtractor]()

    def __init__(
        self,
        preprocessor: Preprocessor,
        action_space: spaces.Space[Any],
        extractor: BaseFeaturesExtractor,
        net_arch: Sequence[int],
        activation_fn: type[nn.Module],
        layer_norm: bool,
        final_init: float | None,
    ) -> None:
        super().__init__()
        # Not registered as a part: all networks of a policy have the same one, and its state is the policy's.
        object.__setattr__(self, "preprocessor", preprocessor)
        self.features_extractor = extractor
        self._front = _Front()
        action_dim = int(np.prod(action_space.shape or ()))
        layers = create_mlp(extractor.features_dim, action_dim, net_arch, activation_fn, layer_norm)
        self.mu = nn.Sequential(*layers, nn.Tanh())
        self._mu = Perceptron(self, "mu")
        init_fan_in(self.mu)
        if final_init is not None:
            init_uniform(self.mu[-2], final_init)

    def forward(self, obs: Tensor) -> Tensor:
        """(B, *obs_shape) -> (B, action_dim)."""
        return self._mu(_features(self, obs))

    def act(self, obs: Tree) -> np.ndarray | None:
        """mu(s) from array to array, for a few plain observations; None where that is left to `forward`."""
        is_plain = type(obs) is np.ndarray and type(self) is Actor and self._front.leaves_as_it_is(self)
        return self._mu.act(obs) if is_plain else None

    def evaluate(self, obs: Tree) -> tuple[Tensor, Callable[[Tensor], None]]:
        """mu(s), (B, action_dim), and the way back: a function of the gradient of a loss with respect to it."""
        features = _features_without_learning(self, obs) if type(self) is Actor and not is_hooked(self) else None
        trace = None if features is None else self._mu.trace(features)
        if trace is None:
            action = self(obs)
            return action.detach(), partial(self.back_by_autograd, (action,))

        def back(gradient: Tensor) -> None:
            trace.back(gradient, self._in_place)

        return trace.output, back


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
        self.joins_late = action_layer > 0
        below, above = net_arch[:action_layer], net_arch[action_layer:]
        self.state_net = nn.Sequential(*create_mlp(features_dim, 0, below, activation_fn, layer_norm, dropout))
        joined_dim = (below[-1] if below else features_dim) + action_dim
        self.q_net = nn.Sequential(*create_mlp(joined_dim, 1, above, activation_fn, layer_norm, dropout))
        self._state, self._q = Perceptron(self, "state_net"), Perceptron(self, "q_net")
        init_fan_in(self)
        if final_init is not None:
            init_uniform(self.q_net[-1], final_init)

    def forward(self, features: Tensor, action: Tensor) -> Tensor:
        """(B, features_dim), (B, action_dim) -> (B,)."""
        if self.joins_late:
            features = self._state(features)
        return self._q(torch.cat([features, action], dim=1)).squeeze(-1)


class QTrace:
    """What a Q-network gave, or several side by side, with the way back from it.

    Args:
        below: Of the layers that read the state only, if any.
        above: Of those that read the action too.
        action_dim: Number of action dimensions.

    Attributes:
        q: (B,), or (n_critics, B).
    """

    def __init__(self, below: Trace | EnsembleTrace | None, above: Trace | EnsembleTrace, action_dim: int) -> None:
        self._below, self._above, self._action_dim = below, above, action_dim
        self.q = above.output.squeeze(-1)

    def back(self, gradient: Tensor, into: Mapping[int, Gradient]) -> None:
        """Add to the gradients of the parameters, from that of a loss with respect to `q`."""
        of_state = None if self._below is None else slice(None, -self._action_dim)
        of_features = self._above.back(gradient.unsqueeze(-1), into, of_state)
        if self._below is not None and of_features is not None:
            self._below.back(of_features, into)

    def action_gradient(self) -> Tensor:
        """dQ/da, (B, action_dim)."""
        of_action = self._above.back(torch.ones_like(self.q).unsqueeze(-1), {}, slice(-self._action_dim, None))
        assert of_action is not None
        return of_action


class _Way(NamedTuple):
    """Through one Q-network, or through several side by side."""

    below: Plain | Ensemble | None  # layers that read the state only, if there are such
    above: Plain | Ensemble  # layers that read the action too

    def trace(self, features: Tensor, action: Tensor) -> QTrace:
        """Q(s, a), with the way back."""
        below = None if self.below is None else self.below.trace(features)
        if below is not None:
            features = below.output
            if features.dim() > action.dim():
                action = action.expand(len(features), *action.shape)
        return QTrace(below, self.above.trace(torch.cat([features, action], dim=-1)), action.shape[-1])

    def is_by_numpy(self, n_rows: int) -> bool:
        """Whether so many rows are better left to NumPy, one network after the other."""
        parts = (self.above,) if self.below is None else (self.below, self.above)
        return all(isinstance(part, Plain) and part.is_by_numpy(n_rows) for part in parts)


class _Ways(NamedTuple):
    """Through the members of a critic, as they were when they were looked at."""

    look: Look = Look()
    each: Sequence[_Way] = ()  # none where one of them is not plain
    together: _Way | None = None  # where all are of one form


def _find_ways(critic: Critic) -> _Ways:
    """See what the members of a critic are."""
    look, members = Look([*critic.modules()]), list[Any](critic.q_networks)
    if type(critic) is not Critic or any(type(member) is not QNetwork for member in members):
        return _Ways(look)
    above = [member._q.plain() for member in members]
    below = [member._state.plain() if member.joins_late else None for member in members]
    late = [part for part in below if part is not None]
    if not all(part.layers for part in (*above, *late)):
        return _Ways(look)
    each = [_Way(*parts) for parts in zip(below, above, strict=True)]
    all_above, all_below = (Ensemble.of([part.layers for part in parts]) for parts in (above, late))
    if all_above is None or (late and (all_below is None or len(late) < len(members))):
        return _Ways(look, each)
    return _Ways(look, each, _Way(all_below, all_above))


class Critic(Trainable):
    """An ensemble of Q(s, a) behind one body.

    Args:
        preprocessor: Makes observations ready for the body.
        extractor: The body in front.
        q_networks: The members.
    """

    preprocessor: Preprocessor
    features_extractor = Part[BaseFeaturesExtractor]()

    def __init__(
        self, preprocessor: Preprocessor, extractor: BaseFeaturesExtractor, q_networks: Sequence[QNetwork]
    ) -> None:
        super().__init__()
        # Not registered as a part: all networks of a policy have the same one, and its state is the policy's.
        object.__setattr__(self, "preprocessor", preprocessor)
        self.features_extractor = extractor
        self._front = _Front()
        self.q_networks = nn.ModuleList(q_networks)
        self._ways = _Ways()

    def forward(self, obs: Tree, action: Tensor) -> Tensor:
        """(B, *obs_shape), (B, action_dim) -> (n_critics, B)."""
        if not torch.is_grad_enabled():
            traces = self._traces(obs, action)
            if traces is not None:
                return _q_of(traces)
        features = _features(self, obs)
        return torch.stack([q_network(features, action) for q_network in self.q_networks])

    def evaluate(self, obs: Tree, action: Tensor) -> tuple[Tensor, Callable[[Tensor], None]]:
        """As `forward`, and the way back: a function of the gradient of a loss with respect to it, (n_critics, B)."""
        traces = self._traces(obs, action, with_way_back=True)
        if traces is None:
            q = self(obs, action)
            return q.detach(), partial(self.back_by_autograd, (q,))

        def back(gradient: Tensor) -> None:
            if traces[0].q.dim() == 2:
                traces[0].back(gradient, self._in_place)
            else:
                for k, trace in enumerate(traces):
                    trace.back(gradient[k], self._in_place)

        return _q_of(traces), back

    def action_gradient(self, obs: Tree, action: Tensor) -> tuple[Tensor, Tensor]:
        """Q(s, a) of the first member, (B,), and its gradient with respect to the action, (B, action_dim)."""
        traces = self._traces(obs, action, only_first=True)
        if traces is None:
            action = action.detach().requires_grad_()
            q = self.q1_forward(obs, action)
            return q.detach(), torch.autograd.grad(q.sum(), action)[0]
        return traces[0].q, traces[0].action_gradient()

    def q1_forward(self, obs: Tensor, action: Tensor) -> Tensor:
        """Q(s, a) of the first member only: (B,)."""
        return self.q_networks[0](_features(self, obs), action)

    def _traces(
        self, obs: Tree, action: Tensor, only_first: bool = False, with_way_back: bool = False
    ) -> list[QTrace] | None:
        """Of the members, in one where that pays; None where autograd, or somebody, has to see what they do."""
        if not self._ways.look.is_still_so():
            self._ways = _find_ways(self)
        look, each, together = self._ways
        if not (each and look.is_left_alone(with_way_back)):
            return None
        features = _features_without_learning(self, obs)
        if features is None or features.dtype is not torch.float32 or features.dim() != 2:
            return None
        if only_first:
            each = each[:1]
        elif together is not None and not each[0].is_by_numpy(len(action)):
            each = [together]
        return [way.trace(features, action) for way in each]

    def __getstate__(self) -> dict[str, Any]:
        # Without views, which would become tensors of their own in a copy.
        return {**super().__getstate__(), "_ways": _Ways()}


def _q_of(traces: Sequence[QTrace]) -> Tensor:
    """(n_critics, B)."""
    first = traces[0].q
    if len(traces) > 1:
        return torch.stack([trace.q for trace in traces])
    return first if first.dim() == 2 else first.unsqueeze(0)


def _features(network: Actor | Critic, obs: Tree) -> Tensor:
    """What the perceptrons of a network read, (B, features_dim)."""
    features = _features_without_learning(network, obs)
    return network.features_extractor(network.preprocessor(obs)) if features is None else features


def _features_without_learning(network: Actor | Critic, obs: Tree) -> Tensor | None:
    """As `_features`, where the body has nothing to learn; else None."""
    if network._front.leaves_as_it_is(network) and obs.dtype is torch.float32:
        return obs
    if not has_nothing_to_learn(network.features_extractor):
        return None
    return network.features_extractor(network.preprocessor(obs))


class DeterministicActorCritic(BasePolicy):
    """mu(s), Q(s, a) and their targets, for DDPG and TD3.

    Args:
        observation_space: Box, Discrete, MultiDiscrete, MultiBinary, or Dict and Tuple of these.
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
        features_extractor_class: The body in front of each network, a class or a module; or a dict with one for actor
            and critic, ``dict(pi=..., qf=...)``. By default `CombinedExtractor` for Dict and Tuple observations, else
            `FlattenExtractor`.
        features_extractor_kwargs: Its further arguments.
        normalize_images: Whether the pixels of images are divided by 255 in front of the body; see `preprocess`.
        channels_last: Whether images have their channels in the last dimension; None sees by the sizes.
        normalize_obs: Whether observations are normalised by their running mean and deviation.
        normalize_reward: Whether rewards are divided by the running deviation of the discounted return.
        normalizer_kwargs: Further arguments of the `Normalizer`: ``clip_obs``, ``clip_reward``, ``epsilon``, ``keys``.
    """

    actor, actor_target = Part[Actor](), Part[Actor]()
    critic, critic_target = Part[Critic](), Part[Critic]()

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
        features_extractor_class: Body | Mapping[str, Body] | None = None,
        features_extractor_kwargs: Mapping[str, Any] | None = None,
        normalize_images: bool = True,
        channels_last: bool | None = None,
        normalize_obs: bool = False,
        normalize_reward: bool = False,
        normalizer_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._set_spaces(observation_space, action_space, device)
        self.preprocessor = self._make_preprocessor(
            normalize_images, channels_last, normalize_obs, normalize_reward, normalizer_kwargs
        )
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

        def extractor(network: str) -> BaseFeaturesExtractor:
            return make_extractor(self.preprocessor.space, features_extractor_class, features_extractor_kwargs, network)

        def actor() -> Actor:
            arguments = action_space, extractor("pi"), pi_arch, activation_fn, layer_norm, final_init
            return Actor(self.preprocessor, *arguments)

        def critic() -> Critic:
            body = extractor("qf")

            def q_network() -> QNetwork:
                dim = body.features_dim
                return QNetwork(dim, action_dim, qf_arch, activation_fn, layer_norm, dropout, joins_at, final_init)

            return Critic(self.preprocessor, body, [q_network() for _ in range(n_critics)])

        self.actor, self.critic = actor(), critic()
        self.actor_target, self.critic_target = actor(), critic()
        self.to(device)
        for network in (self.actor, self.critic, self.actor_target, self.critic_target):
            network.flatten()
        self.actor_target.load_state_dict(self.actor.state_dict())
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.eval()

    def observe(self, obs: Tree, step: Step, gamma: float) -> None:
        super().observe(obs, step, gamma)
        if self.normalizer is not None:
            self.normalizer.refresh()  # replay is normalised as it is drawn

    def act(self, obs: Tree, deterministic: bool, generator: torch.Generator | None = None) -> np.ndarray:
        """mu(s) for observations (n, *obs_shape): (n, *action_shape). There is nothing to draw."""
        action = self.actor.act(obs)
        if action is None:
            with torch.no_grad():
                action = self.actor(obs_to_tensor(obs, self.device)).cpu().numpy()
        return action.reshape(len(action), *(self.action_space.shape or ()))

    def forward(self, obs: Tensor) -> Tensor:
        """mu(s) for a batch of observations: (B, action_dim)."""
        return self.actor(obs)

    def train(self, mode: bool = True) -> Self:
        """As of `nn.Module`, but for the targets, which always evaluate."""
        super().train(mode)
        self.actor_target.eval()
        self.critic_target.eval()
        return self

    def set_training_mode(self, mode: bool) -> None:
        """As `train`, but only for networks with layers to which the mode matters."""
        self.actor.set_training_mode(mode)
        self.critic.set_training_mode(mode)


class CnnDeterministicActorCritic(DeterministicActorCritic):
    """As `DeterministicActorCritic`, for observations that are one image: "CnnPolicy".

    Args:
        observation_space: An image.
        action_space: A finite Box.
        device: Where the networks live.
        features_extractor_class: The body in front of each network.
        **kwargs: As of `DeterministicActorCritic`.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: torch.device,
        features_extractor_class: Body | Mapping[str, Body] | None = None,
        **kwargs: Any,
    ) -> None:
        body = image_extractor(observation_space, features_extractor_class)
        super().__init__(observation_space, action_space, device, features_extractor_class=body, **kwargs)

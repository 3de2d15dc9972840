"""A stochastic actor-critic that remembers: an LSTM between the body and the heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from sbac.adapters import Step
from sbac.bodies import Body, NetArch, image_extractor
from sbac.buffers import RolloutBatch
from sbac.guards import require_whole
from sbac.observations import split_mask
from sbac.policies import Evaluation, StochasticActorCritic
from sbac.preprocessing import obs_to_tensor
from sbac.trees import Tree, batch_size

Memory = tuple[Tensor, Tensor]
"""What the LSTM puts out, h, and what it holds, c: (n, lstm_hidden_size) each."""


class RecurrentActorCritic(StochasticActorCritic):
    """pi(a|s_1..s_t) and V(s_1..s_t): body, LSTM, heads (Mnih et al. 2016, section 5.1, "A3C LSTM").

    Memories are zero where an episode begins. A rollout begins with the memory that the last one ended with, and
    gradients flow back through all of its steps, but not into the rollout before.

    Args:
        observation_space: As of `StochasticActorCritic`.
        action_space: As of `StochasticActorCritic`.
        device: Where the networks live.
        net_arch: Hidden layers between the LSTM and the heads.
        lstm_hidden_size: Units of the LSTM, at least 1; 256 in the paper.
        **kwargs: As of `StochasticActorCritic`. Both networks have one body and one LSTM.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: torch.device,
        net_arch: NetArch = (),
        lstm_hidden_size: int = 256,
        **kwargs: Any,
    ) -> None:
        if not kwargs.get("share_features_extractor", True) or isinstance(
            kwargs.get("features_extractor_class"), Mapping
        ):
            raise ValueError("policy_kwargs: an LSTM policy has one body: share_features_extractor must be True")
        self.lstm_hidden_size = require_whole("policy_kwargs: lstm_hidden_size", lstm_hidden_size, 1)
        super().__init__(observation_space, action_space, device, net_arch, **kwargs)
        self.begin_episodes()

    def _make_core(self, features_dim: int) -> int:
        self.lstm = nn.LSTMCell(features_dim, self.lstm_hidden_size)
        # The gate that keeps a memory begins open, so that there is something to learn from after ten steps: sigmoid(2)
        # = 0.88 (Jozefowicz et al. 2015). The gates are input, forget, cell, output.
        forget = slice(self.lstm_hidden_size, 2 * self.lstm_hidden_size)
        nn.init.constant_(self.lstm.bias_ih.detach()[forget], 2.0)
        return self.lstm_hidden_size

    # In training.

    def begin_episodes(self) -> None:
        super().begin_episodes()
        self._memory: Memory | None = None  # of the training environments; None is all zero
        self._rollout_memory: Memory | None = None  # likewise, when the rollout began

    def begin_rollout(self) -> None:
        super().begin_rollout()
        self._rollout_memory = self._memory

    def cut_episodes(self, indices: Sequence[int]) -> None:
        super().cut_episodes(indices)
        if self._memory is not None:
            goes_on = torch.ones(len(self._memory[0]), 1, device=self.device)
            goes_on[list(indices)] = 0
            self._memory = _where(goes_on, self._memory)

    def observe(self, obs: Tree, step: Step, gamma: float) -> None:
        super().observe(obs, step, gamma)
        goes_on = step.valid & ~(step.terminated | step.truncated)
        if self._memory is not None and not goes_on.all():
            self._memory = _where(torch.as_tensor(goes_on, device=self.device)[:, None], self._memory)

    @torch.no_grad()
    def act(self, obs: Tree, deterministic: bool, generator: torch.Generator | None = None) -> Tree:
        """Actions of the training environments, (n, *action_shape), each with the memory of its episode so far."""
        action, self._memory = self._act(obs, self._memory, deterministic, generator)
        return action

    def evaluate_rollout(self, batch: RolloutBatch) -> Evaluation:
        n_steps, n_envs = batch.reward.shape
        obs, mask = self._read(batch.obs)
        features = self.features_extractor(obs).view(n_steps, n_envs, -1)
        ended = (batch.terminated | batch.truncated).flatten()
        if isinstance(batch.kept, Tensor):
            ended = ended | ~batch.kept
        goes_on = (~ended).view(n_steps, n_envs, 1)

        memory = self._zeros(n_envs) if self._rollout_memory is None else self._rollout_memory
        memories = []
        for t in range(n_steps):
            memory = self.lstm(features[t], memory if t == 0 else _where(goes_on[t - 1], memory))
            memories.append(memory)
        latent = torch.stack([h for h, _ in memories])  # (T, n, lstm_hidden_size)
        distribution = self._distribution(self._pi(latent.flatten(0, 1)), mask)
        value = self._v(latent.flatten(0, 1)).squeeze(-1)
        log_prob = distribution.log_prob(self.family.flat(batch.action))

        # What followed a step is read with the memory after it.
        mode = self.training
        self.set_training_mode(False)
        with torch.no_grad():
            after = latent[batch.bootstrap_index], torch.stack([c for _, c in memories])[batch.bootstrap_index]
            obs, _ = self._read(batch.bootstrap_obs)
            next_value = self._v(self.lstm(self.features_extractor(obs), after)[0]).squeeze(-1)
        self.set_training_mode(mode)
        return self._evaluate_by_autograd((value, log_prob, distribution.entropy()), next_value)

    def get_running_state(self) -> dict[str, np.ndarray]:
        state = super().get_running_state()
        for name, memory in (("memory", self._memory), ("rollout_memory", self._rollout_memory)):
            if memory is not None:
                state[f"{name}_h"], state[f"{name}_c"] = (part.cpu().numpy() for part in memory)
        return state

    def set_running_state(self, state: Mapping[str, np.ndarray]) -> None:
        super().set_running_state(state)

        def memory(name: str) -> Memory | None:
            if f"{name}_h" not in state:
                return None
            return self._tensor(state[f"{name}_h"]), self._tensor(state[f"{name}_c"])

        self._memory, self._rollout_memory = memory("memory"), memory("rollout_memory")

    # Elsewhere: the memory is the caller's.

    @torch.no_grad()
    def act_with_state(
        self,
        obs: Tree,
        state: Any,
        episode_start: Any,
        deterministic: bool,
        generator: torch.Generator | None = None,
    ) -> tuple[Tree, Any]:
        """Actions, and the state to pass with the next observations: h and c as arrays, (n, lstm_hidden_size) each."""
        memory = None
        if state is not None:
            shape = (batch_size(split_mask(obs, self.observation_space, 0)[0]), self.lstm_hidden_size)
            shapes = [np.shape(part) for part in state]
            if shapes != [shape, shape]:
                raise ValueError(
                    f"predict: state must be h and c of shape {shape}, as predict returns them for so many rows; "
                    f"it has shapes {shapes}, and None begins anew"
                )
            memory = self._tensor(np.asarray(state[0], np.float32)), self._tensor(np.asarray(state[1], np.float32))
            if episode_start is not None:
                goes_on = torch.as_tensor(~np.asarray(episode_start, bool).reshape(-1, 1), device=self.device)
                memory = _where(goes_on, memory)
        action, (h, c) = self._act(obs, memory, deterministic, generator)
        return action, (h.cpu().numpy(), c.cpu().numpy())

    def _act(
        self, obs: Tree, memory: Memory | None, deterministic: bool, generator: torch.Generator | None
    ) -> tuple[Tree, Memory]:
        tensors, mask = self._read(obs_to_tensor(obs, self.device))
        features = self.features_extractor(tensors)
        after = self.lstm(features, self._zeros(len(features)) if memory is None else memory)
        distribution = self._distribution(self._pi(after[0]), mask)
        action = distribution.mode() if deterministic else distribution.sample(generator)
        return self.family.to_numpy(action), after

    def _actor_features(self, obs: Tree) -> Tensor:
        """As of an episode's first observation."""
        features = self.features_extractor(obs)
        return self.lstm(features, self._zeros(len(features)))[0]

    def _critic_features(self, obs: Tree) -> Tensor:
        return self._actor_features(obs)

    def _zeros(self, n: int) -> Memory:
        zeros = torch.zeros(n, self.lstm_hidden_size, device=self.device)
        return zeros, zeros

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.as_tensor(array, device=self.device)


class CnnRecurrentActorCritic(RecurrentActorCritic):
    """As `RecurrentActorCritic`, for observations that are one image: "CnnLstmPolicy".

    Args:
        observation_space: An image.
        action_space: As of `StochasticActorCritic`.
        device: Where the networks live.
        features_extractor_class: The body in front.
        **kwargs: As of `RecurrentActorCritic`.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: torch.device,
        features_extractor_class: Body | None = None,
        **kwargs: Any,
    ) -> None:
        body = image_extractor(observation_space, features_extractor_class)
        super().__init__(observation_space, action_space, device, features_extractor_class=body, **kwargs)


def _where(goes_on: Tensor, memory: Memory) -> Memory:
    """The memory where an episode goes on, (n, 1) bool, and zero elsewhere."""
    h, c = memory
    return h * goes_on, c * goes_on

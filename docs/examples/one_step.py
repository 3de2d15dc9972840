"""The one-step actor-critic, as an algorithm of one's own: Sutton and Barto 2018, section 13.5.

Derived from `BaseAlgorithm`, it has what every algorithm of sbac has: any environment, `predict`, `save` and `load`,
exact resuming, callbacks, logs and clear errors. What is written here is what is its own: arguments, loop, mathematics.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from sbac.base import BaseAlgorithm
from sbac.callbacks import MaybeCallback
from sbac.envs import EnvironmentLike, Step
from sbac.guards import require_number
from sbac.observations import check_action_space, check_observation_space
from sbac.policies import StochasticActorCritic
from sbac.preprocessing import obs_to_tensor
from sbac.schedules import FloatOrSchedule


class OneStepActorCritic(BaseAlgorithm):
    """Learns from each step at once, and remembers nothing.

    Args:
        policy: "MlpPolicy", or a policy class.
        env: An id, an environment, a factory or a list of them, or a vector environment.
        learning_rate: Step size of the optimizer, above 0; a number or a schedule.
        gamma: Discount factor, in [0, 1]; a number or a schedule.
        n_envs, stats_window_size, tensorboard_log, policy_kwargs, verbose, seed, device: As for every algorithm.
    """

    policy_aliases: ClassVar[Mapping[str, type[nn.Module]]] = {"MlpPolicy": StochasticActorCritic}
    policy: StochasticActorCritic

    def __init__(
        self,
        policy: str | type[nn.Module],
        env: EnvironmentLike,
        learning_rate: FloatOrSchedule = 1e-3,
        gamma: FloatOrSchedule = 0.99,
        n_envs: int = 1,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: Mapping[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
    ) -> None:
        # Each argument is kept under its own name: that is what a file holds.
        require_number("learning_rate", learning_rate, above=0)
        require_number("gamma", gamma, minimum=0, maximum=1)
        self.learning_rate = learning_rate
        self.gamma = gamma
        super().__init__(policy, env, n_envs, stats_window_size, tensorboard_log, policy_kwargs, verbose, seed, device)
        self.policy = self._make_policy(**self.policy_kwargs)
        self.policy.set_optimizer(torch.optim.Adam, self._now(learning_rate), None)

    def learn(
        self,
        total_timesteps: float,
        callback: MaybeCallback = None,
        log_interval: int = 10,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
        resume: bool = False,
    ) -> Self:
        with self._training(
            total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar, resume
        ) as callback:
            while self.num_timesteps < self._total_timesteps:
                callback.on_rollout_start()

                # Act: a ~ pi(.|s).
                obs = self._obs
                action = self.policy.act(obs, deterministic=False, generator=self._act_generator)

                # Step, and learn from it: `successor` is the true s', `obs` is where to act next.
                step = self.env.step(action)
                self.policy.set_learning_rate(self._now(self.learning_rate))
                with self._updating():
                    self._log(self._update(obs, action, step))
                if not self._after_step(callback, action, step):
                    break
                callback.on_rollout_end()
                self._dump_if_due(self.episodes.count)
        return self

    def _update(self, obs: Any, action: Any, step: Step) -> dict[str, Tensor]:
        """One gradient step on one transition of each of n environments."""
        reward, terminated, valid = (torch.as_tensor(x) for x in (step.reward, step.terminated, step.valid))  # (n,)
        value, log_prob, entropy = self.policy.evaluate_actions(
            obs_to_tensor(obs, self.device), torch.as_tensor(action)
        )

        # delta = r + gamma (1 - terminated) V(s') - V(s): a constant to the actor, and to the critic but for V(s).
        with torch.no_grad():
            next_value = self.policy.predict_values(obs_to_tensor(step.successor, self.device))  # (n,)
            target = reward.float() + self._now(self.gamma) * next_value.masked_fill(terminated, 0.0)  # (n,)
        delta = (target - value)[valid]

        # Actor: grad log pi(a|s) delta; critic: grad (y - V(s))^2.
        policy_loss = -(delta.detach() * log_prob[valid]).mean()
        value_loss = delta.square().mean()
        self.policy.descend(policy_loss + value_loss, max_grad_norm=0.5)

        return {"policy_loss": policy_loss, "value_loss": value_loss, "entropy_loss": -entropy[valid].mean()}

    def _check_spaces(self) -> None:
        check_action_space(self.action_space, "OneStepActorCritic")
        check_observation_space(self.observation_space, "OneStepActorCritic")

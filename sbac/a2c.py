"""A2C: Advantage Actor-Critic, the lock-step form of A3C.

Mnih et al. 2016, "Asynchronous Methods for Deep Reinforcement Learning", arXiv:1602.01783, Algorithm S3, with n
environments in one process in place of n asynchronous workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from sbac.base import BaseAlgorithm
from sbac.buffers import RolloutBatch, RolloutBuffer
from sbac.callbacks import MaybeCallback
from sbac.construction import FIXED, read_part
from sbac.envs import EnvironmentLike, Environments
from sbac.gae import explained_variance, gae
from sbac.guards import require_constant, require_flag, require_number, require_whole
from sbac.observations import check_action_space, check_observation_space
from sbac.optimization import RMSpropTFLike
from sbac.policies import CnnActorCritic, StochasticActorCritic
from sbac.recurrent import CnnRecurrentActorCritic, RecurrentActorCritic
from sbac.schedules import FloatOrSchedule


class A2C(BaseAlgorithm):
    """Advantage Actor-Critic. With `n_steps=1` it is the one-step actor-critic.

    Where it says (s), a schedule (`sbac.schedules`) or a function of the remaining progress may stand for the number.

    Args:
        policy: "MlpPolicy", "CnnPolicy" for images, "MultiInputPolicy" for Dict and Tuple observations, "auto", which
            takes the one for the observations and says why; each of the three with an LSTM: "MlpLstmPolicy",
            "CnnLstmPolicy", "MultiInputLstmPolicy"; or a policy class.
        env: An id, an environment, a factory or a list of them, or a vector environment.
        learning_rate: Step size of the optimizer, above 0 (s).
        n_steps: Steps of each environment between two updates (t_max), at least 1.
        gamma: Discount factor, in [0, 1] (s).
        gae_lambda: In [0, 1] (s). 1 gives n-step returns as in the paper, 0 the one-step TD estimate.
        ent_coef: Weight of the entropy bonus (beta), at least 0 (s).
        vf_coef: Weight of the value loss, at least 0 (s).
        max_grad_norm: Gradients are scaled down to this norm, above 0 (s); None leaves them.
        rms_prop_eps: Epsilon of RMSprop.
        use_rms_prop: RMSprop as in the paper; False takes Adam. `policy_kwargs` with ``optimizer_class`` overrides.
        normalize_advantage: Scale the advantages of each update to mean 0 and deviation 1.
        weight_decay: L2 penalty on the weights, at least 0.
        layer_norm: Whether to normalise before each activation.
        dropout: Share of the hidden units that each update leaves out, in [0, 1).
        normalize_obs: Whether observations are normalised by their running mean and deviation.
        normalize_reward: Whether rewards are divided by the running deviation of the discounted return.
        n_envs: How many environments to make from an id or a factory.
        rollout_buffer_class: Derived from `RolloutBuffer`, in its place.
        rollout_buffer_kwargs: Its further arguments.
        stats_window_size: Over how many finished episodes ``rollout/ep_rew_mean`` is taken.
        tensorboard_log: Folder for event files, or None.
        policy_kwargs: Further arguments of the policy, and ``optimizer_class``, ``optimizer_kwargs``.
        verbose: 0 is silent, 1 prints a table as training goes.
        seed: Fixes every random number, or None.
        device: "cpu", "cuda", ... or "auto".
        n_threads: Threads of torch while learning, at least 1. None takes one for networks of less than a million
            parameters, and torch's setting for larger ones.
    """

    policy_aliases: ClassVar[Mapping[str, type[nn.Module]]] = {
        "MlpPolicy": StochasticActorCritic,
        "CnnPolicy": CnnActorCritic,
        "MultiInputPolicy": StochasticActorCritic,
        "MlpLstmPolicy": RecurrentActorCritic,
        "CnnLstmPolicy": CnnRecurrentActorCritic,
        "MultiInputLstmPolicy": RecurrentActorCritic,
    }
    policy: StochasticActorCritic
    _fixed = ("n_steps", "rms_prop_eps", "use_rms_prop", *FIXED)

    def __init__(
        self,
        policy: str | type[nn.Module],
        env: EnvironmentLike,
        learning_rate: FloatOrSchedule = 7e-4,
        n_steps: int = 5,
        gamma: FloatOrSchedule = 0.99,
        gae_lambda: FloatOrSchedule = 1.0,
        ent_coef: FloatOrSchedule = 0.0,
        vf_coef: FloatOrSchedule = 0.5,
        max_grad_norm: FloatOrSchedule | None = 0.5,
        rms_prop_eps: float = 1e-5,
        use_rms_prop: bool = True,
        normalize_advantage: bool = False,
        weight_decay: float = 0.0,
        layer_norm: bool = False,
        dropout: float = 0.0,
        normalize_obs: bool = False,
        normalize_reward: bool = False,
        n_envs: int = 1,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: Mapping[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: Mapping[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        n_threads: int | None = None,
    ) -> None:
        require_number("learning_rate", learning_rate, above=0)
        self.n_steps = require_whole("n_steps", n_steps, 1)
        require_number("gamma", gamma, minimum=0, maximum=1)
        require_number("gae_lambda", gae_lambda, minimum=0, maximum=1)
        require_number("ent_coef", ent_coef, minimum=0)
        require_number("vf_coef", vf_coef, minimum=0)
        if max_grad_norm is not None:
            require_number("max_grad_norm", max_grad_norm, above=0)
        require_constant("rms_prop_eps", rms_prop_eps, above=0)
        require_constant("weight_decay", weight_decay, minimum=0)
        require_constant("dropout", dropout, minimum=0, below=1)
        self.learning_rate = learning_rate
        self.gamma = gamma
        self.gae_lambda = gae_lambda
        self.ent_coef = ent_coef
        self.vf_coef = vf_coef
        self.max_grad_norm = max_grad_norm
        self.rms_prop_eps = rms_prop_eps
        self.use_rms_prop = require_flag("use_rms_prop", use_rms_prop)
        self.normalize_advantage = require_flag("normalize_advantage", normalize_advantage)
        self.weight_decay = weight_decay
        self.layer_norm = require_flag("layer_norm", layer_norm)
        self.dropout = dropout
        self.normalize_obs = require_flag("normalize_obs", normalize_obs)
        self.normalize_reward = require_flag("normalize_reward", normalize_reward)
        self.rollout_buffer_class, self.rollout_buffer_kwargs = read_part(
            "rollout_buffer", RolloutBuffer, rollout_buffer_class, rollout_buffer_kwargs
        )
        super().__init__(
            policy, env, n_envs, stats_window_size, tensorboard_log, policy_kwargs, verbose, seed, device, n_threads
        )

        plain = {"layer_norm": layer_norm, "dropout": dropout}
        plain |= {"normalize_obs": normalize_obs, "normalize_reward": normalize_reward}
        network_kwargs: dict[str, Any] = {name: value for name, value in plain.items() if value} | self.policy_kwargs
        optimizer_class = network_kwargs.pop(
            "optimizer_class", torch.optim.RMSprop if use_rms_prop else torch.optim.Adam
        )
        optimizer_kwargs = network_kwargs.pop("optimizer_kwargs", None)
        defaults: dict[str, Any] = {"weight_decay": weight_decay} if weight_decay else {}
        if optimizer_class in (torch.optim.RMSprop, RMSpropTFLike):
            defaults |= {"alpha": 0.99, "eps": rms_prop_eps}
        elif "optimizer_class" not in self.policy_kwargs:
            defaults |= {"eps": 1e-5}
        self.policy = self._make_policy(**network_kwargs)
        self.policy.set_optimizer(optimizer_class, self._now(learning_rate), optimizer_kwargs, **defaults)
        self.rollout_buffer = self.rollout_buffer_class(
            self.n_steps,
            self.observation_space,
            self.action_space,
            device=self.device,
            n_envs=self.n_envs,
            **self.rollout_buffer_kwargs,
        )
        self._n_rollouts = 0

    def learn(
        self,
        total_timesteps: float,
        callback: MaybeCallback = None,
        log_interval: int = 100,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
        resume: bool = False,
    ) -> Self:
        with self._training(
            total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar, resume
        ) as callback:
            while self.num_timesteps < self._total_timesteps or self.rollout_buffer.pos > 0:
                if self.rollout_buffer.pos == 0:
                    callback.on_rollout_start()
                    self.policy.begin_rollout()

                # Roll out: n_steps of every environment, fewer where total_timesteps ends.
                while not self.rollout_buffer.full and self.num_timesteps < self._total_timesteps:
                    # Act: a ~ pi(.|s).
                    obs = self._obs
                    self.policy.set_training_mode(False)
                    action = self.policy.act(obs, deterministic=False, generator=self._act_generator)

                    # Step: `successor` is the true s'; `obs` is where to act next.
                    step = self.env.step(action, self._codec)
                    self.rollout_buffer.add(obs, action, step)
                    self.policy.observe(obs, step, self._now(self.gamma))
                    if not self._after_step(callback, action, step):
                        return self
                callback.on_rollout_end()

                # Learn: one gradient step from all of it.
                self.policy.set_training_mode(True)
                self.policy.set_learning_rate(self._now(self.learning_rate))
                if self.rollout_buffer.size() > 0:
                    batch = self.rollout_buffer.get()
                    batch = batch._replace(reward=self.policy.normalize_reward(batch.reward))
                    with self._updating():
                        self._log(self._update(batch))
                self.rollout_buffer.reset()
                self._n_rollouts += 1
                self._dump_if_due(self._n_rollouts)
        return self

    def _update(self, batch: RolloutBatch) -> dict[str, Tensor]:
        """One gradient step on T steps of n environments.

        Args:
            batch: obs (T n, *obs_shape), action (T n, *action_shape), reward, terminated, truncated (T, n).

        Returns:
            The losses and what tells how learning goes, as scalars.
        """
        value, log_prob, entropy, bootstrap_value, back = self.policy.evaluate_rollout(batch)  # (T n,) each; (M,)

        # A_t = sum_l (gamma lambda)^l delta_{t+l}, delta_t = r_t + gamma (1 - terminated_t) V(s_{t+1}) - V(s_t);
        # R_t = A_t + V(s_t). With lambda = 1: R_t = r_t + ... + gamma^k V(s_{t+k}), Algorithm S3.
        state_value = value.view_as(batch.reward)  # (T, n)
        next_value = state_value.roll(-1, dims=0)
        next_value[batch.bootstrap_index] = bootstrap_value
        gamma, gae_lambda = self._now(self.gamma), self._now(self.gae_lambda)
        advantage, return_ = gae(
            batch.reward, batch.terminated, batch.truncated, state_value, next_value, gamma, gae_lambda
        )
        advantage, return_ = advantage.flatten(), return_.flatten()  # (T n,)
        if self.normalize_advantage and len(kept := advantage[batch.kept]) > 1:
            advantage = (advantage - kept.mean()) / (kept.std() + 1e-8)

        # Means over the transitions, of which each has its share.
        share, error = batch.share, value - return_  # (T n,)
        of_log_prob, weighted_error = -share * advantage, share * error
        policy_loss = of_log_prob.dot(log_prob)
        entropy_loss = -share.dot(entropy)
        value_loss = weighted_error.dot(error)
        ent_coef, vf_coef = self._now(self.ent_coef), self._now(self.vf_coef)
        loss = policy_loss + ent_coef * entropy_loss + vf_coef * value_loss

        # dtheta: grad log pi(a_t|s_t) A_t + beta grad H(pi(.|s_t)); dtheta_v: grad (R_t - V(s_t))^2
        of_value, of_entropy = 2 * vf_coef * weighted_error, -ent_coef * share
        max_grad_norm = None if self.max_grad_norm is None else self._now(self.max_grad_norm)
        grad_norm = self.policy.descend(loss, max_grad_norm, partial(back, of_value, of_log_prob, of_entropy))

        return {
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "entropy_loss": entropy_loss,
            "grad_norm": grad_norm,
            "explained_variance": explained_variance(value[batch.kept], return_[batch.kept]),
        }

    def _begin_run(self) -> None:
        super()._begin_run()
        self._n_rollouts = 0

    def _start_episodes(self, env: Environments) -> None:
        super()._start_episodes(env)
        self.rollout_buffer.reset()

    def _check_spaces(self) -> None:
        check_action_space(self.action_space, "A2C")
        check_observation_space(self.observation_space, "A2C")

    def _buffers(self) -> dict[str, Any]:
        return {"rollout_buffer": self.rollout_buffer}

    def _record_more(self) -> None:
        self.logger.record("time/iterations", self._n_rollouts)
        self.logger.record("train/learning_rate", self._now(self.learning_rate))
        if hasattr(self.policy, "log_std"):
            self.logger.record("train/std", float(self.policy.log_std.detach().exp().mean()))

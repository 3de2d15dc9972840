"""TD3: Twin Delayed Deep Deterministic policy gradient.

Fujimoto et al. 2018, "Addressing Function Approximation Error in Actor-Critic Methods", arXiv:1802.09477, Algorithm 1.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from sbac.base import BaseAlgorithm
from sbac.buffers import ReplayBatch, ReplayBuffer
from sbac.callbacks import MaybeCallback
from sbac.construction import FIXED, read_part
from sbac.deterministic import Actor, CnnDeterministicActorCritic, Critic, DeterministicActorCritic
from sbac.envs import EnvironmentLike, Environments, Step
from sbac.guards import (
    read_train_freq,
    require_constant,
    require_flag,
    require_number,
    require_whole,
    warn_if_nothing_is_learned,
)
from sbac.noise import ActionNoise, NormalActionNoise
from sbac.observations import check_finite_box, check_observation_space
from sbac.schedules import FloatOrSchedule


class TD3(BaseAlgorithm):
    """Twin Delayed DDPG: twin critics, delayed actor and targets, smoothed target actions.

    The defaults are those of the author's later code, but for `learning_starts`, which is 25 000 there.

    Where it says (s), a schedule (`sbac.schedules`) or a function of the remaining progress may stand for the number.

    Args:
        policy: "MlpPolicy", "CnnPolicy" for images, "MultiInputPolicy" for Dict and Tuple observations, "auto", which
            takes the one for the observations and says why, or a policy class.
        env: An id, an environment, a factory or a list of them, or a vector environment. Actions: a finite Box.
        learning_rate: Of both networks, above 0 (s); None leaves it to `actor_learning_rate` and
            `critic_learning_rate`.
        buffer_size: Transitions that the replay buffer keeps.
        learning_starts: Transitions collected, by uniformly random actions, before the first gradient step.
        batch_size: Transitions of a gradient step.
        tau: Share of the network that goes into its target at each update of the targets, in [0, 1] (s).
        gamma: Discount factor, in [0, 1] (s).
        train_freq: Steps of the vector environment between two times of learning, at least 1; or ``(n, "episode")``.
        gradient_steps: Gradient steps at each time of learning; -1 makes as many as there were transitions since.
        action_noise: Added to the actor's actions, in units of [-1, 1]. "normal" has sigma 0.1; None leaves it out.
        policy_delay: Gradient steps of the critics for each of the actor and the targets (d), at least 1.
        target_policy_noise: Deviation of the noise on the target action, in units of [-1, 1], at least 0 (s).
        target_noise_clip: That noise is clipped to this size (c), at least 0 (s).
        n_steps: Over how many steps a target sums rewards before it asks the critic, at least 1.
        actor_learning_rate: Step size of the actor, above 0 (s).
        critic_learning_rate: Step size of the critic, above 0 (s).
        target_update_interval: Updates of the actor between two updates of the targets, at least 1. With `tau` 1, the
            hard update of DQN.
        n_critics: Critics; targets take the least of them. The paper has 2.
        optimizer_class: Of both networks; Adam in the paper.
        weight_decay: L2 penalty on the critics' weights, at least 0.
        max_grad_norm: Gradients of each network are scaled down to this norm, above 0 (s); None leaves them.
        layer_norm: Whether to normalise before each activation, in both networks.
        dropout: Share of the critics' hidden units that training leaves out, in [0, 1).
        normalize_obs: Whether observations are normalised by their running mean and deviation, as they are drawn.
        normalize_reward: Whether rewards are divided by the running deviation of the discounted return, likewise.
        preset: "paper": 400 and 300 units, batches of 100, learning rates of 1e-3. Arguments given beside it win.
        n_envs: How many environments to make from an id or a factory.
        replay_buffer_class: Derived from `ReplayBuffer`, in its place.
        replay_buffer_kwargs: Its further arguments.
        stats_window_size: Over how many finished episodes ``rollout/ep_rew_mean`` is taken.
        tensorboard_log: Folder for event files, or None.
        policy_kwargs: Further arguments of the policy, and ``optimizer_kwargs``; by default two layers of 256 units.
        verbose: 0 is silent, 1 prints a table as training goes.
        seed: Fixes every random number, or None.
        device: "cpu", "cuda", ... or "auto".
        n_threads: Threads of torch while learning, at least 1. None takes one for networks of less than a million
            parameters, and torch's setting for larger ones.
    """

    policy_aliases: ClassVar[Mapping[str, type[nn.Module]]] = {
        "MlpPolicy": DeterministicActorCritic,
        "CnnPolicy": CnnDeterministicActorCritic,
        "MultiInputPolicy": DeterministicActorCritic,
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {
            "actor_learning_rate": 1e-3,
            "critic_learning_rate": 1e-3,
            "batch_size": 100,
            "policy_kwargs": {"net_arch": (400, 300)},
        },
    }
    policy: DeterministicActorCritic
    _fixed: ClassVar[Sequence[str]] = ("buffer_size", "train_freq", "n_steps", "n_critics", *FIXED)
    _shorthands: ClassVar[Mapping[str, Sequence[str]]] = {
        "learning_rate": ("actor_learning_rate", "critic_learning_rate")
    }

    def __init__(
        self,
        policy: str | type[nn.Module],
        env: EnvironmentLike,
        learning_rate: FloatOrSchedule | None = None,
        buffer_size: int = 1_000_000,
        learning_starts: int = 1_000,
        batch_size: int = 256,
        tau: FloatOrSchedule = 0.005,
        gamma: FloatOrSchedule = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = -1,
        action_noise: ActionNoise | str | None = "normal",
        policy_delay: int = 2,
        target_policy_noise: FloatOrSchedule = 0.2,
        target_noise_clip: FloatOrSchedule = 0.5,
        n_steps: int = 1,
        actor_learning_rate: FloatOrSchedule = 3e-4,
        critic_learning_rate: FloatOrSchedule = 3e-4,
        target_update_interval: int = 1,
        n_critics: int = 2,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        weight_decay: float = 0.0,
        max_grad_norm: FloatOrSchedule | None = None,
        layer_norm: bool = False,
        dropout: float = 0.0,
        normalize_obs: bool = False,
        normalize_reward: bool = False,
        preset: str | None = None,
        n_envs: int = 1,
        replay_buffer_class: type[ReplayBuffer] | None = None,
        replay_buffer_kwargs: Mapping[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: Mapping[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        n_threads: int | None = None,
    ) -> None:
        if learning_rate is not None:
            require_number("learning_rate", learning_rate, above=0)
            actor_learning_rate = critic_learning_rate = learning_rate
        require_number("actor_learning_rate", actor_learning_rate, above=0)
        require_number("critic_learning_rate", critic_learning_rate, above=0)
        self.buffer_size = require_whole("buffer_size", buffer_size, 1)
        self.learning_starts = require_whole("learning_starts", learning_starts, 0)
        self.batch_size = require_whole("batch_size", batch_size, 1)
        if self.buffer_size < max(self.learning_starts, self.batch_size):
            raise ValueError(
                f"buffer_size={self.buffer_size} can never hold the {max(self.learning_starts, self.batch_size)} "
                f"transitions that learning_starts={learning_starts} and batch_size={batch_size} ask for"
            )
        require_number("tau", tau, minimum=0, maximum=1)
        require_number("gamma", gamma, minimum=0, maximum=1)
        self.train_freq = train_freq
        self._train_interval, self._train_every = read_train_freq(train_freq)
        self.gradient_steps = require_whole("gradient_steps", gradient_steps, -1)
        self.n_steps = require_whole("n_steps", n_steps, 1)
        self.policy_delay = require_whole("policy_delay", policy_delay, 1)
        require_number("target_policy_noise", target_policy_noise, minimum=0)
        require_number("target_noise_clip", target_noise_clip, minimum=0)
        self.target_update_interval = require_whole("target_update_interval", target_update_interval, 1)
        require_constant("weight_decay", weight_decay, minimum=0)
        require_constant("dropout", dropout, minimum=0, below=1)
        if max_grad_norm is not None:
            require_number("max_grad_norm", max_grad_norm, above=0)
        self.actor_learning_rate = actor_learning_rate
        self.critic_learning_rate = critic_learning_rate
        self.tau = tau
        self.gamma = gamma
        self.target_policy_noise = target_policy_noise
        self.target_noise_clip = target_noise_clip
        self.n_critics = n_critics
        self.optimizer_class = optimizer_class
        self.weight_decay = weight_decay
        self.max_grad_norm = max_grad_norm
        self.layer_norm = require_flag("layer_norm", layer_norm)
        self.dropout = dropout
        self.normalize_obs = require_flag("normalize_obs", normalize_obs)
        self.normalize_reward = require_flag("normalize_reward", normalize_reward)
        self.preset = preset
        self.replay_buffer_class, self.replay_buffer_kwargs = read_part(
            "replay_buffer", ReplayBuffer, replay_buffer_class, replay_buffer_kwargs
        )
        super().__init__(
            policy, env, n_envs, stats_window_size, tensorboard_log, policy_kwargs, verbose, seed, device, n_threads
        )

        # Networks mu, Q_1, Q_2 and their targets.
        plain = {"n_critics": n_critics, "layer_norm": layer_norm, "dropout": dropout}
        plain |= {"normalize_obs": normalize_obs, "normalize_reward": normalize_reward}
        network_kwargs: dict[str, Any] = {**plain, **self.policy_kwargs}
        optimizer_class = network_kwargs.pop("optimizer_class", optimizer_class)
        optimizer_kwargs = network_kwargs.pop("optimizer_kwargs", None)
        critic_defaults = {"weight_decay": weight_decay} if weight_decay else {}
        self.policy = self._make_policy(**network_kwargs)
        self.actor.set_optimizer(optimizer_class, self._now(actor_learning_rate), optimizer_kwargs)
        critic_rate = self._now(critic_learning_rate)
        self.critic.set_optimizer(optimizer_class, critic_rate, optimizer_kwargs, **critic_defaults)

        # Replay buffer B and exploration noise eps.
        self.replay_buffer = self.replay_buffer_class(
            self.buffer_size,
            self.observation_space,
            self.action_space,
            device=self.device,
            n_envs=self.n_envs,
            generator=self.generator,
            n_steps=self.n_steps,
            **self.replay_buffer_kwargs,
        )
        if self.env is not None:
            self.replay_buffer.attach(self.env)
        if action_noise == "normal":
            action_noise = NormalActionNoise(mean=0.0, sigma=0.1)
        elif not (action_noise is None or isinstance(action_noise, ActionNoise)):
            raise ValueError(f"action_noise must be an ActionNoise, 'normal' or None, not {action_noise!r}")
        self.action_noise = action_noise
        self._steps_since = 0  # steps of the vector environment, or episodes, since the last time of learning
        self._transitions_since = 0
        self._n_transitions = 0  # collected since learning began

    def learn(
        self,
        total_timesteps: float,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
        resume: bool = False,
    ) -> Self:
        with self._training(
            total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar, resume
        ) as callback:
            warn_if_nothing_is_learned(
                self.replay_buffer.size(),
                int(total_timesteps),
                self.learning_starts,
                first_after=self._train_interval * self.n_envs if self._train_every == "step" else 1,
            )
            self._learn()  # what a run that was stopped still owes
            self._dump_if_due(self.episodes.count)
            while self.num_timesteps < self._total_timesteps:
                callback.on_rollout_start()

                # Act: uniformly at first, then a = clip(mu(s) + eps, -1, 1).
                obs = self._obs
                action = self._explore(obs)  # (n_envs, *action_shape)

                # Step: `successor` is the true s'; `obs` is where to act next.
                step = self.env.step(action)
                self._remember(obs, action, step)
                if not self._after_step(callback, action, step):
                    break
                callback.on_rollout_end()

                # Learn: by default one gradient step for each transition, once learning_starts are there.
                self._learn()
                self._dump_if_due(self.episodes.count)
        return self

    def _explore(self, obs: np.ndarray) -> np.ndarray:
        """What to do while learning, (n_envs, *action_shape) in [-1, 1]."""
        shape = (self.n_envs, *(self.action_space.shape or ()))
        if self.n_updates == 0 and self.replay_buffer.size() < self.learning_starts:
            return self.generator.uniform(-1, 1, size=shape).astype(np.float32)
        self.policy.set_training_mode(False)
        action = self.policy.act(obs, deterministic=True)
        if self.action_noise is not None:
            action = (action + self.action_noise().reshape(shape)).clip(-1, 1)
        return action

    def _remember(self, obs: np.ndarray, action: np.ndarray, step: Step) -> None:
        """Store the transitions, and begin the noise anew where an episode ended."""
        self.replay_buffer.add(obs, action, step)
        self.policy.observe(obs, step, self._now(self.gamma))
        if self._can_learn():
            n_transitions = int(np.count_nonzero(step.valid))
            n_ended = int(np.count_nonzero(step.terminated | step.truncated))
            self._steps_since += n_ended if self._train_every == "episode" else 1
            self._transitions_since += n_transitions
            self._n_transitions += n_transitions
        ended = step.terminated | step.truncated | ~step.valid
        if self.action_noise is not None and ended.any():
            self.action_noise.reset(np.flatnonzero(ended))

    def _can_learn(self) -> bool:
        """Whether the buffer holds more than learning_starts transitions, or all that it can."""
        return self.replay_buffer.full or self.replay_buffer.size() > self.learning_starts

    def _learn(self) -> None:
        """The gradient steps that are due."""
        if self._steps_since >= self._train_interval and self._can_learn():
            self.train(self._transitions_since if self.gradient_steps < 0 else self.gradient_steps)
            self._steps_since = self._transitions_since = 0

    def train(self, gradient_steps: int, batch_size: int | None = None) -> None:
        """Learn from what the replay buffer holds, without acting.

        Args:
            gradient_steps: How many gradient steps to make.
            batch_size: Transitions of each; by default that of the constructor.
        """
        self.actor.set_learning_rate(self._now(self.actor_learning_rate))
        self.critic.set_learning_rate(self._now(self.critic_learning_rate))
        self.policy.set_training_mode(True)
        for _ in range(gradient_steps):
            batch = self.replay_buffer.sample(batch_size or self.batch_size, self._now(self.gamma), self._progress())
            batch = batch._replace(reward=self.policy.normalize_reward(batch.reward))
            with self._updating():
                numbers = self._update(batch)
            self.replay_buffer.update_priorities(batch, numbers["td_error"])
            self._log(numbers)

    def _update(self, batch: ReplayBatch) -> dict[str, Tensor]:
        """One gradient step of the critics; every `policy_delay` of them, one of the actor and the targets too.

        Args:
            batch: obs and successor (B, *obs_shape), action (B, act_dim), reward, discount, terminated, weight (B,).

        Returns:
            The losses, and what tells how learning goes, of which the log takes means: ``q_mean`` (n_critics, B),
            ``target_mean`` and ``td_error`` (B,).
        """
        actor, critic = self.actor, self.critic
        actor_target, critic_target = self.actor_target, self.critic_target
        max_grad_norm = None if self.max_grad_norm is None else self._now(self.max_grad_norm)
        n = len(batch.reward)  # B

        # Critics: y = r + gamma (1 - terminated) min_i Q'_i(s', clip(mu'(s') + clip(eps, -c, c), -1, 1)), minimise
        # sum_i (Q_i(s, a) - y)^2. The batch brings gamma, or with n-step returns its power, and weights, which are 1
        # unless replay is prioritised.
        with torch.no_grad():
            clip = self._now(self.target_noise_clip)
            # Drawn on the CPU, whose generator is the model's own during an update.
            sigma = float(self._now(self.target_policy_noise))
            eps = torch.normal(0.0, sigma, batch.action.shape).to(self.device)
            next_action = (actor_target(batch.successor) + eps.clamp(-clip, clip)).clamp(-1, 1)  # (B, act_dim)
            next_q = critic_target(batch.successor, next_action).amin(0)  # (B,)
            target = batch.reward + batch.discount * (1 - batch.terminated) * next_q  # (B,)
        q, back = critic.evaluate(batch.obs, batch.action)  # (n_critics, B)
        td_error = q - target  # (n_critics, B)
        weighted = batch.weight * td_error
        critic_loss = (weighted * td_error).sum() / n
        of_q = weighted * (2 / n)  # d critic_loss / d Q_i(s, a)
        critic.descend(critic_loss, max_grad_norm, partial(back, of_q))
        numbers = {
            "critic_loss": critic_loss,
            "q_mean": q,
            "target_mean": target,
            "td_error": td_error.abs().amax(0),
        }

        n_critic_steps = self.n_updates + 1
        if n_critic_steps % self.policy_delay == 0:
            # Actor: maximise Q_1(s, mu(s)), along the mean of grad_a Q_1(s, a)|a=mu(s) grad mu(s).
            action, back = actor.evaluate(batch.obs)  # (B, act_dim)
            actor_q, of_action = critic.action_gradient(batch.obs, action)  # (B,), (B, act_dim)
            actor_loss = -actor_q.mean()
            with critic.undone_on_error():
                actor.descend(actor_loss, max_grad_norm, partial(back, of_action / -n))
            numbers["actor_loss"] = actor_loss

            # Targets: theta' <- tau theta + (1 - tau) theta'.
            if n_critic_steps // self.policy_delay % self.target_update_interval == 0:
                tau = self._now(self.tau)
                critic_target.follow(critic, tau)
                actor_target.follow(actor, tau)
        return numbers

    def _start_episodes(self, env: Environments) -> None:
        super()._start_episodes(env)
        if self.action_noise is not None:
            self.action_noise.reset()

    @property
    def action_noise(self) -> ActionNoise | None:
        """The exploration noise: a copy of what is assigned, bound to the environments and the model's generator."""
        return self._action_noise

    @action_noise.setter
    def action_noise(self, action_noise: ActionNoise | None) -> None:
        noise = copy.deepcopy(action_noise)
        if noise is not None:
            noise.bind(self.n_envs, (int(np.prod(self.action_space.shape or ())),), self.generator)
        self._action_noise = noise

    @property
    def learning_rate(self) -> FloatOrSchedule | None:
        """The step size of both networks, or None where they differ."""
        return self.actor_learning_rate if self.actor_learning_rate == self.critic_learning_rate else None

    @learning_rate.setter
    def learning_rate(self, learning_rate: FloatOrSchedule) -> None:
        require_number("learning_rate", learning_rate, above=0)
        self.actor_learning_rate = self.critic_learning_rate = learning_rate

    @property
    def actor(self) -> Actor:
        """mu."""
        return self.policy.actor

    @property
    def critic(self) -> Critic:
        """Q_1, Q_2."""
        return self.policy.critic

    @property
    def actor_target(self) -> Actor:
        """mu'."""
        return self.policy.actor_target

    @property
    def critic_target(self) -> Critic:
        """Q'_1, Q'_2."""
        return self.policy.critic_target

    def _check_spaces(self) -> None:
        check_finite_box(self.action_space, "TD3")
        check_observation_space(self.observation_space, "TD3")

    def _record_more(self) -> None:
        record = self.logger.record
        if self.learning_rate is not None:
            record("train/learning_rate", self._now(self.learning_rate))
        else:
            record("train/actor_learning_rate", self._now(self.actor_learning_rate))
            record("train/critic_learning_rate", self._now(self.critic_learning_rate))
        if self._n_transitions:
            record("train/updates_per_transition", self.n_updates / self._n_transitions)
        record("rollout/action_saturation", self.replay_buffer.saturation())
        if self.action_noise is not None and self.action_noise.scale is not None:
            record("rollout/noise_scale", self.action_noise.scale)

    def _buffers(self) -> dict[str, Any]:
        return {"replay_buffer": self.replay_buffer}

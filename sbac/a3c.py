"""A3C: Asynchronous Advantage Actor-Critic.

Mnih et al. 2016, "Asynchronous Methods for Deep Reinforcement Learning", arXiv:1602.01783, Algorithm S3.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from sbac import checkpoint
from sbac.base import BaseAlgorithm
from sbac.buffers import RolloutBatch, RolloutBuffer
from sbac.callbacks import BaseCallback, MaybeCallback
from sbac.construction import read_part
from sbac.envs import EnvironmentLike, Environments, Spaces, make_environments
from sbac.gae import explained_variance, gae
from sbac.guards import require_constant, require_flag, require_number, require_whole
from sbac.normalization import Ledger
from sbac.observations import check_action_space, check_observation_space
from sbac.optimization import RMSpropTFLike
from sbac.policies import CnnActorCritic, StochasticActorCritic
from sbac.recurrent import CnnRecurrentActorCritic, RecurrentActorCritic
from sbac.remote import RemoteEnvironments, go_on, worker_state
from sbac.schedules import FloatOrSchedule
from sbac.traits import freeze, frozen_parameters
from sbac.transport import Report, SharedMemory, SharedMemoryTransport, Transport
from sbac.workers import Workers, WorkerStates, usable_cores

_READ_BY_WORKERS = ("learning_rate", "n_steps", "gamma", "gae_lambda", "ent_coef", "vf_coef", "max_grad_norm")


def actor_learner(model: A3C, env: Environments, shared: Transport) -> None:
    """One worker: Mnih et al. 2016, Algorithm S3, from "repeat" to "until T > T_max".

    Args:
        model: With the worker's own weights theta' and its own random numbers.
        env: The worker's environments, n.
        shared: The weights theta of all workers, and the count T of their transitions.
    """
    policy, rollout = model.policy, model.rollout_buffer
    while (budget := shared.begin()) > 0:
        # Synchronise: theta' <- theta.
        shared.pull(policy)

        # Roll out: a ~ pi(.|s; theta') until s is terminal or t - t_start = t_max; fewer steps where T_max is near.
        rollout.reset()
        policy.begin_rollout()
        policy.set_training_mode(False)
        model.num_timesteps = shared.count()
        has_ended = False
        while not (rollout.full or has_ended or rollout.pos * env.num_envs >= budget):
            obs = model._obs
            action = policy.act(obs, deterministic=False, generator=model._act_generator)
            step = env.step(action, model._codec)
            rollout.add(obs, action, step)
            policy.observe(obs, step, model._now(model.gamma))
            model._obs = step.obs
            model.num_timesteps += env.num_envs
            ended = step.terminated | step.truncated
            model.episodes.add(step, ended, seconds=0.0)
            shared.observe(step.reward, ended, step.infos)
            # Among several environments, episodes end at different times: the rollout goes on.
            has_ended = env.num_envs == 1 and bool(ended[0])

        # Accumulate: dtheta <- the gradient of the loss over the rollout.
        policy.set_training_mode(True)
        model.num_timesteps = shared.count() + rollout.size()
        batch = rollout.get()
        with model._glance.at(policy, model):
            numbers = model._gradient(batch._replace(reward=policy.normalize_reward(batch.reward)))

        # Update: theta <- theta - eta dtheta / sqrt(g + eps), asynchronously: nobody waits for anybody.
        shared.push(policy, model._now(model.learning_rate))
        shared.report(rollout.size(), numbers)


class A3C(BaseAlgorithm):
    """Asynchronous Advantage Actor-Critic: worker processes that share one set of weights without locks.

    Where it says (s), a schedule (`sbac.schedules`) or a function of the remaining progress may stand for the number.

    Args:
        policy: "MlpPolicy", "CnnPolicy" for images, "MultiInputPolicy" for Dict and Tuple observations, "auto", which
            takes the one for the observations and says why; each of the three with an LSTM: "MlpLstmPolicy",
            "CnnLstmPolicy", "MultiInputLstmPolicy"; or a policy class.
        env: An id, or a function that makes an environment. Each worker makes its own.
        learning_rate: Step size of the optimizer (eta), above 0 (s), over the transitions of all workers.
        n_steps: Steps of an environment between two updates of its worker at most (t_max), at least 1.
        gamma: Discount factor, in [0, 1] (s).
        gae_lambda: In [0, 1] (s). 1 gives n-step returns as in the paper, 0 the one-step TD estimate.
        ent_coef: Weight of the entropy bonus (beta), at least 0 (s); 0.01 in the paper.
        vf_coef: Weight of the value loss, at least 0 (s).
        max_grad_norm: Gradients are scaled down to this norm, above 0 (s); None leaves them.
        rms_prop_eps: Epsilon of RMSprop.
        use_rms_prop: RMSprop with shared statistics as in the paper; False takes Adam, shared too. `policy_kwargs`
            with ``optimizer_class`` overrides.
        normalize_advantage: Scale the advantages of each update to mean 0 and deviation 1.
        weight_decay: L2 penalty on the weights, at least 0.
        layer_norm: Whether to normalise before each activation.
        dropout: Share of the hidden units that each update leaves out, in [0, 1).
        normalize_obs: Whether observations are normalised by their running mean and deviation, over all workers.
        normalize_reward: Whether rewards are divided by the running deviation of the discounted return, likewise.
        n_workers: Worker processes, at least 1; None takes one for each core that this process may use.
        n_envs: Environments of each worker. One is as in the paper: its rollouts end where its episodes do.
        deterministic: Run the workers in turn, one rollout each: the same seed gives the same weights, bit for bit, at
            the price of the parallel work.
        max_worker_restarts: How many workers that raise, die or hang are replaced in one call of `learn`.
        worker_timeout: Seconds without a step after which a worker counts as hanging, above 0. Starting may take a
            minute at least, and longer where several workers share a core.
        rollout_buffer_class: Derived from `RolloutBuffer`, in its place.
        rollout_buffer_kwargs: Its further arguments.
        stats_window_size: Over how many finished episodes ``rollout/ep_rew_mean`` is taken.
        tensorboard_log: Folder for event files, or None.
        policy_kwargs: Further arguments of the policy, and ``optimizer_class``, ``optimizer_kwargs``.
        verbose: 0 is silent, 1 prints a table as training goes.
        seed: Fixes every random number of each worker, or None. Only `deterministic` fixes their order too.
        device: "cpu" or "auto": workers compute on the CPU.
    """

    policy_aliases: ClassVar[Mapping[str, type[nn.Module]]] = {
        "MlpPolicy": StochasticActorCritic,
        "CnnPolicy": CnnActorCritic,
        "MultiInputPolicy": StochasticActorCritic,
        "MlpLstmPolicy": RecurrentActorCritic,
        "CnnLstmPolicy": CnnRecurrentActorCritic,
        "MultiInputLstmPolicy": RecurrentActorCritic,
    }
    learns_elsewhere = True
    policy: StochasticActorCritic
    env: RemoteEnvironments  # type: ignore[assignment]  # it knows the spaces, and has nothing to step
    _fixed = ("use_rms_prop", "layer_norm", "normalize_obs", "normalize_reward", "n_envs", "n_workers")

    def __init__(
        self,
        policy: str | type[nn.Module],
        env: EnvironmentLike,
        learning_rate: FloatOrSchedule = 7e-4,
        n_steps: int = 5,
        gamma: FloatOrSchedule = 0.99,
        gae_lambda: FloatOrSchedule = 1.0,
        ent_coef: FloatOrSchedule = 0.01,
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
        n_workers: int | None = None,
        n_envs: int = 1,
        deterministic: bool = False,
        max_worker_restarts: int = 10,
        worker_timeout: float = 60.0,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: Mapping[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: Mapping[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
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
        require_constant("worker_timeout", worker_timeout, above=0)
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
        self.n_workers = usable_cores() if n_workers is None else require_whole("n_workers", n_workers, 1)
        self.deterministic = require_flag("deterministic", deterministic)
        self.max_worker_restarts = require_whole("max_worker_restarts", max_worker_restarts, 0)
        self.worker_timeout = float(worker_timeout)
        self.rollout_buffer_class, self.rollout_buffer_kwargs = read_part(
            "rollout_buffer", RolloutBuffer, rollout_buffer_class, rollout_buffer_kwargs
        )
        super().__init__(policy, env, n_envs, stats_window_size, tensorboard_log, policy_kwargs, verbose, seed, device)
        if self.device.type != "cpu":
            raise ValueError(f"A3C's workers compute on the CPU: device must be 'auto' or 'cpu', not {device!r}")

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
        self._n_launches = 0  # workers started, so that none repeats another's random numbers
        self._worker_steps = np.zeros(self.n_workers, dtype=np.int64)  # since the last row of the log
        self._worker_restarts = 0
        self._worker_states = WorkerStates(self.n_workers)
        self._row_time = 0.0
        self._sent: dict[str, Any] = {}  # arguments, as the workers have them

    def learn(
        self,
        total_timesteps: float,
        callback: MaybeCallback = None,
        log_interval: int = 1000,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
        resume: bool = False,
    ) -> Self:
        with self._training(
            total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar, resume
        ) as callback:
            # The weights, the optimizer's statistics and the count live in shared memory while workers learn.
            first_step, first_update, first_rollout = self.num_timesteps, self.n_updates, self._n_rollouts
            shared = self.policy.state_tensors()
            normalizer = self.policy.normalizer
            if normalizer is not None and self.n_workers > 1 and not self.deterministic:
                shared["ledger"] = Ledger.blank(self.n_workers, normalizer.moments)
            memory = SharedMemory.holding(shared, self.n_workers, first_step)
            self._worker_steps[:], self._row_time = 0, time.perf_counter()
            try:
                workers = self._start_workers(memory)
                try:
                    goes_on = True
                    while goes_on and self.num_timesteps < self._total_timesteps:
                        reports, goes_on = workers.reports(callback.on_idle)
                        self._n_launches, self._worker_restarts = workers.launches, workers.restarts
                        if reports:
                            # Callbacks see the weights as they are now; nothing here ever moves them.
                            memory.copy_to(self.policy.state_tensors())
                        for report in reports:
                            self._count(report)
                        for report in reports:
                            goes_on = goes_on and self._tell(callback, report)
                        self._warn_of_changes()
                        if not reports:
                            goes_on = goes_on and callback.on_idle()
                        self._dump_if_due(self._n_rollouts)
                    if goes_on:
                        reports, goes_on = workers.finish(callback.on_idle)
                        for report in reports:
                            self._count(report)
                finally:
                    self._worker_states.running = None
                    try:
                        for report in workers.stop():
                            self._count(report)
                    finally:
                        memory.copy_to(self.policy.state_tensors())
                        ledger = memory.ledger()
                        if normalizer is not None and ledger is not None:
                            normalizer.moments.copy_(torch.as_tensor(ledger.total()))
                        self.num_timesteps = first_step + workers.steps
                        self.n_updates = first_update + workers.updates
                        self._n_rollouts = first_rollout + workers.updates
                        if self.deterministic and self.num_timesteps < self._total_timesteps:
                            self._worker_states.warn_of_missing()
            finally:
                memory.close()
            self._do_deferred()  # a checkpoint, say, where a callback ended the training: it has where all workers are
        return self

    def _gradient(self, batch: RolloutBatch) -> dict[str, Tensor]:
        """The gradient of one rollout of T steps of n environments, left in the policy.

        Args:
            batch: obs (T n, *obs_shape), action (T n, *action_shape), reward, terminated, truncated (T, n).

        Returns:
            The losses and what tells how learning goes, as scalars.
        """
        value, log_prob, entropy, bootstrap_value, back = self.policy.evaluate_rollout(batch)  # (T n,) each; (M,)

        # R <- 0 for terminal s_t, V(s_t; theta'_v) else; R <- r_i + gamma R, backwards. With lambda below 1:
        # A_t = sum_l (gamma lambda)^l delta_{t+l}, delta_t = r_t + gamma (1 - terminated_t) V(s_{t+1}) - V(s_t).
        state_value = value.view_as(batch.reward)  # (T, n)
        next_value = state_value.roll(-1, dims=0)
        next_value[batch.bootstrap_index] = bootstrap_value
        gamma, gae_lambda = self._now(self.gamma), self._now(self.gae_lambda)
        advantage, return_ = gae(
            batch.reward, batch.terminated, batch.truncated, state_value, next_value, gamma, gae_lambda
        )
        advantage, return_ = advantage.flatten(), return_.flatten()  # (T n,)
        if self.normalize_advantage and len(advantage) > 1:
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)

        # Means over the transitions, of which each has its share.
        share, error = batch.share, value - return_  # (T n,)
        of_log_prob, weighted_error = -share * advantage, share * error
        policy_loss = of_log_prob.dot(log_prob)
        entropy_loss = -share.dot(entropy)
        value_loss = weighted_error.dot(error)
        ent_coef, vf_coef = self._now(self.ent_coef), self._now(self.vf_coef)
        loss = policy_loss + ent_coef * entropy_loss + vf_coef * value_loss

        # dtheta: grad log pi(a_i|s_i; theta') (R - V(s_i; theta'_v)) + beta grad H(pi(.|s_i; theta'))
        # dtheta_v: grad (R - V(s_i; theta'_v))^2
        of_value, of_entropy = 2 * vf_coef * weighted_error, -ent_coef * share
        max_grad_norm = None if self.max_grad_norm is None else self._now(self.max_grad_norm)
        grad_norm = self.policy.gradient(loss, max_grad_norm, partial(back, of_value, of_log_prob, of_entropy))

        return {
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "entropy_loss": entropy_loss,
            "grad_norm": grad_norm,
            "explained_variance": explained_variance(value, return_),
        }

    # The workers, from here.

    def _start_workers(self, memory: SharedMemory) -> Workers:
        arguments = checkpoint.arguments(self) | {"verbose": 0, "tensorboard_log": None, "device": "cpu"}
        known = Spaces(self.observation_space, self.action_space, self.n_envs)
        frozen = frozen_parameters(self.policy)
        work = partial(_work, type(self), arguments, known, self.env.factory, self._total_timesteps, frozen)
        workers = Workers(
            work,
            memory,
            total=self._total_timesteps - self.num_timesteps,
            rollout=self.n_steps * self.n_envs,
            n_envs=self.n_envs,
            launches=self._n_launches,
            states=self._worker_states,
            first_turn=self._n_rollouts,
            max_restarts=self.max_worker_restarts,
            timeout=self.worker_timeout,
            in_turn=self.deterministic,
        )
        self._worker_states.running, self._n_launches = workers, workers.launches
        self._sent = {name: arguments[name] for name in _READ_BY_WORKERS}
        return workers

    def _warn_of_changes(self) -> None:
        """Warn once where a callback changed what the workers have been sent already."""
        changed = [name for name, value in self._sent.items() if getattr(self, name) is not value]
        if changed:
            self._sent = {}
            warnings.warn(
                f"{', '.join(changed)} changed while workers learn, who go on with what they were started with: the "
                "next call of learn takes it over; a schedule changes a number as training goes",
                stacklevel=3,
            )

    def _count(self, report: Report) -> None:
        """Take over the numbers of a report: updates, episodes, speed."""
        self.n_updates += report.updates
        self._n_rollouts += report.updates
        self._worker_steps[report.worker] += report.steps
        self._training_log.add_sums(report.numbers, report.updates)
        for _, _, info in report.infos:
            episode = {**info["episode"], "t": round(self._training_log.seconds, 6)}
            self.episodes.record({**info, "episode": episode})

    def _tell(self, callback: BaseCallback, report: Report) -> bool:
        """Go through the steps of a report with the callback; returns whether training goes on."""
        until, goes_on = self.num_timesteps + report.steps, True
        if self._is_watched and len(report.reward):
            callback.on_rollout_start()
            infos: list[list[dict[str, Any]]] = [[{} for _ in range(self.n_envs)] for _ in report.reward]
            for k, i, info in report.infos:
                infos[k][i] = info
            for k, (reward, done) in enumerate(zip(report.reward, report.done, strict=True)):
                self.num_timesteps += self.n_envs
                callback.update_locals({"rewards": reward, "dones": done, "infos": infos[k], "worker": report.worker})
                goes_on = callback.on_step()
                if not goes_on:
                    break
            else:
                callback.on_rollout_end()
        self.num_timesteps = until
        if goes_on:
            self._do_deferred()
        return goes_on

    def _take_launch(self, launch: int) -> None:
        """Draw, from now on, the random numbers of the worker that was started as number `launch` of this model.

        The first one keeps those of the model, which are also those of an A2C of the same seed.
        """
        if launch > 0:
            entropy = None if self.seed is None else [self.seed, launch]
            seeds = np.random.SeedSequence(entropy).generate_state(3)
            self._env_seed = int(seeds[0])
            self._act_generator = torch.Generator().manual_seed(int(seeds[1]))
            self._update_state = torch.Generator().manual_seed(int(seeds[2])).get_state()

    # What differs from algorithms that keep their environments in this process.

    @classmethod
    def open_environments(cls, env: EnvironmentLike, n_envs: int) -> Any:
        return env if isinstance(env, RemoteEnvironments) else RemoteEnvironments(env, n_envs)

    def _begin_run(self) -> None:
        super()._begin_run()
        self._n_rollouts = 0
        self._worker_states.clear()

    def set_env(self, env: EnvironmentLike, force_reset: bool = True) -> None:
        super().set_env(env, force_reset)
        self._worker_states.clear()

    def _start_episodes(self, env: Any) -> None:
        self._reset_count = env.reset_count
        self.episodes.start()

    def _buffers(self) -> dict[str, Any]:
        return {"workers": self._worker_states}

    def _check_spaces(self) -> None:
        check_action_space(self.action_space, "A3C")
        check_observation_space(self.observation_space, "A3C")

    def _record_more(self) -> None:
        self.logger.record("time/iterations", self._n_rollouts)
        self.logger.record("train/learning_rate", self._now(self.learning_rate))
        if hasattr(self.policy, "log_std"):
            self.logger.record("train/std", float(self.policy.log_std.detach().exp().mean()))
        now = time.perf_counter()
        for rank, steps in enumerate(self._worker_steps):
            self.logger.record(f"workers/fps_{rank}", int(steps / max(now - self._row_time, 1e-9)))
        self._worker_steps[:], self._row_time = 0, now
        self.logger.record("workers/restarts", self._worker_restarts)


def _work(
    cls: type[A3C],
    arguments: Mapping[str, Any],
    known: Spaces,
    factory: EnvironmentLike,
    total_timesteps: int,
    frozen: list[str],
    shared: SharedMemoryTransport,
    launch: int,
    state: Mapping[str, np.ndarray] | None,
) -> None:
    """Make what a worker needs, in its own process, and let it work."""
    model, theta = cls(env=known, **arguments), cls(env=known, **arguments).policy
    model._take_launch(launch)
    model._total_timesteps = total_timesteps
    torch.set_rng_state(model._update_state)
    for policy in (model.policy, theta):
        freeze(policy, frozen)
    env = make_environments(factory, known.n_envs)
    try:
        shared.hold(theta, partial(worker_state, model, env))
        model.policy.load_state_dict(theta.state_dict())
        if state is None:
            model._obs = env.reset(model._env_seed)
            model.policy.begin_episodes()
        else:
            model._env_seed += shared.rank  # for environments that cannot be put back: no two begin alike
            go_on(model, env, state)
        shared.be_ready()
        actor_learner(model, env, shared)
    finally:
        env.close()

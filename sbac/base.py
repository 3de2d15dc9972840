"""`BaseAlgorithm`: everything that is the same whichever algorithm learns.

Spaces, device, generators, the frame around `learn`, and `predict`; its log is in `logged`, and how it is saved and
loaded in `saving`. What an algorithm is stands in its own file.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import nn

from sbac import checkpoint
from sbac.adapters import Step
from sbac.bodies import choose_policy
from sbac.callbacks import BaseCallback, MaybeCallback, make_callback
from sbac.construction import Constructed, argument_defaults, read_device, read_policy
from sbac.envs import (
    ActionCodec,
    EnvironmentLike,
    Environments,
    Spaces,
    make_environments,
    number_to_make,
    require_spaces,
)
from sbac.guards import nearest, require_flag, require_whole
from sbac.logged import Logged
from sbac.look import Glance, forget
from sbac.memory import keep_freed_memory
from sbac.networks import describe
from sbac.observations import as_batch
from sbac.resume import folders_held, resume_run
from sbac.saving import Saveable
from sbac.schedules import FloatOrSchedule, value_at
from sbac.statistics import EpisodeStatistics
from sbac.trainable import Trainable
from sbac.trees import Tree, rows


class BaseAlgorithm(Logged, Saveable, metaclass=Constructed):
    """What all algorithms share.

    A subclass keeps each argument of its constructor as an attribute of the same name; that is what is saved.

    Args:
        policy: The name of a policy in `policy_aliases`, or a class.
        env: What `sbac.envs.make_environments` takes, or `Spaces`.
        n_envs: How many environments to make from an id or a factory.
        stats_window_size: Over how many finished episodes ``rollout/ep_rew_mean`` is taken.
        tensorboard_log: Folder for event files, or None.
        policy_kwargs: Further arguments of the policy.
        verbose: 0 is silent, 1 prints a table as training goes.
        seed: Fixes every random number, or None for other ones each time.
        device: "cpu", "cuda", ... or "auto".
        n_threads: Threads of torch while learning, or None, which leaves it to the network's size.

    Attributes:
        num_timesteps: Transitions collected since the counter was last reset, over all environments.
        n_updates: Gradient steps made.
        episodes: What is known of the episodes of training.
    """

    policy_aliases: ClassVar[Mapping[str, type[nn.Module]]]
    policy: Any
    learns_elsewhere: ClassVar[bool] = False  # in other processes, whose steps are told of later
    # Arguments that only set others, which are what is saved.
    _shorthands: ClassVar[Mapping[str, Sequence[str]]] = {}
    env: Environments  # None in a model that was loaded without environments

    def __init__(
        self,
        policy: str | type[nn.Module],
        env: EnvironmentLike | Spaces,
        n_envs: int,
        stats_window_size: int,
        tensorboard_log: str | None,
        policy_kwargs: Mapping[str, Any] | None,
        verbose: int,
        seed: int | None,
        device: torch.device | str,
        n_threads: int | None = None,
    ) -> None:
        keep_freed_memory()
        super().__init__(stats_window_size, tensorboard_log, verbose)
        self._policy_argument = policy
        if policy != "auto":
            self.policy_class = read_policy(type(self).__name__, policy, self.policy_aliases)
        if seed is not None:
            seed = require_whole("seed", seed, 0)
        self.seed = seed
        if not (policy_kwargs is None or isinstance(policy_kwargs, Mapping)):
            raise ValueError(f"policy_kwargs must be a dict of the policy's arguments, not {policy_kwargs!r}")
        self.policy_kwargs = dict(policy_kwargs or {})
        self.device = read_device(device)
        self.n_threads = None if n_threads is None else require_whole("n_threads", n_threads, 1)

        if isinstance(env, Spaces):
            self.env = None  # type: ignore[assignment]
            self.observation_space, self.action_space, self.n_envs = env
        else:
            self.env = self.open_environments(env, n_envs)
            self.observation_space = self.env.observation_space
            self.action_space = self.env.action_space
            self.n_envs = self.env.num_envs
        self._check_spaces()
        if policy == "auto":
            name, reason = choose_policy(self.observation_space)
            self._say(f"{type(self).__name__}: policy 'auto' is {name}, since {reason}")
            self.policy_class = read_policy(type(self).__name__, name, self.policy_aliases)
        self._codec = ActionCodec(self.action_space)

        # Every random number of a model comes from one of these; the global generators are left alone.
        seeds = np.random.SeedSequence(seed).generate_state(6)
        self._network_seed, self._env_seed = int(seeds[0]), int(seeds[1])
        self.generator = np.random.default_rng(seeds[2])  # exploration and replay
        self._act_generator = torch.Generator().manual_seed(int(seeds[3]))  # actions while training
        self._predict_generator = torch.Generator().manual_seed(int(seeds[4]))  # actions for others
        self._update_state = torch.Generator().manual_seed(int(seeds[5])).get_state()  # what an update draws

        self._total_timesteps = 0
        self._obs: Any = None  # what to act on next, (n_envs, *obs_shape)
        self._reset_count = -1
        self.episodes = EpisodeStatistics(self.n_envs, self.stats_window_size)
        self._first_timestep = 0
        self._callback: BaseCallback | None = None
        self._deferred: list[Callable[[], None]] = []
        self._is_learning = False
        self._glance = Glance()

    # What an algorithm provides.

    @abstractmethod
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
        """Train for a number of transitions, counted over all environments.

        Args:
            total_timesteps: Transitions to collect, at least 1; exact, but for up to n_envs - 1 more.
            callback: A `BaseCallback`, a function of ``(locals, globals)`` that returns False to stop, or a list.
            log_interval: Rollouts (A2C) or episodes (DDPG) between two rows of the log.
            tb_log_name: Name of the run below `tensorboard_log`; the algorithm's by default.
            reset_num_timesteps: Whether to count from 0 and begin new episodes. False goes on where the last
                `learn` stopped, with the same episodes.
            progress_bar: Show progress in the terminal.
            resume: Go on from the newest checkpoint of the `CheckpointCallback` among the callbacks, if there is one,
                up to `total_timesteps` from where that run began: with its model, environments, log and callbacks.

        Returns:
            The model itself.

        Raises:
            EnvironmentFault: An environment failed; the message names it and the step.
            NotFiniteError: NaN or infinity somewhere; the weights are those of before.
        """

    @abstractmethod
    def _check_spaces(self) -> None:
        """Refuse spaces that the algorithm cannot handle."""

    def _buffers(self) -> dict[str, Any]:
        """The buffers by name, for a full checkpoint: each has `get_state` and `set_state`."""
        return {}

    # Construction.

    def _make_policy(self, **kwargs: Any) -> Any:
        """Build the policy with its own random numbers, and name what `policy_kwargs` gets wrong."""
        known = argument_defaults(self.policy_class)
        for name, value in kwargs.items():
            if name not in known:
                raise ValueError(
                    f"policy_kwargs: {self.policy_class.__name__} has no argument {name!r}{nearest(name, known)}"
                )
            if isinstance(known[name], bool):
                require_flag(f"policy_kwargs: {name}", value)
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(self._network_seed)
            policy: Any = self.policy_class(self.observation_space, self.action_space, self.device, **kwargs)
        for part in policy.modules():
            if isinstance(part, Trainable):
                part.take_additions()
        self._codec = getattr(policy, "codec", self._codec)
        for line in policy.preprocessor.describe_images() if hasattr(policy, "preprocessor") else ():
            self._say(line)
        return policy

    def _say(self, line: str) -> None:
        """Print what was chosen for the user, but not when a model only comes back from its file."""
        if self.env is not None:
            print(line)

    # The frame around learning.

    @contextlib.contextmanager
    def _training(
        self,
        total_timesteps: float,
        callback: MaybeCallback,
        log_interval: int,
        tb_log_name: str | None,
        reset_num_timesteps: bool,
        progress_bar: bool,
        resume: bool,
    ) -> Iterator[BaseCallback]:
        """Set everything up for learning, and put everything away after it, whatever ends it."""
        if self.env is None:
            raise ValueError("this model has no environment to learn in: call set_env(env) or load(path, env=env)")
        steps = require_whole("total_timesteps", total_timesteps, 1)
        interval = require_whole("log_interval", log_interval, 1)
        prepared = make_callback(callback, progress_bar)

        with self._alone(), folders_held(prepared), torch.inference_mode(False), torch.enable_grad():
            self._is_watched = callback is not None or progress_bar
            run = resume_run(self, prepared, resume)
            is_new_run = reset_num_timesteps and run is None
            if is_new_run:
                self._begin_run()
            self._first_timestep = self.num_timesteps if run is None else run.get("start", 0)
            self._total_timesteps = self._first_timestep + steps
            if is_new_run or self._obs is None or self.env.reset_count != self._reset_count:
                self._start_episodes(self.env)
            name = tb_log_name or type(self).__name__
            if run is not None:
                self._outputs.resume(name, run.get("folder"))
            self._start_log(name, is_new_run, interval)

            for part in self.policy.modules():
                if isinstance(part, Trainable):
                    part.take_changes()
            self._callback = prepared
            self._deferred.clear()
            prepared.init_callback(self)
            threads = torch.get_num_threads()
            torch.set_num_threads(self.n_threads or self._usual_threads(threads))
            try:
                prepared.on_training_start({"self": self, "total_timesteps": steps}, globals())
                if run is not None:
                    checkpoint.continue_run(self, run)
                yield prepared
                if self._training_log.n_updates:
                    self._dump_logs()
                prepared.on_training_end()
            finally:
                torch.set_num_threads(threads)
                prepared.close()

    def _begin_run(self) -> None:
        """Count anew."""
        self.num_timesteps = 0
        self.episodes.forget()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """While it lasts, nobody else lets this model learn."""
        if self._is_learning:
            raise RuntimeError(
                "learn was called while learn of the same model runs, by a callback or another thread: let the first "
                "one end, or let a model of its own learn beside it"
            )
        self._is_learning = True
        try:
            yield
        finally:
            self._is_learning = False

    def _usual_threads(self, available: int) -> int:
        """A network of less than a million parameters gains little by threads, and loses much on a busy machine."""
        parameters = sum(parameter.numel() for parameter in self.policy.parameters())
        return 1 if parameters < 1_000_000 else available

    def _start_episodes(self, env: Environments) -> None:
        """Begin a new episode everywhere. The first ones are seeded; later ones go on with the same generators."""
        self._obs = env.reset(self._env_seed if self._reset_count < 0 and self.seed is not None else None)
        self._reset_count = env.reset_count
        self.episodes.start()
        self.policy.begin_episodes()

    def _cut_episodes(self, indices: Sequence[int]) -> None:
        """Treat the running episodes of these environments as truncated: others have begun in their place."""
        self.episodes.running_return[indices] = 0
        self.episodes.running_length[indices] = 0
        self.policy.cut_episodes(indices)
        for buffer in self._buffers().values():
            if hasattr(buffer, "cut"):
                buffer.cut(indices)
        noise = getattr(self, "action_noise", None)
        if noise is not None:
            noise.reset(np.array(indices))

    def _after_step(self, callback: BaseCallback, action: Tree, step: Step) -> bool:
        """Count a step, keep its observations, and ask the callback whether to go on."""
        self._obs = step.obs
        self.num_timesteps += int(np.count_nonzero(step.valid))
        ended = step.terminated | step.truncated
        self.episodes.add(step, ended, self._training_log.seconds)
        if not self._is_watched:
            return True
        callback.update_locals(
            {
                "actions": action,
                "new_obs": step.obs,
                "rewards": step.reward,
                "dones": ended,
                "infos": step.infos,
                "step": step,
            }
        )
        go_on = callback.on_step()
        if self.env.reset_count != self._reset_count:
            # The callback reset the training environments, by evaluating in them, say: what ran there is cut off.
            self._start_episodes(self.env)
        self._do_deferred()
        return go_on

    def _defer(self, function: Callable[[], None]) -> None:
        """Call a function once all callbacks are done with the present step."""
        self._deferred.append(function)

    def _do_deferred(self) -> None:
        while self._deferred:
            self._deferred.pop(0)()

    @contextlib.contextmanager
    def _updating(self) -> Iterator[None]:
        """Around an update: torch's global generator, of dropout, say, is the model's, and looks are made but once."""
        generator = torch.default_generator
        before = generator.get_state()
        generator.set_state(self._update_state)
        try:
            with self._glance.at(self.policy, self):
                yield
        finally:
            self._update_state = generator.get_state()
            generator.set_state(before)

    def _now(self, value: FloatOrSchedule) -> float:
        """A hyperparameter's present value: itself, or what its schedule says of the progress so far."""
        if not callable(value):
            return value
        forget()
        return value_at(value, self._progress())

    def _progress(self) -> float:
        """How much of the training remains: from 1 to 0."""
        # With several environments, the last step may go beyond the total.
        return max(0.0, 1.0 - self.num_timesteps / max(self._total_timesteps, 1))

    # Acting.

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = True,
    ) -> tuple[Tree, Any]:
        """The policy's action.

        Args:
            observation: One observation, (*obs_shape), or a batch, (n, *obs_shape).
            state: Of a recurrent policy: what the last call returned, or None; passed through by the others.
            episode_start: For recurrent policies: where an episode begins, (n,) bool.
            deterministic: The most probable action, or a draw. Drawing here changes nothing in training.

        Returns:
            The action in the environment's own units, (*action_shape) or (n, *action_shape), and the state.

        Raises:
            ValueError: The observation does not have the shape of the observation space.
            NotFiniteError: The observation holds NaN or infinity.
        """
        obs, single = as_batch(observation, self.observation_space)
        self.policy.set_training_mode(False)
        action, state = self.policy.act_with_state(obs, state, episode_start, deterministic, self._predict_generator)
        return self._codec.to_env(rows(action, 0) if single else action), state

    # Environments.

    @classmethod
    def open_environments(cls, env: EnvironmentLike, n_envs: int) -> Environments:
        """What the algorithm learns in, from whatever a user has; as `sbac.envs.make_environments`."""
        return make_environments(env, n_envs)

    def get_env(self) -> Any:
        """The vector environment that the model learns in, or None."""
        return None if self.env is None else self.env.env

    def set_env(self, env: EnvironmentLike, force_reset: bool = True) -> None:
        """Learn in other environments from now on, beginning with new episodes.

        Args:
            env: What the constructor takes, with the same spaces and number of environments.
            force_reset: Accepted for scripts written for Stable-Baselines; new episodes are always begun.

        Raises:
            ValueError: Spaces or number of environments differ.
        """
        new = self.open_environments(env, number_to_make(env, self.n_envs))
        self.check_env(new)
        if new.num_envs != self.n_envs:
            raise ValueError(f"set_env: the model works with {self.n_envs} environments at once, got {new.num_envs}")
        for buffer in self._buffers().values():
            if hasattr(buffer, "attach"):
                buffer.attach(new)
        self.env = new
        self._obs = None
        self._reset_count = -1

    def check_env(self, env: Environments) -> None:
        """Refuse environments with other spaces than the model's.

        Raises:
            ValueError: Naming both spaces.
        """
        require_spaces(env, self)

    def __getstate__(self) -> dict[str, Any]:
        # A copy is in no training: callbacks hold what cannot be copied, such as files and whole modules.
        return {**self.__dict__, "_callback": None, "_deferred": [], "_is_learning": False, "_glance": Glance()}

    def close(self) -> None:
        """Close environments and logger."""
        if self.env is not None:
            self.env.close()
        self.logger.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __str__(self) -> str:
        return f"{self!r}\n{describe(self.policy)}"

    def __repr__(self) -> str:
        parameters = sum(parameter.numel() for parameter in self.policy.parameters())
        return (
            f"{type(self).__name__}({self.policy_class.__name__}, {parameters:,} parameters on {self.device}, "
            f"{self.num_timesteps:,} timesteps, {self.observation_space} -> {self.action_space})"
        )

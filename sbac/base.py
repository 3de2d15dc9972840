"""`BaseAlgorithm`: everything that is the same whichever algorithm learns.

Construction, the frame around `learn`, `predict`, saving and loading, seeds, schedules and episode statistics. What an
algorithm is stands in its own file.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from sbac import checkpoint
from sbac.adapters import Step
from sbac.bodies import choose_policy
from sbac.callbacks import BaseCallback, MaybeCallback, make_callback
from sbac.construction import Constructed, LoadsEitherWay, argument_names
from sbac.envs import ActionCodec, EnvironmentLike, Environments, Spaces, make_environments, number_to_make
from sbac.guards import nearest, require_whole
from sbac.logger import HumanOutputFormat, Logger, TensorBoardOutputFormat
from sbac.networks import describe
from sbac.observations import as_batch
from sbac.resume import resume_run
from sbac.schedules import FloatOrSchedule, value_at
from sbac.statistics import EpisodeStatistics, TrainingLog
from sbac.trainable import Trainable
from sbac.trees import Tree, rows

PathLike = str | Path


class BaseAlgorithm(metaclass=Constructed):
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

    Attributes:
        num_timesteps: Transitions collected since the counter was last reset, over all environments.
        n_updates: Gradient steps made.
        episodes: What is known of the episodes of training.
    """

    policy_aliases: ClassVar[Mapping[str, type[nn.Module]]]
    policy: Any
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
    ) -> None:
        self._policy_argument = policy
        if policy != "auto":
            self.policy_class = self._policy_class(policy)
        if seed is not None:
            seed = require_whole("seed", seed, 0)
        self.seed = seed
        self.verbose = require_whole("verbose", verbose, 0)
        if not (tensorboard_log is None or isinstance(tensorboard_log, (str, Path))):
            raise ValueError(f"tensorboard_log must be a folder or None, not {tensorboard_log!r}")
        if not (policy_kwargs is None or isinstance(policy_kwargs, Mapping)):
            raise ValueError(f"policy_kwargs must be a dict of the policy's arguments, not {policy_kwargs!r}")
        self.tensorboard_log = None if tensorboard_log is None else str(tensorboard_log)
        self.policy_kwargs = dict(policy_kwargs or {})
        self.stats_window_size = require_whole("stats_window_size", stats_window_size, 1)
        self.device = self._device(device)

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
            self.policy_class = self._policy_class(name)
        self._codec = ActionCodec(self.action_space)

        # Every random number of a model comes from one of these; the global generators are left alone.
        seeds = np.random.SeedSequence(seed).generate_state(6)
        self._network_seed, self._env_seed = int(seeds[0]), int(seeds[1])
        self.generator = np.random.default_rng(seeds[2])  # exploration and replay
        self._act_generator = torch.Generator().manual_seed(int(seeds[3]))  # actions while training
        self._predict_generator = torch.Generator().manual_seed(int(seeds[4]))  # actions for others
        self._update_state = torch.Generator().manual_seed(int(seeds[5])).get_state()  # what an update draws

        self.num_timesteps = 0
        self.n_updates = 0
        self._total_timesteps = 0
        self._obs: Any = None  # what to act on next, (n_envs, *obs_shape)
        self._reset_count = -1
        self.episodes = EpisodeStatistics(self.n_envs, self.stats_window_size)
        self._training_log = TrainingLog(1, 0)
        self._logger: Logger | None = None
        self._event_file: TensorBoardOutputFormat | None = None
        self._run_name = ""
        self._run_folder: str | None = None  # of the event file
        self._first_timestep = 0
        self._callback: BaseCallback | None = None
        self._deferred: list[Callable[[], None]] = []

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

    def _policy_class(self, policy: str | type[nn.Module]) -> type[nn.Module]:
        if isinstance(policy, type) and issubclass(policy, nn.Module):
            return policy
        if not isinstance(policy, str):
            raise ValueError(
                f"policy must be one of {', '.join(self.policy_aliases)}, auto, or a policy class, not {policy!r}"
            )
        if policy not in self.policy_aliases:
            known = [*self.policy_aliases, "auto"]
            raise ValueError(f"{type(self).__name__} has no policy {policy!r}{nearest(policy, known)}")
        return self.policy_aliases[policy]

    def _device(self, device: torch.device | str) -> torch.device:
        # A small network on a GPU waits for the GPU; images arrive with the policies that read them.
        try:
            chosen = torch.device("cpu" if isinstance(device, str) and device == "auto" else device)
            torch.empty(0, device=chosen)  # a device may be known and not there
            return chosen
        except (RuntimeError, TypeError, AssertionError) as error:
            raise ValueError(
                f"device must be 'auto', 'cpu', 'cuda' or another that torch finds here, not {device!r} ({error})"
            ) from error

    def _make_policy(self, **kwargs: Any) -> Any:
        """Build the policy with its own random numbers, and name what `policy_kwargs` gets wrong."""
        known = argument_names(self.policy_class)
        for name in kwargs:
            if name not in known:
                raise ValueError(
                    f"policy_kwargs: {self.policy_class.__name__} has no argument {name!r}{nearest(name, known)}"
                )
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(self._network_seed)
            policy: Any = self.policy_class(self.observation_space, self.action_space, self.device, **kwargs)
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
        self._is_watched = callback is not None or progress_bar

        run = resume_run(self, prepared, resume)
        is_new_run = reset_num_timesteps and run is None
        if is_new_run:
            self.num_timesteps = 0
            self.episodes.forget()
        self._first_timestep = self.num_timesteps if run is None else run.get("start", 0)
        self._total_timesteps = self._first_timestep + steps
        if is_new_run or self._obs is None or self.env.reset_count != self._reset_count:
            self._start_episodes(self.env)
        name = tb_log_name or type(self).__name__
        if run is not None:
            self._run_name, self._run_folder = name, run.get("folder")
        self._setup_logger(name, is_new_run)
        self._training_log = TrainingLog(interval, self.num_timesteps)

        self._callback = prepared
        self._deferred.clear()
        prepared.init_callback(self)
        threads = torch.get_num_threads()
        torch.set_num_threads(self._n_threads(threads))
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

    def _n_threads(self, available: int) -> int:
        """A network of less than a million parameters loses more to the exchange between threads than it gains."""
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
        while self._deferred:
            self._deferred.pop(0)()
        return go_on

    def _defer(self, function: Callable[[], None]) -> None:
        """Call a function once all callbacks are done with the present step."""
        self._deferred.append(function)

    @property
    def ep_info_buffer(self) -> deque[dict[str, float]]:
        """The last episodes, each ``{"r": return, "l": length, "t": seconds since training started}``."""
        return self.episodes.infos

    @property
    def ep_success_buffer(self) -> deque[float]:
        """1 or 0 for each of the last episodes whose environment said ``is_success``."""
        return self.episodes.successes

    @contextlib.contextmanager
    def _own_randomness(self) -> Iterator[None]:
        """While an update runs, torch's global generator (of dropout, say) is the model's; then it is as before."""
        before = torch.get_rng_state()
        torch.set_rng_state(self._update_state)
        try:
            yield
        finally:
            self._update_state = torch.get_rng_state()
            torch.set_rng_state(before)

    def _now(self, value: FloatOrSchedule) -> float:
        """A hyperparameter's present value: itself, or what its schedule says of the progress so far."""
        if not callable(value):
            return value
        return value_at(value, self._progress())

    def _progress(self) -> float:
        """How much of the training remains: from 1 to 0."""
        # With several environments, the last step may go beyond the total.
        return max(0.0, 1.0 - self.num_timesteps / max(self._total_timesteps, 1))

    # Logging.

    @property
    def logger(self) -> Logger:
        """Where numbers go. Before `learn`, or without verbose and tensorboard_log, one without outputs."""
        if self._logger is None:
            self._logger = Logger(None, [])
        return self._logger

    def set_logger(self, logger: Logger) -> None:
        """Log to `logger`; the table of `verbose` and the event file of `tensorboard_log` are added to it."""
        self._logger = logger

    def _setup_logger(self, name: str, is_new_run: bool) -> None:
        outputs = self.logger.output_formats
        is_other_folder = is_new_run or name != self._run_name
        if self._event_file in outputs and is_other_folder:
            outputs.remove(self._event_file)
            self._event_file.close()
        self._run_name = name
        kinds = {type(output) for output in outputs}
        if self.verbose >= 1 and HumanOutputFormat not in kinds:
            self.logger.add_output(HumanOutputFormat())
        if self.tensorboard_log is not None and TensorBoardOutputFormat not in kinds:
            if is_other_folder or self._run_folder is None:
                self._run_folder = _run_folder(Path(self.tensorboard_log), name, is_new_run)
            self._event_file = TensorBoardOutputFormat(Path(self.tensorboard_log) / self._run_folder)
            self.logger.add_output(self._event_file)

    def _log(self, numbers: Mapping[str, Tensor]) -> None:
        """Count an update and remember its numbers."""
        self.n_updates += 1
        self._training_log.add(numbers)

    def _dump_if_due(self, count: int) -> None:
        """Write a row of the log every `log_interval` counts."""
        if self._training_log.is_due(count, self.num_timesteps):
            self._dump_logs(count)

    def _dump_logs(self, count: int | None = None) -> None:
        self._training_log.record(self.logger, count, self.num_timesteps, self.episodes)
        self.logger.record("train/n_updates", self.n_updates)
        self._record_more()
        self.logger.dump(self.num_timesteps)

    def _record_more(self) -> None:
        """What one algorithm logs beyond the means of its updates' numbers."""

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
        native = self._codec.to_env(action)
        return (rows(native, 0) if single else native), state

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
        for what, own, given in (
            ("observation", self.observation_space, env.observation_space),
            ("action", self.action_space, env.action_space),
        ):
            if own != given:
                raise ValueError(
                    f"the environment has another {what} space than the model: the model was made for {own}, "
                    f"the environment has {given}"
                )

    def __getstate__(self) -> dict[str, Any]:
        # A copy is in no training: callbacks hold what cannot be copied, such as files and whole modules.
        return {**self.__dict__, "_callback": None, "_deferred": []}

    def close(self) -> None:
        """Close environments and logger."""
        if self.env is not None:
            self.env.close()
        self.logger.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # Parameters and files.

    def get_parameters(self) -> dict[str, dict[str, Any]]:
        """The state of the policy and of each optimizer, by name, as torch's `state_dict` gives it."""
        states: dict[str, dict[str, Any]] = {"policy": self.policy.state_dict()}
        for name, network in self._trained().items():
            states[f"{name}.optimizer"] = network.optimizer.state_dict()
        return states

    def set_parameters(
        self,
        load_path_or_dict: PathLike | Mapping[str, Mapping[str, Any]],
        exact_match: bool = True,
        device: torch.device | str = "auto",
    ) -> None:
        """Take over parameters.

        Args:
            load_path_or_dict: A model file, or what `get_parameters` returned.
            exact_match: Whether every state must be there, with every name in it.
            device: Accepted for scripts written for Stable-Baselines; parameters go where the model is.

        Raises:
            ValueError: Names are unknown or, with `exact_match`, missing, or shapes differ. Nothing is changed then.
        """
        if isinstance(load_path_or_dict, Mapping):
            given: Mapping[str, Mapping[str, Any]] = load_path_or_dict
        else:
            given = type(self).load(load_path_or_dict).get_parameters()
        own = self.get_parameters()
        unknown = sorted(set(given) - set(own))
        missing = sorted(set(own) - set(given))
        if unknown or (exact_match and missing):
            raise ValueError(f"set_parameters: unknown {unknown}, missing {missing}; known: {sorted(own)}")
        if "policy" in given:
            checkpoint.load_policy(self.policy, given["policy"], exact_match)
        for name, network in self._trained().items():
            if f"{name}.optimizer" in given:
                network.optimizer.load_state_dict(dict(given[f"{name}.optimizer"]))

    def _trained(self) -> dict[str, Trainable]:
        """The networks that have an optimizer."""
        networks = {"policy": self.policy, **dict(self.policy.named_children())}
        return {name: network for name, network in networks.items() if hasattr(network, "optimizer")}

    def save(
        self,
        path: PathLike | BinaryIO,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
        full: bool = False,
    ) -> None:
        """Write the model to a file, atomically: either the whole file is there, or the one from before.

        Args:
            path: Where to; ".zip" is appended where there is no suffix. Or an open binary file.
            exclude: Parts to leave out, of those that a file can hold: "optimizer", "generators", "episodes", "noise",
                "replay_buffer", "rollout_buffer", "workers", "run".
            include: Parts to add to those of a plain file (which holds the policy and its optimizer).
            full: Hold all that resuming needs, the replay buffer included.

        Raises:
            ArchiveError: The file cannot be written.
            ValueError: An unknown part.
        """
        checkpoint.save(self, path, exclude, include, full)

    @LoadsEitherWay
    def load(
        cls: Any,
        instance: Any,
        path: PathLike | BinaryIO,
        env: EnvironmentLike | None = None,
        device: torch.device | str = "auto",
        custom_objects: Mapping[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        allow_pickle: bool = False,
        vecnormalize: PathLike | None = None,
        **kwargs: Any,
    ) -> Any:
        """Read a model from a file. On the class: a new model. On a model: into that model, which is returned.

        Args:
            path: A file written by `save`, or by Stable-Baselines3; ".zip" may be left out.
            env: Environments to go on learning in, with the model's spaces. Not needed for `predict`.
            device: Where the networks go.
            custom_objects: Values in place of the file's, by argument; for what the file cannot hold as data.
            print_system_info: Print what the file was written with.
            force_reset: Accepted for scripts written for Stable-Baselines; learning begins with new episodes.
            allow_pickle: Unpickle a user's own objects in the file. Only for files that you trust: it runs code.
            vecnormalize: What ``VecNormalize.save`` wrote beside a Stable-Baselines3 file: its statistics become the
                model's own.
            **kwargs: Constructor arguments in place of the file's.

        Raises:
            ArchiveError: The file is damaged, foreign, or holds another algorithm.
            FileNotFoundError: There is no such file.
            ValueError: The environment's spaces are not the model's.
        """
        if instance is not None and env is None:
            env = instance.env
        # Stable-Baselines' habit is to pass custom objects of all its algorithms at once.
        known = argument_names(cls)
        overrides = {**{k: v for k, v in (custom_objects or {}).items() if k in known}, **kwargs}
        model = checkpoint.load(cls, path, env, device, overrides, allow_pickle, print_system_info, vecnormalize)
        if instance is None:
            return model
        for name in ("_logger", "_event_file", "_run_name"):
            setattr(model, name, getattr(instance, name))
        instance.__dict__.update(model.__dict__)
        return instance

    def save_replay_buffer(self, path: PathLike | BinaryIO) -> None:
        """Write the replay buffer alone to a file.

        Raises:
            ValueError: The algorithm has none.
        """
        checkpoint.save_buffer(self, path)

    def load_replay_buffer(self, path: PathLike | BinaryIO, truncate_last_traj: bool = True) -> None:
        """Replace the replay buffer's content by that of a file.

        Args:
            path: Written by `save_replay_buffer`.
            truncate_last_traj: Accepted for scripts written for Stable-Baselines; whole transitions are stored, so
                that there is no unfinished trajectory to cut.

        Raises:
            ArchiveError: The file is damaged or foreign.
            ValueError: It was made for other spaces or a larger buffer. The buffer is as before.
        """
        checkpoint.load_buffer(self, path)

    def __str__(self) -> str:
        return f"{self!r}\n{describe(self.policy)}"

    def __repr__(self) -> str:
        parameters = sum(parameter.numel() for parameter in self.policy.parameters())
        return (
            f"{type(self).__name__}({self.policy_class.__name__}, {parameters:,} parameters on {self.device}, "
            f"{self.num_timesteps:,} timesteps, {self.observation_space} -> {self.action_space})"
        )


def _run_folder(parent: Path, name: str, is_new_run: bool) -> str:
    """`name_1`, `name_2`, ...: a new one for a new run, the newest to go on with."""
    numbers = [
        int(folder.name.removeprefix(f"{name}_"))
        for folder in parent.glob(f"{name}_*")
        if folder.name.removeprefix(f"{name}_").isdigit()
    ]
    newest = max(numbers, default=0)
    return f"{name}_{newest + 1 if is_new_run or not newest else newest}"

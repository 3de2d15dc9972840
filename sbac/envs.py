"""The one door to environments.

Whatever a user has (an id, a Gymnasium environment, a factory or a list of them, a vector environment in any
autoreset mode, a Stable-Baselines ``VecEnv``) becomes one thing, `Environments`, whose `step` yields the same
`Step` for the same transitions.
"""

from __future__ import annotations

import multiprocessing.connection
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from sbac.guards import EnvironmentFault, NotFiniteError, all_finite, first_not_finite, nearest

EnvironmentLike = Any
"""An id, `gymnasium.Env`, factory, list of factories, Gymnasium ``VectorEnv``, or Stable-Baselines ``VecEnv``."""


class Spaces(NamedTuple):
    """What a model that only predicts knows of its environments. Stands in for them where there are none."""

    observation_space: spaces.Space[Any]
    action_space: spaces.Space[Any]
    n_envs: int


class Step(NamedTuple):
    """What one step of n environments gave.

    `obs` is what to act on next: after an episode's end, the first observation of the next episode (or, where the
    environment resets in a step of its own, the last of the old one, and the step after it is not `valid`).
    `successor` is the true next state s_{t+1}, also where an episode ended. Only `terminated` stops a bootstrap.
    """

    obs: np.ndarray  # (n, *obs_shape)
    reward: np.ndarray  # (n,) float64
    terminated: np.ndarray  # (n,) bool
    truncated: np.ndarray  # (n,) bool
    successor: np.ndarray  # (n, *obs_shape)
    valid: np.ndarray  # (n,) bool: False for the empty step of next-step autoreset
    infos: Sequence[dict[str, Any]]


class ActionCodec:
    """From the actions of an algorithm to those of an environment, and back.

    An algorithm acts in [-1, 1] wherever the environment's Box is finite, and counts discrete actions from 0.

    Args:
        space: The action space of one environment.
    """

    def __init__(self, space: spaces.Space[Any]) -> None:
        self.space = space
        self.rescales = False
        if isinstance(space, spaces.Box):
            self._dtype = np.dtype(space.dtype)
            self._low = space.low.astype(np.float64)
            self._high = space.high.astype(np.float64)
            self.rescales = bool(np.isfinite(self._low).all() and np.isfinite(self._high).all())
            self._center = (self._high / 2 + self._low / 2) if self.rescales else np.zeros_like(self._low)
            self._half_range = (self._high / 2 - self._low / 2) if self.rescales else np.ones_like(self._low)
            if self.rescales:
                # Where rounding would keep +-1 off a bound, reach a little beyond it: `to_env` clips.
                short = (self._center + self._half_range < self._high) | (self._center - self._half_range > self._low)
                self._half_range += short * np.spacing(np.maximum(np.abs(self._low), np.abs(self._high)))
        elif isinstance(space, spaces.Discrete):
            self._start = int(space.start)

    def to_env(self, action: np.ndarray) -> np.ndarray:
        """Actions (..., *shape) of an algorithm in the environment's own units, inside its bounds."""
        if isinstance(self.space, spaces.Box):
            native = np.clip(self._center + self._half_range * action, self._low, self._high)
            return (np.rint(native) if np.issubdtype(self._dtype, np.integer) else native).astype(self._dtype)
        if isinstance(self.space, spaces.Discrete):
            return (action + self._start).astype(self.space.dtype)
        return action

    def from_env(self, action: np.ndarray) -> np.ndarray:
        """Actions (..., *shape) of an environment in the units of an algorithm."""
        if isinstance(self.space, spaces.Box):
            half_range = np.where(self._half_range > 0, self._half_range, 1.0)
            return ((np.asarray(action, dtype=np.float64) - self._center) / half_range).astype(np.float32)
        if isinstance(self.space, spaces.Discrete):
            return np.asarray(action) - self._start
        return np.asarray(action)


class Infos(Sequence[dict[str, Any]]):
    """One info dictionary per environment, made only when somebody looks.

    At an episode's end it also holds, as in Stable-Baselines, ``terminal_observation``, ``TimeLimit.truncated`` and,
    once the algorithm has counted it, ``episode`` with the keys r, l and t.
    """

    def __init__(self, raw: Mapping[str, Any], n_envs: int, ends: dict[int, dict[str, Any]]) -> None:
        self._raw = raw
        self._n_envs = n_envs
        self.ends = ends

    def __len__(self) -> int:
        return self._n_envs

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._n_envs))]
        index = range(self._n_envs)[index]
        if index not in self.ends:
            return _one_info(self._raw, index)
        source = self._raw
        final = self._raw.get("final_info")
        if isinstance(final, Mapping):
            # Gymnasium's vector RecordEpisodeStatistics writes beside final_info, not into it.
            source = {key: self._raw[key] for key in ("episode", "_episode") if key in self._raw} | dict(final)
        return {**_one_info(source, index), **self.ends[index]}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(self._n_envs))


def _one_info(raw: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The entries of Gymnasium's vector info that environment `index` sent."""
    info: dict[str, Any] = {}
    for key, value in raw.items():
        if (key.startswith("_") and key[1:] in raw) or key in ("final_obs", "final_info"):
            continue
        sent = raw.get(f"_{key}")
        if sent is not None and not sent[index]:
            continue
        if isinstance(value, Mapping):
            info[key] = _one_info(value, index)
        else:
            info[key] = value[index] if isinstance(value, (list, tuple)) or np.ndim(value) > 0 else value
    return info


class _Adapter(Protocol):
    """A vector environment, seen through `Step`."""

    num_envs: int
    observation_space: spaces.Space[Any]
    action_space: spaces.Space[Any]

    def reset(self, seed: int | None) -> np.ndarray: ...

    def step(self, actions: np.ndarray) -> Step: ...

    def close(self) -> None: ...


class _GymnasiumAdapter:
    """A Gymnasium ``VectorEnv`` in any of its three autoreset modes."""

    def __init__(self, env: VectorEnv[Any, Any, Any]) -> None:
        self.env = env
        self.num_envs = env.num_envs
        # envpool is a VectorEnv without the single_ names: its spaces already are those of one environment.
        self.observation_space = getattr(env, "single_observation_space", env.observation_space)
        self.action_space = getattr(env, "single_action_space", env.action_space)
        mode = env.metadata.get("autoreset_mode")
        if mode is None:
            warnings.warn(
                f"{env!r} does not state metadata['autoreset_mode']; "
                "taken for next-step autoreset, Gymnasium's default",
                stacklevel=4,
            )
        self._mode = AutoresetMode(mode or AutoresetMode.NEXT_STEP)
        self._ended = np.zeros(self.num_envs, dtype=bool)
        self._reuses_memory = getattr(env.unwrapped, "copy", True) is False

    def reset(self, seed: int | None) -> np.ndarray:
        seeds: Any = seed
        if seed is not None and isinstance(self.env.unwrapped, (SyncVectorEnv, AsyncVectorEnv)):
            seeds = _words(seed, self.num_envs)
        obs, _ = self.env.reset(seed=seeds)
        self._ended = np.zeros(self.num_envs, dtype=bool)
        return obs.copy() if self._reuses_memory else obs

    def step(self, actions: np.ndarray) -> Step:
        obs, reward, terminated, truncated, raw = self.env.step(actions)
        if self._reuses_memory:
            obs = obs.copy()
        valid = np.ones(self.num_envs, dtype=bool)
        if self._mode is AutoresetMode.NEXT_STEP:
            valid = ~self._ended
        ended = terminated | truncated
        successor = obs
        ends: dict[int, dict[str, Any]] = {}
        if ended.any():
            indices = np.flatnonzero(ended)
            if self._mode is AutoresetMode.SAME_STEP:
                if "final_obs" not in raw:
                    raise EnvironmentFault(
                        f"{self.env!r} resets in the same step but sent no 'final_obs' at an episode's end; "
                        "its infos must hold the last observation of each episode"
                    )
                successor = obs.copy()
                for i in indices:
                    successor[i] = raw["final_obs"][i]
            elif self._mode is AutoresetMode.DISABLED:
                obs, _ = self.env.reset(options={"reset_mask": ended})
                if self._reuses_memory:
                    obs = obs.copy()
            ends = _ends(indices, successor, terminated)
        self._ended = ended
        return Step(obs, reward, terminated, truncated, successor, valid, Infos(raw, self.num_envs, ends))

    def close(self) -> None:
        base = self.env.unwrapped
        if isinstance(base, AsyncVectorEnv) and _killed_workers(base):
            # Its own close would wait for ever for the answers to the step in which a worker died.
            for process in base.processes:
                process.terminate()
            for process in base.processes:
                process.join()
            for pipe in base.parent_pipes:
                if pipe is not None:
                    pipe.close()
            base.closed = True
        self.env.close()


class _StableBaselinesAdapter:
    """A ``VecEnv`` as Stable-Baselines has them, known by its shape alone: it resets in the same step."""

    def __init__(self, env: Any) -> None:
        self.env = env
        self.num_envs = int(env.num_envs)
        self.observation_space = env.observation_space
        self.action_space = env.action_space

    def reset(self, seed: int | None) -> np.ndarray:
        if seed is not None:
            # It counts on from one seed, environment by environment: from a random one, so that runs do not overlap.
            self.env.seed(_words(seed, 1)[0])
        return self.env.reset()

    def step(self, actions: np.ndarray) -> Step:
        obs, reward, done, infos = self.env.step(actions)
        truncated = np.zeros(self.num_envs, dtype=bool)
        successor = obs
        if done.any():
            successor = obs.copy()
            for i in np.flatnonzero(done):
                truncated[i] = infos[i].get("TimeLimit.truncated", False)
                successor[i] = infos[i]["terminal_observation"]
        valid = np.ones(self.num_envs, dtype=bool)
        return Step(obs, reward, done & ~truncated, truncated, successor, valid, infos)

    def close(self) -> None:
        self.env.close()


def _words(seed: int, count: int) -> list[int]:
    """Seeds derived from one seed, of 31 bits each."""
    return [int(word) for word in np.random.SeedSequence(seed).generate_state(count) >> 1]


def _killed_workers(env: AsyncVectorEnv, patience: float = 0.0) -> dict[int, int | None]:
    """Exit codes of the workers that are gone although their environment raised nothing.

    A pipe breaks a moment before its process counts as dead: `patience` is how many seconds to wait for that.
    """
    if env.closed:
        return {}
    ended = multiprocessing.connection.wait([process.sentinel for process in env.processes], timeout=patience)
    codes: dict[int, int | None] = {}
    for i, (pipe, process) in enumerate(zip(env.parent_pipes, env.processes, strict=True)):
        if pipe is not None and process.sentinel in ended:
            process.join()
            codes[i] = process.exitcode
    return codes


def _ends(indices: np.ndarray, successor: np.ndarray, terminated: np.ndarray) -> dict[int, dict[str, Any]]:
    return {int(i): {"terminal_observation": successor[i], "TimeLimit.truncated": not terminated[i]} for i in indices}


class Environments:
    """n environments behind one interface.

    Args:
        adapter: The vector environment, adapted. Use `make_environments` to get an instance.

    Attributes:
        num_envs: How many environments there are.
        observation_space: Of one environment.
        action_space: Of one environment, in its own units.
        env: The vector environment behind the door.
        reset_count: How often `reset` was called, so that an algorithm notices that somebody else reset its
            environments.
    """

    def __init__(self, adapter: _Adapter) -> None:
        self._adapter = adapter
        self.env = adapter.env  # type: ignore[attr-defined]
        self.num_envs = adapter.num_envs
        self.observation_space = adapter.observation_space
        self.action_space = adapter.action_space
        self.codec = ActionCodec(self.action_space)
        self.reset_count = 0
        self._step_count = 0
        self._dtype = np.dtype(self.observation_space.dtype)
        self._batch_shape = (self.num_envs, *(self.observation_space.shape or ()))

    @property
    def env_id(self) -> str | None:
        """The Gymnasium id that the environments were made from, where there is one."""
        spec = getattr(self.env, "spec", None)
        if spec is None and isinstance(getattr(self.env, "unwrapped", None), SyncVectorEnv):
            spec = self.env.unwrapped.envs[0].spec
        return getattr(spec, "id", None)

    def reset(self, seed: int | None = None) -> np.ndarray:
        """Start a new episode everywhere.

        Args:
            seed: From which each environment gets a seed of its own, or None to go on with its generator.

        Returns:
            The first observations, (n, *obs_shape).

        Raises:
            EnvironmentFault: An environment raised or sent what its space does not allow.
            NotFiniteError: NaN or infinity in an observation.
        """
        self.reset_count += 1
        self._step_count = 0
        try:
            obs = self._adapter.reset(seed)
        except Exception as error:
            raise self._fault("reset", error) from error
        self._check_obs(obs, "reset")
        return obs

    def step(self, action: np.ndarray) -> Step:
        """Step every environment with the actions of an algorithm: (n, *shape), in [-1, 1] for a finite Box.

        Raises:
            EnvironmentFault: An environment raised or sent what its space does not allow.
            NotFiniteError: NaN or infinity in an action, observation or reward.
        """
        if not all_finite(action):
            index = first_not_finite(action)
            raise NotFiniteError(
                f"action for environment {index} at step {self._step_count + 1} is not finite: {action[index]}; "
                "the policy's weights may have diverged: try a smaller learning rate or max_grad_norm"
            )
        return self.step_native(self.codec.to_env(action))

    def step_native(self, action: np.ndarray) -> Step:
        """Step every environment with actions in the environments' own units."""
        self._step_count += 1
        where = f"step {self._step_count}"
        try:
            step = self._adapter.step(action)
        except Exception as error:
            raise self._fault(where, error) from error
        self._check_obs(step.obs, where)
        if step.successor is not step.obs:
            self._check_obs(step.successor, where)
        reward = np.asarray(step.reward, dtype=np.float64)
        if not all_finite(reward):
            index = first_not_finite(reward)
            raise NotFiniteError(
                f"environment {index} sent the reward {reward[index]} at step {self._step_count}; "
                "rewards must be finite numbers: check the environment's reward for divisions and logarithms"
            )
        return step._replace(reward=reward)

    def close(self) -> None:
        """Close the environments."""
        self._adapter.close()

    def _check_obs(self, obs: np.ndarray, where: str) -> None:
        if obs.shape != self._batch_shape or not np.can_cast(obs.dtype, self._dtype):
            raise EnvironmentFault(
                f"the vector environment sent observations of shape {obs.shape} and dtype {obs.dtype} at {where}; "
                f"its space promises {self._batch_shape} and {self._dtype}: mend the environment or its space"
            )
        if not all_finite(obs):
            index = first_not_finite(obs)
            raise NotFiniteError(
                f"environment {index} sent an observation that is not finite at {where}: {obs[index]}; "
                "look for divisions by zero or exploding physics in the environment"
            )

    def _fault(self, where: str, error: Exception) -> EnvironmentFault:
        if isinstance(error, EnvironmentFault):
            return error
        who = f"the vector environment {self.env!r}"
        base = getattr(self.env, "unwrapped", self.env)
        if isinstance(base, AsyncVectorEnv):
            killed = _killed_workers(base, patience=1.0 if isinstance(error, (EOFError, OSError)) else 0.0)
            if killed:
                deaths = ", ".join(f"{i} (exit code {code})" for i, code in killed.items())
                return EnvironmentFault(
                    f"the process of environment {deaths} of {self.env!r} died, noticed at {where}; "
                    "it was killed, crashed, or ran out of memory: make the environments anew"
                )
            raised = ", ".join(str(i) for i, pipe in enumerate(base.parent_pipes) if pipe is None)
            if raised:
                who = f"environment {raised} of {self.env!r}"
        return EnvironmentFault(f"{who} raised {type(error).__name__} at {where}: {error}")


class _Watched(gymnasium.Wrapper[Any, Any, Any, Any]):
    """One environment that is named, with the step, when it fails or sends what its space does not allow."""

    def __init__(self, env: gymnasium.Env[Any, Any], index: int) -> None:
        super().__init__(env)
        self._index = index
        self._steps = 0
        self._shape = env.observation_space.shape
        self._dtype = np.dtype(env.observation_space.dtype)

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        try:
            obs, info = self.env.reset(**kwargs)
        except Exception as error:
            raise self._fault("reset", error) from error
        self._check(obs, "reset")
        return obs, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self._steps += 1
        try:
            obs, reward, terminated, truncated, info = self.env.step(action)
        except Exception as error:
            raise self._fault("step", error) from error
        if not (type(obs) is np.ndarray and obs.shape == self._shape and obs.dtype == self._dtype):
            self._check(obs, "step")
        return obs, reward, terminated, truncated, info

    def _check(self, obs: Any, call: str) -> None:
        array = np.asarray(obs)
        is_index = self._shape == () and array.dtype.kind in "iu"
        if array.shape != self._shape or not (is_index or np.can_cast(array.dtype, self._dtype)):
            raise EnvironmentFault(
                f"environment {self._index} ({self._name}) sent an observation of shape {array.shape} and dtype "
                f"{array.dtype} at {self._where(call)}; its observation_space promises {self._shape} and "
                f"{self._dtype}: return an array such as numpy.asarray(obs, dtype=numpy.{self._dtype}) "
                "or correct the space"
            )

    def _fault(self, call: str, error: Exception) -> EnvironmentFault:
        return EnvironmentFault(
            f"environment {self._index} ({self._name}) raised {type(error).__name__} at {self._where(call)}: {error}"
        )

    def _where(self, call: str) -> str:
        return f"its step {self._steps}" if call == "step" else f"reset after {self._steps} steps"

    @property
    def _name(self) -> str:
        return self.spec.id if self.spec is not None else type(self.unwrapped).__name__


def make_environments(env: EnvironmentLike, n_envs: int = 1) -> Environments:
    """Open the door to whatever a user has.

    Args:
        env: An id ("CartPole-v1"), a `gymnasium.Env`, a function that makes one, a list of such functions, a Gymnasium
            ``VectorEnv``, a Stable-Baselines ``VecEnv``, or an `Environments` (returned as it is).
        n_envs: How many to make, at least 1; for an id or a function.

    Returns:
        The environments behind one interface.

    Raises:
        ValueError: The id is unknown, or `n_envs` does not fit what was given.
        TypeError: `env` is none of the above.
    """
    if not isinstance(n_envs, (int, np.integer)) or isinstance(n_envs, bool) or n_envs < 1:
        raise ValueError(f"n_envs must be a whole number, at least 1, not {n_envs!r}")
    if isinstance(env, Environments):
        _require_count(env, env.num_envs, n_envs)
        return env
    if isinstance(env, VectorEnv):
        _require_count(env, env.num_envs, n_envs)
        return Environments(_GymnasiumAdapter(env))
    if isinstance(env, str):
        _make_by_id(env).close()
        return _from_factories([partial(_make_by_id, env)] * n_envs)
    if isinstance(env, gymnasium.Env):
        if n_envs != 1:
            raise ValueError(
                f"n_envs={n_envs} needs {n_envs} environments, but env is one live environment, {env}; "
                "pass its id or a function that makes it, such as lambda: MyEnv()"
            )
        return _from_factories([lambda: env])
    if all(hasattr(env, name) for name in ("step_async", "step_wait", "num_envs", "observation_space")):
        _require_count(env, env.num_envs, n_envs)
        return Environments(_StableBaselinesAdapter(env))
    if isinstance(env, (list, tuple)) and env and all(callable(factory) for factory in env):
        _require_count(env, len(env), n_envs)
        return _from_factories(list(env))
    if callable(env):
        return _from_factories([env] * n_envs)
    raise TypeError(
        f"env must be an id, a gymnasium.Env, a function that makes one, a list of such functions, or a vector "
        f"environment, not {type(env).__module__}.{type(env).__qualname__}"
    )


def _require_count(env: Any, num_envs: int, n_envs: int) -> None:
    if n_envs not in (1, num_envs):
        raise ValueError(f"n_envs={n_envs} does not fit: env already holds {num_envs} environments ({env!r})")


def _make_by_id(env_id: str) -> gymnasium.Env[Any, Any]:
    try:
        return gymnasium.make(env_id)
    except gymnasium.error.DependencyNotInstalled as error:
        raise ValueError(f"environment {env_id!r} needs a package that is not installed: {error}") from error
    except (gymnasium.error.UnregisteredEnv, gymnasium.error.DeprecatedEnv, gymnasium.error.Error) as error:
        if env_id in gymnasium.registry:
            raise
        raise ValueError(f"unknown environment {env_id!r}{_nearest_id(env_id)} ({error})") from error


def _nearest_id(env_id: str) -> str:
    close = nearest(env_id, gymnasium.registry)
    return close if close.startswith("; did") else "; gymnasium.pprint_registry() lists the known ones"


def _from_factories(factories: list[Callable[[], gymnasium.Env[Any, Any]]]) -> Environments:
    made: list[gymnasium.Env[Any, Any]] = []

    def watched(factory: Callable[[], gymnasium.Env[Any, Any]], index: int) -> gymnasium.Env[Any, Any]:
        env = factory()
        if not isinstance(env, gymnasium.Env):
            raise TypeError(
                f"the function for environment {index} returned {type(env).__module__}.{type(env).__qualname__}, "
                "not a gymnasium.Env"
            )
        if any(env.unwrapped is other.unwrapped for other in made):
            raise ValueError(
                f"the function for environment {index} returned the same object as an earlier one; "
                "each environment must be an object of its own: make it inside the function"
            )
        made.append(env)
        return _Watched(env, index)

    makers = [partial(watched, factory, index) for index, factory in enumerate(factories)]
    return Environments(_GymnasiumAdapter(SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)))

"""The one door to environments.

Whatever a user has (an id, a Gymnasium environment, a factory or a list of them, a vector environment in any
autoreset mode, a Stable-Baselines ``VecEnv``) becomes one thing, `Environments`, whose `step` yields the same
`Step` for the same transitions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv

from sbac.adapters import Adapter, GymnasiumAdapter, StableBaselinesAdapter, Step, killed_workers, stack_masks
from sbac.guards import EnvironmentFault, NotFiniteError, nearest
from sbac.observations import MASK, n_choices, value_limits
from sbac.tape import Recording
from sbac.trees import Tree, all_finite, copy_tree, first_not_finite, leaves, rows, set_rows, space_tree, tree_map
from sbac.watched import SameStepVectorEnv, Watched

EnvironmentLike = Any
"""An id, `gymnasium.Env`, factory, list of factories, Gymnasium ``VectorEnv``, or Stable-Baselines ``VecEnv``."""


class Spaces(NamedTuple):
    """What a model that only predicts knows of its environments. Stands in for them where there are none."""

    observation_space: spaces.Space[Any]
    action_space: spaces.Space[Any]
    n_envs: int


class ActionCodec:
    """From the actions of an algorithm to those of an environment, and back.

    An algorithm acts in [-1, 1] wherever the environment's Box is finite, and counts discrete actions from 0. Actions
    of a Dict or Tuple are trees, each part of which is handled as if it stood alone.

    Args:
        space: The action space of one environment.
        rescale: Whether a finite Box is rescaled; False leaves actions in its own units, clipped to its bounds.
    """

    def __init__(self, space: spaces.Space[Any], rescale: bool = True) -> None:
        self.space = space
        self.rescales = False
        self._parts: Tree = None  # of a Dict or Tuple, a codec in the place of each part
        if isinstance(space, (spaces.Dict, spaces.Tuple)):
            self._parts = tree_map(lambda part: ActionCodec(part, rescale), space_tree(space))
        if isinstance(space, spaces.Box):
            self._dtype = np.dtype(space.dtype)
            self._low = space.low.astype(np.float64)
            self._high = space.high.astype(np.float64)
            self.rescales = rescale and bool(np.isfinite(self._low).all() and np.isfinite(self._high).all())
            self._center = (self._high / 2 + self._low / 2) if self.rescales else np.zeros_like(self._low)
            self._half_range = (self._high / 2 - self._low / 2) if self.rescales else np.ones_like(self._low)
            if self.rescales:
                # Where rounding would keep +-1 off a bound, reach a little beyond it: `to_env` clips.
                short = (self._center + self._half_range < self._high) | (self._center - self._half_range > self._low)
                self._half_range += short * np.spacing(np.maximum(np.abs(self._low), np.abs(self._high)))
        elif isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
            self._start = space.start
            self._counts_from_0 = not np.any(space.start)

    def to_env(self, action: Tree) -> Tree:
        """Actions (..., *shape) of an algorithm in the environment's own units, inside its bounds.

        They are copies, since an environment may write into what it is sent.
        """
        if self._parts is not None:
            return tree_map(lambda codec, part: codec.to_env(part), self._parts, action)
        if isinstance(self.space, spaces.Box):
            native = np.minimum(np.maximum(self._center + self._half_range * action, self._low), self._high)
            return (np.rint(native) if self._dtype.kind in "iu" else native).astype(self._dtype)
        if isinstance(self.space, (spaces.Discrete, spaces.MultiDiscrete)):
            native = action if self._counts_from_0 else action + self._start
            return native.astype(self.space.dtype)
        return action.astype(self.space.dtype)

    def from_env(self, action: Tree) -> Tree:
        """Actions (..., *shape) of an environment in the units of an algorithm."""
        if self._parts is not None:
            return tree_map(lambda codec, part: codec.from_env(part), self._parts, action)
        if isinstance(self.space, spaces.Box):
            half_range = np.where(self._half_range > 0, self._half_range, 1.0)
            return ((np.asarray(action, dtype=np.float64) - self._center) / half_range).astype(np.float32)
        if isinstance(self.space, (spaces.Discrete, spaces.MultiDiscrete)):
            return np.asarray(action) - self._start
        return np.asarray(action)


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

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self.env = adapter.env
        self.num_envs = adapter.num_envs
        self.observation_space = adapter.observation_space
        self.action_space = adapter.action_space
        self.codec = ActionCodec(self.action_space)
        self.reset_count = 0
        self._step_count = 0
        self._n_choices = n_choices(self.action_space)
        self._sends_masks = False
        self._promised = {
            name: ((self.num_envs, *(leaf.shape or ())), np.dtype(leaf.dtype))
            for name, leaf in leaves(space_tree(self.observation_space))
        }
        # What an observation without parts and limits is to be, looked at first.
        self._plain = self._promised[""] if isinstance(self.observation_space, spaces.Box) else None
        self._limits = {
            name: limits
            for name, leaf in leaves(space_tree(self.observation_space))
            if (limits := value_limits(leaf)) is not None
        }

    @property
    def env_id(self) -> str | None:
        """The Gymnasium id that the environments were made from, where there is one."""
        spec = getattr(self.env, "spec", None)
        if spec is None and isinstance(getattr(self.env, "unwrapped", None), SyncVectorEnv):
            spec = self.env.unwrapped.envs[0].spec
        return getattr(spec, "id", None)

    def reset(self, seed: int | None = None) -> Tree:
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
        except EnvironmentFault:
            raise  # as it is, with what caused it
        except Exception as error:
            raise self._fault("reset", error) from error
        self._check_obs(obs, "reset")
        self._sends_masks = self._n_choices > 0 and self._adapter.action_mask is not None
        return self._with_mask(obs, np.ones(self.num_envs, bool), "reset")

    def step(self, action: Tree, codec: ActionCodec | None = None) -> Step:
        """Step every environment with the actions of an algorithm.

        Args:
            action: (n, *shape), in [-1, 1] for a finite Box.
            codec: Of an algorithm that acts in other units.

        Raises:
            EnvironmentFault: An environment raised or sent what its space does not allow.
            NotFiniteError: NaN or infinity in an action, observation or reward.
        """
        for part in (action,) if type(action) is np.ndarray else [part for _, part in leaves(action)]:
            if not all_finite(part):
                index = first_not_finite(part)
                raise NotFiniteError(
                    f"action for environment {index} at step {self._step_count + 1} is not finite: {part[index]}; "
                    "the policy's weights may have diverged: try a smaller learning rate or max_grad_norm"
                )
        return self.step_native((codec or self.codec).to_env(action))

    def step_native(self, action: Tree) -> Step:
        """Step every environment with actions in the environments' own units."""
        self._step_count += 1
        where = f"step {self._step_count}"
        try:
            step = self._adapter.step(action)
        except EnvironmentFault:
            raise
        except Exception as error:
            raise self._fault(where, error) from error
        self._check_obs(step.obs, where)
        if step.successor is not step.obs:
            self._check_obs(step.successor, where)
        reward = np.asarray(step.reward, np.float64)
        if not all_finite(reward):
            index = first_not_finite(reward)
            raise NotFiniteError(
                f"{self._who(index)} sent the reward {reward[index]} at step {self._step_count}; "
                "rewards must be finite numbers: check the environment's reward for divisions and logarithms"
            )
        if reward is not step.reward:
            step = step._replace(reward=reward)
        if self._sends_masks or self._adapter.action_mask is not None or MASK in self._promised:
            step = step._replace(obs=self._with_mask(step.obs, ~(step.terminated | step.truncated), where))
        return step

    def _with_mask(self, obs: Tree, goes_on: np.ndarray, where: str) -> Tree:
        """Observations with the masks of allowed actions that the infos hold put beside them; see `split_mask`."""
        is_among_them = isinstance(self.observation_space, spaces.Dict) and MASK in self.observation_space.spaces
        mask = obs[MASK] if is_among_them else self._adapter.action_mask
        if mask is None or not self._n_choices:
            if self._sends_masks:
                raise EnvironmentFault(f"no environment sent an {MASK} in its info at {where}, as they did before")
            return obs
        if mask[0].size != self._n_choices or not (is_among_them or self._sends_masks):
            raise EnvironmentFault(
                f"the environments sent an {MASK} of shape {mask.shape} at {where}; it must come with reset and each "
                f"step, and for actions of {self.action_space} it has {self._n_choices} numbers"
            )
        # Once an episode is over, nothing need be allowed.
        stuck = goes_on & ~mask.reshape(self.num_envs, -1).any(1)
        if stuck.any():
            raise EnvironmentFault(
                f"environment {int(np.argmax(stuck))} sent an {MASK} that allows nothing at {where}; a state in which "
                "nothing can be done must end the episode"
            )
        return obs if is_among_them else {"observation": obs, MASK: mask}

    def recordings(self) -> list[Recording | None]:
        """What it takes to put each environment back; None for one that can't be."""
        return [env.tape.recording() for env in self._watched] or [None] * self.num_envs

    def put_back(
        self, recordings: Sequence[Recording | None], obs: Tree, returns: np.ndarray, seed: int | None
    ) -> tuple[Tree, dict[int, str]]:
        """Bring every environment to where it was when it was recorded; where that fails, begin a new episode.

        Args:
            recordings: As `recordings` gave them.
            obs: What was to be acted on next, (n, *obs_shape). What is found must equal it bit for bit.
            returns: The sum of the rewards of each running episode, (n,). Likewise.
            seed: For the new episodes, or None to go on with the environments' generators.

        Returns:
            What is to be acted on next, (n, *obs_shape); and for each environment that was not put back, why.

        Raises:
            EnvironmentFault: An environment raised or sent what its space does not allow at the start of an episode.
        """
        if not self._watched:
            unknown = "it is not one that sbac made from an id or a function"
            return self.reset(seed), dict.fromkeys(range(self.num_envs), unknown)
        self.reset_count += 1
        self._step_count = 0
        obs, failed = copy_tree(obs), {}
        for i, (env, recording) in enumerate(zip(self._watched, recordings, strict=True)):
            why = env.put_back(recording, rows(obs, i), float(returns[i]))
            if why is not None:
                failed[i] = why
                first, _ = env.reset(seed=None if seed is None else seed + i)
                set_rows(obs, i, first)
        self._adapter.action_mask = stack_masks([env.action_mask for env in self._watched])
        self._sends_masks = self._n_choices > 0 and self._adapter.action_mask is not None
        return self._with_mask(obs, np.ones(self.num_envs, bool), "reset"), failed

    @property
    def _watched(self) -> list[Watched]:
        inner = getattr(self.env, "envs", ())
        return [env for env in inner if isinstance(env, Watched)]

    def close(self) -> None:
        """Close the environments."""
        self._adapter.close()

    def _check_obs(self, obs: Tree, where: str) -> None:
        if type(obs) is np.ndarray and (obs.shape, obs.dtype) == self._plain and all_finite(obs):
            return
        sent = dict(leaves(obs))
        if sent.keys() != self._promised.keys():
            raise EnvironmentFault(
                f"{self.env!r} sent observations with the parts {sorted(sent)} at {where}; "
                f"its space promises {sorted(self._promised)}: mend the environment or its space"
            )
        for name, array in sent.items():
            shape, dtype = self._promised[name]
            part = f" ({name})" if name else ""
            if array.shape != shape or not np.can_cast(array.dtype, dtype):
                raise EnvironmentFault(
                    f"{self.env!r} sent observations{part} of shape {array.shape} and dtype {array.dtype} at {where}; "
                    f"its space promises {shape} and {dtype}: mend the environment or its space"
                )
            if name in self._limits:
                low, high = self._limits[name]
                outside = ((array < low) | (array > high)).reshape(self.num_envs, -1).any(1)
                if outside.any():
                    index = int(np.argmax(outside))
                    raise EnvironmentFault(
                        f"{self._who(index)} sent the observation{part} {array[index]} at {where}, which is outside "
                        f"its space: from {low} to {high}"
                    )
            if not all_finite(array):
                index = first_not_finite(array)
                raise NotFiniteError(
                    f"{self._who(index)} sent an observation{part} that is not finite at {where}: {array[index]}; "
                    "look for divisions by zero or exploding physics in the environment"
                )

    def _who(self, index: int) -> str:
        return f"environment {index}" if self._watched else f"environment {index} of {self.env!r}"

    def _fault(self, where: str, error: Exception) -> EnvironmentFault:
        who = f"the vector environment {self.env!r}"
        base = getattr(self.env, "unwrapped", self.env)
        if isinstance(base, AsyncVectorEnv):
            killed = killed_workers(base, patience=1.0 if isinstance(error, (EOFError, OSError)) else 0.0)
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
        return Environments(GymnasiumAdapter(env))
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
        return Environments(StableBaselinesAdapter(env))
    if isinstance(env, (list, tuple)) and env and all(callable(factory) for factory in env):
        _require_count(env, len(env), n_envs)
        return _from_factories(list(env))
    if callable(env):
        return _from_factories([env] * n_envs)
    raise TypeError(
        f"env must be an id, a gymnasium.Env, a function that makes one, a list of such functions, or a vector "
        f"environment, not {type(env).__module__}.{type(env).__qualname__}"
    )


def number_to_make(env: EnvironmentLike, n_envs: int) -> int:
    """What `make_environments` takes for `n_envs`: that number for an id, a function or a class, else 1."""
    is_class = isinstance(env, type)
    return n_envs if isinstance(env, str) or (callable(env) and (is_class or not hasattr(env, "step"))) else 1


def require_spaces(env: Any, model: Any, name: str = "the model") -> None:
    """Refuse environments with other spaces than a model's.

    Args:
        env: What has an ``observation_space`` and an ``action_space``.
        model: What has those of the model.
        name: What the message calls the model.

    Raises:
        ValueError: Naming both spaces.
    """
    for what in ("observation_space", "action_space"):
        own, given = getattr(model, what), getattr(env, what)
        if own != given:
            raise ValueError(
                f"the environment has another {what.replace('_', ' ')} than {name}: the model was made for {own}, "
                f"the environment has {given}"
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
        return Watched(env, index)

    makers = [partial(watched, factory, index) for index, factory in enumerate(factories)]
    return Environments(GymnasiumAdapter(SameStepVectorEnv(makers)))

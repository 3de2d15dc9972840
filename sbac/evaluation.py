"""How good is a policy: the returns and lengths of whole episodes, without training."""

from __future__ import annotations

import os
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, Self, overload

import gymnasium
import numpy as np
from gymnasium.vector import VectorRewardWrapper
from gymnasium.wrappers import NormalizeReward, RecordEpisodeStatistics
from gymnasium.wrappers.vector import NormalizeReward as VectorNormalizeReward
from gymnasium.wrappers.vector import RecordEpisodeStatistics as VectorRecordEpisodeStatistics

from sbac.envs import EnvironmentLike, Environments, make_environments

EvaluationCallback = Callable[[dict[str, Any], dict[str, Any]], Any]

_REWARD_WRAPPERS = (gymnasium.RewardWrapper, NormalizeReward, VectorRewardWrapper, VectorNormalizeReward)
_RECORDERS = (RecordEpisodeStatistics, VectorRecordEpisodeStatistics)


class Predictor(Protocol):
    """Whatever chooses actions for a batch of observations, in the environment's own units."""

    def predict(
        self, observation: Any, /, state: Any = None, episode_start: Any = None, deterministic: bool = True
    ) -> tuple[Any, Any]:
        """Actions (n, *action_shape) for observations (n, *obs_shape), and the state; as `BaseAlgorithm.predict`."""


class Episodes(NamedTuple):
    """Finished episodes, in the order in which they ended."""

    returns: list[float]
    lengths: list[int]
    infos: list[dict[str, Any]]  # what the environment sent with each episode's last step

    def successes(self) -> list[float]:
        """Whether each episode succeeded, by ``is_success`` in its last info; NaN where that is missing."""
        return [float(info.get("is_success", np.nan)) for info in self.infos]

    def summary(self) -> dict[str, float]:
        """The means: ``mean_reward``, ``mean_ep_length`` and, where infos tell, ``success_rate``."""
        numbers = {
            "mean_reward": float(np.mean(self.returns)),
            "mean_ep_length": float(np.mean(self.lengths)),
        }
        successes = self.successes()
        if not np.isnan(successes).all():
            numbers["success_rate"] = float(np.nanmean(successes))
        return numbers


@dataclass
class Evaluations:
    """The evaluations of one training, in memory and as ``evaluations.npz``.

    The file holds the same four arrays; ``successes`` only where an environment sent ``is_success``.

    Attributes:
        timesteps: When each evaluation was, (n,).
        results: The returns of its episodes, (n, n_eval_episodes).
        ep_lengths: Their lengths, (n, n_eval_episodes).
        successes: Whether each succeeded, NaN where its last info did not tell, (n, n_eval_episodes).
    """

    timesteps: list[int] = field(default_factory=list)
    results: list[list[float]] = field(default_factory=list)
    ep_lengths: list[list[int]] = field(default_factory=list)
    successes: list[list[float]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path, n_eval_episodes: int, until: int) -> Self:
        """The evaluations up to step `until` from the file in a folder, or none where there is no file.

        Raises:
            ValueError: The file is damaged, or its evaluations have another number of episodes.
        """
        path = folder / "evaluations.npz"
        if not path.exists():
            return cls()
        try:
            with np.load(path) as file:
                arrays = dict(file)
            timesteps, results, ep_lengths = (arrays[name] for name in ("timesteps", "results", "ep_lengths"))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{path} holds no evaluations that could be continued ({error}); move it away or change log_path"
            ) from error
        if results.ndim != 2 or results.shape[1] != n_eval_episodes:
            raise ValueError(
                f"{path} holds results of shape {results.shape}, which evaluations of {n_eval_episodes} "
                "episodes cannot continue; keep n_eval_episodes or change log_path"
            )
        successes = arrays.get("successes", np.full(results.shape, np.nan))
        kept = timesteps <= until
        return cls(*(array[kept].tolist() for array in (timesteps, results, ep_lengths, successes)))

    def add(self, timestep: int, episodes: Episodes) -> None:
        """Append one evaluation."""
        self.timesteps.append(timestep)
        self.results.append(episodes.returns)
        self.ep_lengths.append(episodes.lengths)
        self.successes.append(episodes.successes())

    def best(self) -> float:
        """The best mean return, minus infinity where there is none."""
        return max((float(np.mean(returns)) for returns in self.results), default=-np.inf)

    def write(self, folder: Path) -> None:
        """Write the file; a reader, or a crash, finds the old one or the new one, never a part."""
        arrays: dict[str, Any] = asdict(self)
        if np.isnan(self.successes).all():
            del arrays["successes"]
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / "evaluations.npz.tmp"
        with unfinished.open("wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(folder / "evaluations.npz")


@overload
def evaluate_policy(
    model: Predictor,
    env: EnvironmentLike,
    n_eval_episodes: int = ...,
    deterministic: bool = ...,
    render: bool = ...,
    callback: EvaluationCallback | None = ...,
    reward_threshold: float | None = ...,
    return_episode_rewards: Literal[False] = ...,
    warn: bool = ...,
    seed: int | None = ...,
) -> tuple[float, float]: ...


@overload
def evaluate_policy(
    model: Predictor,
    env: EnvironmentLike,
    n_eval_episodes: int = ...,
    deterministic: bool = ...,
    render: bool = ...,
    callback: EvaluationCallback | None = ...,
    reward_threshold: float | None = ...,
    *,
    return_episode_rewards: Literal[True],
    warn: bool = ...,
    seed: int | None = ...,
) -> tuple[list[float], list[int]]: ...


def evaluate_policy(
    model: Predictor,
    env: EnvironmentLike,
    n_eval_episodes: int = 10,
    deterministic: bool = True,
    render: bool = False,
    callback: EvaluationCallback | None = None,
    reward_threshold: float | None = None,
    return_episode_rewards: bool = False,
    warn: bool = True,
    seed: int | None = None,
) -> tuple[float, float] | tuple[list[float], list[int]]:
    """Run a policy for whole episodes and measure its undiscounted returns.

    The episodes are shared out evenly among the environments before the first step. Taking whichever episodes
    end first would count the short ones too often.

    Args:
        model: A trained algorithm, or any object with its `predict`.
        env: What `sbac.envs.make_environments` takes, or the `Environments` that it returns. Those made here,
            from an id or functions, are closed here.
        n_eval_episodes: How many episodes, at least 1.
        deterministic: Whether to take the policy's mean or most likely action, rather than a sample.
        render: Whether to call the environment's `render` after each step.
        callback: Called as ``callback(locals(), globals())`` for each environment at each of its steps, with
            ``i``, ``reward``, ``done``, ``info``, ``current_rewards``, ``episode_rewards`` as locals.
        reward_threshold: The mean return that must be exceeded.
        return_episode_rewards: Whether to return every episode instead of mean and standard deviation.
        warn: Whether to warn when a wrapper changes the rewards that are measured.
        seed: For the environments' first reset, or None to go on with their generators.

    Returns:
        Mean and standard deviation of the returns, or the lists of returns and lengths. Where the environment
        records its episodes itself (`RecordEpisodeStatistics`, a monitor), what it recorded is taken.

    Raises:
        ValueError: `n_eval_episodes` is below 1.
        TypeError: `model` has no `predict`.
        AssertionError: The mean return does not exceed `reward_threshold`.
    """
    own = getattr(model, "env", None)
    if isinstance(own, Environments) and any(layer is env for layer in layers(own)):
        env = own  # through the model's own door, so that learning on notices the reset
    environments, made_here = open_environments(env)
    if isinstance(own, Environments) and environments is not own and share_layers(environments, own):
        own.reset_count += 1  # the model's environment in other wrappers: likewise, learning on begins new episodes
    try:
        if hasattr(model, "check_env"):
            model.check_env(environments)
        episodes = run_episodes(model, environments, n_eval_episodes, deterministic, render, callback, warn, seed)
    finally:
        if made_here:
            environments.close()
    mean = float(np.mean(episodes.returns))
    if reward_threshold is not None and not mean > reward_threshold:
        raise AssertionError(
            f"the mean return over {n_eval_episodes} episodes is {mean:.6g}, not above "
            f"reward_threshold={reward_threshold:.6g}"
        )
    if return_episode_rewards:
        return episodes.returns, episodes.lengths
    return mean, float(np.std(episodes.returns))


def run_episodes(
    model: Predictor,
    env: Environments,
    n_eval_episodes: int,
    deterministic: bool = True,
    render: bool = False,
    callback: EvaluationCallback | None = None,
    warn: bool = True,
    seed: int | None = None,
) -> Episodes:
    """Run whole episodes: `evaluate_policy` with every episode's return, length and last info.

    The local variables bear the names that callbacks written for Stable-Baselines read.
    """
    if n_eval_episodes < 1:
        raise ValueError(f"n_eval_episodes must be at least 1, not {n_eval_episodes!r}")
    if not callable(getattr(model, "predict", None)):
        raise TypeError(f"model must have a method predict; {type(model).__qualname__} has none")
    if warn:
        _warn_of_changed_rewards(env)
    is_monitor_wrapped = _is_monitored(env)

    n_envs = env.num_envs
    share, rest = divmod(n_eval_episodes, n_envs)
    episode_count_targets = np.array([share + (i < rest) for i in range(n_envs)])
    episode_counts = np.zeros(n_envs, dtype=int)
    episode_rewards: list[float] = []
    episode_lengths: list[int] = []
    last_infos: list[dict[str, Any]] = []

    current_rewards = np.zeros(n_envs)
    current_lengths = np.zeros(n_envs, dtype=int)
    observations = env.reset(seed=seed)
    states = None
    episode_starts = np.ones(n_envs, dtype=bool)
    while (episode_counts < episode_count_targets).any():
        actions, states = model.predict(
            observations, state=states, episode_start=episode_starts, deterministic=deterministic
        )
        step = env.step_native(actions)
        observations, rewards, infos = step.obs, step.reward, step.infos
        dones = (step.terminated | step.truncated) & step.valid
        current_rewards += np.where(step.valid, rewards, 0.0)
        current_lengths += step.valid
        # After an empty reset step too, the next observation is an episode's first.
        episode_starts = dones | ~step.valid

        # Without a callback only the ends matter: looking at every info costs more than the step.
        for i in np.flatnonzero(step.valid if callback is not None else dones).tolist():
            if episode_counts[i] == episode_count_targets[i]:
                continue
            reward, done, info = float(rewards[i]), bool(dones[i]), infos[i]
            if callback is not None:
                callback(locals(), globals())
            record = info.get("episode")
            # In a monitored environment an end that the monitor did not see is a lost life, not an episode.
            if done and (record is not None or not is_monitor_wrapped):
                episode_rewards.append(float(current_rewards[i] if record is None else record["r"]))
                episode_lengths.append(int(current_lengths[i] if record is None else record["l"]))
                last_infos.append(info)
                episode_counts[i] += 1
        current_rewards[dones] = 0.0
        current_lengths[dones] = 0
        if render:
            env.env.render()
    return Episodes(episode_rewards, episode_lengths, last_infos)


def open_environments(env: EnvironmentLike) -> tuple[Environments, bool]:
    """The door to `env`, and whether its environments were made here, so that they are to be closed here."""
    made_here = isinstance(env, type) or not hasattr(env, "reset")
    return make_environments(env), made_here


def layers(env: Any) -> Iterator[Any]:
    """A door or environment and all that it wraps in this process, from the outside in."""
    yield env
    inside = getattr(env, "__dict__", {})
    several = inside.get("envs")
    for inner in (
        inside.get("env"),
        inside.get("venv"),
        *(several if isinstance(several, list | tuple) else ()),
    ):
        if hasattr(inner, "step"):
            yield from layers(inner)


def share_layers(env: Any, other: Any) -> bool:
    """Whether two doors or environments share a vector environment, a wrapper or an environment."""
    known = {id(layer) for layer in layers(other)}
    return any(id(layer) in known for layer in layers(env))


def vec_normalizers(env: Any) -> list[Any]:
    """Each `VecNormalize` of Stable-Baselines in a door or environment, from the outside in.

    Somebody who made one has imported it, so its class need not be imported here.
    """
    module = sys.modules.get("stable_baselines3.common.vec_env.vec_normalize")
    return [] if module is None else [layer for layer in layers(env) if isinstance(layer, module.VecNormalize)]


def share_statistics(env: Environments, training_env: Any) -> None:
    """Let each `VecNormalize` of an evaluation know what that of the training has seen up to now.

    Raises:
        ValueError: Only one of the two normalises observations so, or not as often.
    """
    ours, theirs = ([layer for layer in vec_normalizers(either) if layer.norm_obs] for either in (env, training_env))
    if len(ours) != len(theirs):
        raise ValueError(
            f"eval_env normalises observations by {len(ours)} VecNormalize, the training environment by {len(theirs)}: "
            "the policy would not see there what it learned from; wrap both alike, or let the model normalise "
            "(normalize_obs=True)"
        )
    for own, other in zip(ours, theirs, strict=True):
        own.obs_rms, own.ret_rms = deepcopy((other.obs_rms, other.ret_rms))


def require_apart(env: Environments, model: Any, training_env: Any, warn: bool) -> None:
    """See that a model in training can be evaluated in `env`: other environments, with its spaces.

    Raises:
        ValueError: Evaluation and training share a vector environment, a wrapper or an environment.
    """
    if share_layers(env, training_env):
        raise ValueError(
            "eval_env is the training environment itself, whose episodes an evaluation would cut off; pass "
            "another environment, such as the id or the function that made this one"
        )
    for name in ("observation_space", "action_space") if warn else ():
        ours, theirs = getattr(env, name), getattr(model, name)
        if ours != theirs:
            warnings.warn(f"eval_env has the {name} {ours}, the model {theirs}", stacklevel=2)


def evaluation_seed(seed: int | None, num_timesteps: int) -> int | None:
    """A seed for the evaluation at a step, apart from all that a model draws from its own `seed`."""
    if seed is None:
        return None
    stream = 0x5EED
    return int(
        np.random.SeedSequence([seed, stream, num_timesteps]).generate_state(1)[0] >> 1
    )  # some take 31 bits only


def _warn_of_changed_rewards(env: Environments) -> None:
    """Warn of a reward wrapper, unless the episodes are recorded inside it."""
    changed_by: str | None = None
    if any(layer.norm_reward for layer in vec_normalizers(env)) and not _is_monitored(env):
        changed_by = "VecNormalize"  # outside all single environments
    for layer in layers(env):
        if isinstance(layer, _REWARD_WRAPPERS):
            changed_by = type(layer).__name__
        elif isinstance(layer, _RECORDERS):
            changed_by = None
    if changed_by is not None:
        warnings.warn(
            f"the returns are those of the rewards as changed by {changed_by}; to measure the environment's "
            "own, put RecordEpisodeStatistics inside that wrapper or leave the wrapper out",
            stacklevel=4,
        )


def _is_monitored(env: Environments) -> bool:
    """Whether these are Stable-Baselines environments that all have its monitor.

    Somebody who made such an environment has imported the monitor, so its class need not be imported here.
    """
    module = sys.modules.get("stable_baselines3.common.monitor")
    if module is None or not hasattr(env.env, "env_is_wrapped"):
        return False
    return all(env.env.env_is_wrapped(module.Monitor))

"""Exploration noise for continuous actions, in the units of the algorithm's actions: [-1, 1].

An object samples for all environments at once, independently for each. An algorithm works on its own deep
copy, which it binds to its number of environments, its action shape and its random generator. An object
that is not bound draws one sample at a time, in the shape of its parameters, from a generator of its own.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike


class ActionNoise(ABC):
    """Noise that is added to the actions of a deterministic policy.

    Attributes:
        n_envs: number of environments it samples for; None before `bind`.
    """

    def __init__(self) -> None:
        self.n_envs: int | None = None
        self._generator = np.random.default_rng()

    @abstractmethod
    def __call__(self) -> np.ndarray:
        """Draw the next sample: (n_envs, act_dim), or (act_dim,) before `bind`."""

    @abstractmethod
    def bind(self, n_envs: int, shape: tuple[int, ...], generator: np.random.Generator) -> None:
        """Fix what to sample for, and start afresh.

        Args:
            n_envs: number of environments, at least 1.
            shape: shape of one environment's action, (act_dim,).
            generator: the source of all later samples; shared with the caller, not copied.

        Raises:
            ValueError: if `n_envs` is less than 1 or a parameter does not fit the shape of the actions.
        """

    def reset(self, indices: Iterable[int] | np.ndarray | None = None) -> None:
        """Forget the past at the start of an episode. Noise without a past has nothing to do.

        Args:
            indices: the environments to reset, as numbers or as a boolean mask (n_envs,); all if None.

        Raises:
            ValueError: if `indices` are given before `bind`.
            IndexError: if there is no such environment.
        """
        self._chosen(indices)

    def __repr__(self) -> str:
        arguments = {name: value for name, value in self.to_config().items() if name not in ("kind", "dtype")}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in arguments.items())})"

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """Return the parameters as data that JSON can hold; `noise_from_config` turns them back."""

    @property
    def scale(self) -> float | None:
        """How far the noise reaches, as logged; None where it has no such number."""
        return None

    def get_state(self) -> dict[str, np.ndarray]:
        """Return a copy of what the next sample depends on, except the generator, which its owner saves."""
        return {}

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from what `get_state` returned.

        Args:
            state: arrays by name.

        Raises:
            ValueError: if names or shapes are not those of this object.
        """
        self._check_state_names(state)

    def _check_state_names(self, state: Mapping[str, np.ndarray]) -> None:
        expected = self.get_state().keys()
        if state.keys() != expected:
            raise ValueError(
                f"{type(self).__name__}.set_state: the state must hold {sorted(expected)}, got {sorted(state)}."
            )

    def _chosen(self, indices: Iterable[int] | np.ndarray | None) -> np.ndarray:
        """The numbers of the chosen environments."""
        everyone = np.arange(self.n_envs or 1)
        if indices is None:
            return everyone
        if self.n_envs is None:
            raise ValueError(
                f"{type(self).__name__}.reset: no environments to choose {indices!r} from before bind; "
                "call bind first, or reset without indices."
            )
        wanted = indices if isinstance(indices, np.ndarray) else np.array(list(indices))
        return everyone[wanted if wanted.size else []]


class _GaussianNoise(ActionNoise):
    """What Gaussian noise with and without memory have in common: parameters, shape and generator."""

    def __init__(self, mean: ArrayLike, sigma: ArrayLike, dtype: DTypeLike) -> None:
        super().__init__()
        self.mean = self._parameter("mean", mean)
        self.sigma = self._parameter("sigma", sigma)
        if np.any(self.sigma < 0.0):
            raise ValueError(f"{type(self).__name__}: sigma must not be negative, got {sigma!r}.")

        self.dtype = np.dtype(dtype)
        if self.dtype.kind != "f":
            raise ValueError(f"{type(self).__name__}: dtype must be a floating-point type, got {dtype!r}.")

        shapes = {name: parameter.shape for name, parameter in self._parameters().items() if parameter.ndim}
        if len(set(shapes.values())) > 1:
            raise ValueError(
                f"{type(self).__name__}: the shapes {shapes} differ: "
                "give one value per action dimension, or one number."
            )
        self._shape: tuple[int, ...] = next(iter(shapes.values()), ())

    def bind(self, n_envs: int, shape: tuple[int, ...], generator: np.random.Generator) -> None:
        if n_envs < 1:
            raise ValueError(f"{type(self).__name__}.bind: n_envs must be at least 1, got {n_envs!r}.")
        for name, parameter in self._parameters().items():
            if parameter.shape not in ((), tuple(shape)):
                raise ValueError(
                    f"{type(self).__name__}: {name} has shape {parameter.shape}, but the actions have shape "
                    f"{tuple(shape)}: give one value per action dimension, or one number."
                )
        self.n_envs = n_envs
        self._shape = (n_envs, *shape)
        self._generator = generator

    @property
    def scale(self) -> float:
        """The mean of sigma over the action dimensions."""
        return float(np.mean(self.sigma))

    def _parameters(self) -> dict[str, np.ndarray]:
        return {"mean": self.mean, "sigma": self.sigma}

    def _parameter(self, name: str, value: ArrayLike) -> np.ndarray:
        try:
            array = np.array(value, dtype=np.float64)
        except (TypeError, ValueError):
            raise ValueError(f"{type(self).__name__}: {name} must hold numbers, got {value!r}.") from None
        if not np.all(np.isfinite(array)):
            raise ValueError(f"{type(self).__name__}: {name} must be finite, got {value!r}.")
        return array


class NormalActionNoise(_GaussianNoise):
    """Gaussian noise, independent from step to step: N(mean, sigma^2).

    The exploration of TD3: Fujimoto et al. 2018, arXiv:1802.09477, section 6.1, with mean 0 and sigma 0.1.

    Args:
        mean: mean of each action dimension, (act_dim,) or one number.
        sigma: standard deviation of each action dimension, (act_dim,) or one number, not negative.
        dtype: type of the samples.

    Raises:
        ValueError: if a parameter is not finite, `sigma` is negative, or shapes do not agree.
    """

    def __init__(self, mean: ArrayLike, sigma: ArrayLike, dtype: DTypeLike = np.float32) -> None:
        super().__init__(mean, sigma, dtype)

    def __call__(self) -> np.ndarray:
        sample = self.mean + self.sigma * self._generator.standard_normal(self._shape)
        return np.array(sample, dtype=self.dtype)

    def to_config(self) -> dict[str, Any]:
        return {
            "kind": "normal",
            "mean": self.mean.tolist(),
            "sigma": self.sigma.tolist(),
            "dtype": self.dtype.name,
        }


class OrnsteinUhlenbeckActionNoise(_GaussianNoise):
    """Noise with a memory, a particle that friction pulls back to the mean, in steps of Euler and Maruyama.

    x <- x + theta (mean - x) dt + sigma sqrt(dt) N(0, 1)

    Uhlenbeck & Ornstein 1930, Physical Review 36, 823; as the exploration of DDPG: Lillicrap et al. 2015,
    arXiv:1509.02971, section 7, with theta 0.15 and sigma 0.2.

    With a = 1 - theta dt, the steps are the autoregression x <- mean + a (x - mean) + sigma sqrt(dt) N(0, 1).
    In the long run, whatever the start, for |a| < 1,

    - its mean is `mean`,
    - its variance is sigma^2 dt / (1 - a^2) = sigma^2 dt / (1 - (1 - theta dt)^2), about sigma^2 / (2 theta)
      for a small theta dt,
    - its autocorrelation over k steps is a^k = (1 - theta dt)^k: it forgets in about 1 / (theta dt) steps.

    With theta 0.15 and sigma 0.2 the standard deviation is 0.37 for dt = 0.01 and 0.38 for dt = 1: the time
    step hardly changes how far the noise goes, but the first forgets in 667 steps and the second in 7. An
    episode shorter than that starts at `initial_noise` and sees less than the stationary spread.

    Many course implementations draw from `random.random()`, uniform on [0, 1), where the paper has N(0, 1);
    they also leave out dt, which is dt = 1. The mean of such a draw is 0.5, not 0, so that the noise drifts
    to a stationary mean of mean + sigma 0.5 / theta: 0.67 for theta 0.15 and sigma 0.2, which pushes nearly
    all actions to one side. sbac follows the paper.

    Args:
        mean: where the noise is pulled to, (act_dim,) or one number.
        sigma: spread, per square root of time, (act_dim,) or one number, not negative.
        theta: rate of the pull, per unit of time, above 0.
        dt: time that one step takes, above 0; theta dt must stay below 2.
        initial_noise: where the noise starts, before the first step of an episode, (act_dim,) or one number;
            0 if None.
        dtype: type of the samples. The state itself is kept in float64.

    Raises:
        ValueError: if a parameter is not finite or out of its range, or shapes do not agree.
    """

    def __init__(
        self,
        mean: ArrayLike,
        sigma: ArrayLike,
        theta: float = 0.15,
        dt: float = 1e-2,
        initial_noise: ArrayLike | None = None,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.initial_noise = self._parameter("initial_noise", 0.0 if initial_noise is None else initial_noise)
        super().__init__(mean, sigma, dtype)
        for name, value in (("theta", theta), ("dt", dt)):
            if not 0.0 < value < np.inf:
                raise ValueError(f"OrnsteinUhlenbeckActionNoise: {name} must be above 0 and finite, got {value!r}.")
        if theta * dt >= 2.0:
            raise ValueError(
                f"OrnsteinUhlenbeckActionNoise: theta * dt must be below 2, got {theta!r} * {dt!r}: "
                "each step would overshoot the mean by as much as it was off, or more, and never settle."
            )
        self.theta = float(theta)
        self.dt = float(dt)
        self._state: np.ndarray
        self.reset()

    def __call__(self) -> np.ndarray:
        pull = self.theta * (self.mean - self._state) * self.dt
        kick = self.sigma * np.sqrt(self.dt) * self._generator.standard_normal(self._shape)
        self._state = self._state + pull + kick
        return np.array(self._state, dtype=self.dtype)

    def bind(self, n_envs: int, shape: tuple[int, ...], generator: np.random.Generator) -> None:
        super().bind(n_envs, shape, generator)
        self.reset()

    def reset(self, indices: Iterable[int] | np.ndarray | None = None) -> None:
        if indices is None:
            self._state = np.broadcast_to(self.initial_noise, self._shape).copy()
        else:
            self._state[self._chosen(indices)] = self.initial_noise

    def to_config(self) -> dict[str, Any]:
        return {
            "kind": "ornstein_uhlenbeck",
            "mean": self.mean.tolist(),
            "sigma": self.sigma.tolist(),
            "theta": self.theta,
            "dt": self.dt,
            "initial_noise": self.initial_noise.tolist(),
            "dtype": self.dtype.name,
        }

    def get_state(self) -> dict[str, np.ndarray]:
        return {"state": np.array(self._state)}

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        self._check_state_names(state)
        array = np.array(state["state"], dtype=np.float64)
        if array.shape != self._shape:
            raise ValueError(
                f"OrnsteinUhlenbeckActionNoise.set_state: the state must have shape {self._shape}, got {array.shape}."
            )
        self._state = array

    def _parameters(self) -> dict[str, np.ndarray]:
        return {**super()._parameters(), "initial_noise": self.initial_noise}


class VectorizedActionNoise(ActionNoise):
    """Independent copies of one noise, one for each environment.

    For scripts written for Stable-Baselines, and for copies with parameters of their own: every noise of sbac
    already samples for all environments once an algorithm has bound it.

    Args:
        base_noise: the noise to copy. What is changed in it later does not reach the copies.
        n_envs: number of environments, at least 1.

    Attributes:
        noises: the copies, in the order of the environments.

    Raises:
        TypeError: if `base_noise` is not an `ActionNoise`, or is vectorised itself.
        ValueError: if `n_envs` is less than 1.
    """

    def __init__(self, base_noise: ActionNoise, n_envs: int) -> None:
        if not isinstance(base_noise, ActionNoise) or isinstance(base_noise, VectorizedActionNoise):
            raise TypeError(
                f"VectorizedActionNoise: base_noise must be the noise of one environment, got {base_noise!r}."
            )
        if n_envs < 1:
            raise ValueError(f"VectorizedActionNoise: n_envs must be at least 1, got {n_envs!r}.")
        super().__init__()
        self.n_envs = n_envs
        self.base_noise = base_noise
        self.noises = tuple(deepcopy(base_noise) for _ in range(n_envs))
        self._bound = False

        # The copies draw in turn from one generator: with copies of a generator they would all draw the same.
        for noise in self.noises:
            noise._generator = self._generator

    @property
    def scale(self) -> float | None:
        """The mean over the environments' own; None where one has no such number."""
        scales = [scale for noise in self.noises if (scale := noise.scale) is not None]
        return float(np.mean(scales)) if len(scales) == self.n_envs else None

    def __call__(self) -> np.ndarray:
        samples = [noise() for noise in self.noises]
        return np.concatenate(samples) if self._bound else np.stack(samples)

    def bind(self, n_envs: int, shape: tuple[int, ...], generator: np.random.Generator) -> None:
        if n_envs != self.n_envs:
            raise ValueError(
                f"VectorizedActionNoise holds noise for {self.n_envs} environments, but there are {n_envs}: "
                "give it the number of environments, or pass its base_noise alone, which takes any number."
            )
        for noise in self.noises:
            noise.bind(1, shape, generator)
        self._bound = True

    def reset(self, indices: Iterable[int] | np.ndarray | None = None) -> None:
        for index in self._chosen(indices):
            self.noises[index].reset()

    def to_config(self) -> dict[str, Any]:
        return {"kind": "vectorized", "base_noise": self.base_noise.to_config(), "n_envs": self.n_envs}

    def get_state(self) -> dict[str, np.ndarray]:
        return {
            f"{index}.{name}": array
            for index, noise in enumerate(self.noises)
            for name, array in noise.get_state().items()
        }

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        self._check_state_names(state)
        for index, noise in enumerate(self.noises):
            noise.set_state({name: state[f"{index}.{name}"] for name in noise.get_state()})


def noise_from_config(config: Mapping[str, Any]) -> ActionNoise:
    """Build the noise that `ActionNoise.to_config` described, not yet bound.

    Args:
        config: the "kind" of the noise and its arguments by name.

    Returns:
        A noise with the parameters described.

    Raises:
        ValueError: if the kind is unknown, or the arguments are not those of that kind or have bad values.
    """
    arguments = dict(config)
    kind = arguments.pop("kind", None)
    try:
        if kind == "normal":
            return NormalActionNoise(**arguments)
        if kind == "ornstein_uhlenbeck":
            return OrnsteinUhlenbeckActionNoise(**arguments)
        if kind == "vectorized":
            return VectorizedActionNoise(noise_from_config(arguments.pop("base_noise", {})), **arguments)
    except TypeError as error:
        raise ValueError(f"Cannot build {kind} noise from {arguments!r}: {error}") from error
    raise ValueError(
        f"Unknown kind of noise {kind!r} in {dict(config)!r}: expected normal, ornstein_uhlenbeck or vectorized."
    )

"""Exploration noise: its moments against theory, one generator and one state for all environments.

Every statistical test has its seed, so it passes always or never. The margins are about five standard errors.
"""

import json
from copy import deepcopy

import numpy as np
import pytest

from sbac.noise import (
    ActionNoise,
    NormalActionNoise,
    OrnsteinUhlenbeckActionNoise,
    VectorizedActionNoise,
    noise_from_config,
)

NOISES = [
    NormalActionNoise([0.1, -0.2], [0.3, 0.1]),
    OrnsteinUhlenbeckActionNoise([0.1, -0.2], [0.3, 0.1], theta=0.2, dt=0.1, initial_noise=[0.5, 0.4]),
    VectorizedActionNoise(OrnsteinUhlenbeckActionNoise(np.zeros(2), 0.2 * np.ones(2)), n_envs=3),
]
NAMES = ["normal", "ornstein_uhlenbeck", "vectorized"]


def bound(noise: ActionNoise, n_envs: int = 3, shape: tuple[int, ...] = (2,), seed: int = 0) -> ActionNoise:
    noise = deepcopy(noise)
    noise.bind(n_envs, shape, np.random.default_rng(seed))
    return noise


def draw(noise: ActionNoise, steps: int) -> np.ndarray:
    return np.stack([noise() for _ in range(steps)])


def autocorrelation(samples: np.ndarray, lag: int) -> float:
    """Of samples (time, chains) with mean zero, over all chains."""
    return float((samples[lag:] * samples[: len(samples) - lag]).mean() / (samples**2).mean())


# Moments.


def test_normal_has_the_mean_and_spread_of_each_dimension():
    mean, sigma = np.array([0.5, -0.2, 0.0]), np.array([0.1, 0.3, 1.0])
    samples = draw(bound(NormalActionNoise(mean, sigma), n_envs=4, shape=(3,), seed=1), 10_000)

    assert np.all(np.abs(samples.mean((0, 1)) - mean) < 5 * sigma / np.sqrt(40_000))
    assert np.all(np.abs(samples.std((0, 1)) / sigma - 1.0) < 5 / np.sqrt(80_000))


def test_normal_is_not_correlated_in_time():
    samples = draw(bound(NormalActionNoise(0.0, 1.0), n_envs=4, shape=(1,), seed=2), 10_000)[:, :, 0]
    assert abs(autocorrelation(samples, 1)) < 5 / np.sqrt(40_000)


def test_zero_sigma_is_the_mean():
    noise = bound(NormalActionNoise([0.25, -0.5], 0.0), n_envs=2)
    assert np.array_equal(noise(), [[0.25, -0.5], [0.25, -0.5]])


MEAN, SIGMA, THETA, DT = 0.2, 0.3, 0.5, 0.1
DECAY = 1.0 - THETA * DT
VARIANCE = SIGMA**2 * DT / (1.0 - DECAY**2)


@pytest.fixture(scope="module")
def stationary() -> np.ndarray:
    """400 chains of 2000 steps with a = 1 - theta dt = 0.95, after 300 to forget the start (a^300 = 2e-7).

    Of these N samples, N (1 - a^2) / (1 + a^2) = 41 000 count for the variance as if they were independent,
    and N (1 - a) / (1 + a) = 20 500 for the mean. Each way the standard error is 0.7 %.
    """
    noise = OrnsteinUhlenbeckActionNoise(MEAN, SIGMA, THETA, DT, dtype=np.float64)
    return draw(bound(noise, n_envs=400, shape=(1,), seed=3), 2300)[300:, :, 0]


def test_stationary_mean(stationary):
    assert abs(stationary.mean() - MEAN) < 0.035 * np.sqrt(VARIANCE)


def test_stationary_variance(stationary):
    assert abs(stationary.var() / VARIANCE - 1.0) < 0.035


def test_stationary_variance_in_continuous_time_would_be_another():
    # sigma^2 / (2 theta) holds for small theta dt only: it is 2.5 % less at theta dt = 0.05, 25 % at 0.5.
    noise = OrnsteinUhlenbeckActionNoise(0.0, SIGMA, theta=5.0, dt=0.1, dtype=np.float64)
    variance = draw(bound(noise, n_envs=400, shape=(1,), seed=3), 1000)[100:].var()
    assert variance == pytest.approx(SIGMA**2 * 0.1 / (1.0 - 0.5**2), rel=0.015)
    assert variance > 1.2 * SIGMA**2 / (2.0 * 5.0)


@pytest.mark.parametrize("lag", [1, 2, 5, 10, 20, 50])
def test_stationary_autocorrelation(stationary, lag):
    assert abs(autocorrelation(stationary - stationary.mean(), lag) - DECAY**lag) < 0.025


def test_uniform_draws_would_drift_away_from_the_mean():
    # x += theta (0 - x) + sigma u, as many courses have it: u uniform on [0, 1), not normal as in the paper.
    theta, sigma, n_envs, steps = 0.15, 0.2, 100, 1000
    generator = np.random.default_rng(4)
    state, uniform = np.zeros(n_envs), []
    for _ in range(steps):
        state = state - theta * state + sigma * generator.random(n_envs)
        uniform.append(state)
    normal = draw(bound(OrnsteinUhlenbeckActionNoise(0.0, sigma, theta, dt=1.0), n_envs, (1,), seed=4), steps)

    # The mean of N samples has the standard error sigma / (theta sqrt(N)), here 0.004 for normal draws.
    margin = 5 * sigma / theta / np.sqrt(n_envs * (steps - 100))
    assert abs(np.mean(normal[100:])) < margin
    assert abs(np.mean(uniform[100:])) > margin
    assert abs(np.mean(uniform[100:]) - 0.5 * sigma / theta) < margin


def test_ornstein_uhlenbeck_first_steps_by_hand():
    # sigma 0 leaves the pull alone: half of the way to the mean in every step.
    noise = OrnsteinUhlenbeckActionNoise(1.0, 0.0, theta=5.0, dt=0.1, initial_noise=0.0)
    samples = draw(bound(noise, n_envs=1, shape=(1,)), 3)
    assert np.array_equal(samples.ravel(), [0.5, 0.75, 0.875])


def test_ornstein_uhlenbeck_is_its_recursion():
    noise = bound(OrnsteinUhlenbeckActionNoise([0.1, 0.2], [0.3, 0.4], 0.15, 0.01, dtype=np.float64), seed=5)
    generator = np.random.default_rng(5)
    state = np.zeros((3, 2))
    for _ in range(5):
        draws = generator.standard_normal((3, 2))
        state = state + 0.15 * (np.array([0.1, 0.2]) - state) * 0.01 + np.array([0.3, 0.4]) * 0.1 * draws
        np.testing.assert_allclose(noise(), state, rtol=1e-12)


# Environments.


@pytest.mark.parametrize(
    "noise",
    [
        NormalActionNoise(0.0, 1.0),
        OrnsteinUhlenbeckActionNoise(0.0, 1.0, theta=5.0, dt=0.1),
        VectorizedActionNoise(OrnsteinUhlenbeckActionNoise(0.0, 1.0, theta=5.0, dt=0.1), n_envs=4),
    ],
    ids=NAMES,
)
def test_environments_and_dimensions_are_independent(noise):
    # With a = 1/2, a correlation has the standard error sqrt((1 + a^2) / (1 - a^2) / steps) = 0.013.
    samples = draw(bound(noise, n_envs=4, seed=6), 10_000).reshape(10_000, 8)
    correlation = np.corrcoef(samples.T)
    assert np.all(np.abs(correlation - np.eye(8)) < 0.065)


def test_copies_in_a_vectorized_noise_are_independent_before_bind():
    noise = VectorizedActionNoise(NormalActionNoise(np.zeros(2), np.ones(2)), n_envs=3)
    sample = noise()
    assert sample.shape == (3, 2)
    assert len(np.unique(sample)) == 6


@pytest.mark.parametrize("noise", NOISES[1:], ids=NAMES[1:])
@pytest.mark.parametrize("indices", [[1], np.array([1]), [False, True, False], np.array([0, 1, 0]) == 1])
def test_reset_of_one_environment_leaves_the_others(noise, indices):
    noise, untouched = bound(noise), bound(noise)
    draw(noise, 20), draw(untouched, 20)

    noise.reset(indices)
    sample, expected = noise(), untouched()
    assert np.array_equal(sample[[0, 2]], expected[[0, 2]])
    assert not np.array_equal(sample[1], expected[1])


def test_reset_goes_back_to_the_initial_noise():
    noise = bound(OrnsteinUhlenbeckActionNoise(0.0, 0.2, initial_noise=[0.5, -0.5]))
    draw(noise, 10)
    noise.reset([0, 2])
    assert np.array_equal(noise.get_state()["state"][[0, 2]], [[0.5, -0.5], [0.5, -0.5]])
    assert not np.array_equal(noise.get_state()["state"][1], [0.5, -0.5])

    noise.reset()
    assert np.array_equal(noise.get_state()["state"], [[0.5, -0.5]] * 3)


def test_reset_without_initial_noise_goes_to_zero_not_to_the_mean():
    noise = bound(OrnsteinUhlenbeckActionNoise(0.3, 0.2))
    draw(noise, 10)
    noise.reset()
    assert np.array_equal(noise.get_state()["state"], np.zeros((3, 2)))


@pytest.mark.parametrize("noise", NOISES, ids=NAMES)
def test_reset_of_no_environment_changes_nothing(noise):
    noise, untouched = bound(noise), bound(noise)
    draw(noise, 5), draw(untouched, 5)
    noise.reset([])
    assert np.array_equal(noise(), untouched())


@pytest.mark.parametrize("noise", NOISES, ids=NAMES)
def test_unknown_environment_cannot_be_reset(noise):
    with pytest.raises(IndexError):
        bound(noise).reset([3])


# Generators and types.


@pytest.mark.parametrize("noise", NOISES, ids=NAMES)
def test_same_seed_same_bits(noise):
    assert np.array_equal(draw(bound(noise, seed=7), 10), draw(bound(noise, seed=7), 10))
    assert not np.array_equal(draw(bound(noise, seed=7), 10), draw(bound(noise, seed=8), 10))


@pytest.mark.parametrize("noise", NOISES, ids=NAMES)
def test_bind_starts_afresh(noise):
    used = bound(noise, seed=1)
    draw(used, 10)
    assert np.array_equal(draw(bound(used, seed=7), 10), draw(bound(noise, seed=7), 10))


@pytest.mark.parametrize("noise", NOISES, ids=NAMES)
def test_global_generator_is_left_alone(noise):
    before = np.random.get_state()[1].copy()
    draw(deepcopy(noise), 3)
    draw(bound(noise), 3)
    assert np.array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize("kind", [NormalActionNoise, OrnsteinUhlenbeckActionNoise])
def test_sample_belongs_to_the_caller(kind):
    noise = kind(0.0, 0.1, dtype=np.float64)  # the type of the state, which must not be handed out itself
    noise, untouched = bound(noise), bound(noise)
    sample = noise()
    untouched()
    sample += 100.0
    assert np.array_equal(noise(), untouched())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", [NormalActionNoise, OrnsteinUhlenbeckActionNoise])
def test_shape_and_type_of_a_sample(kind, dtype):
    noise = kind(np.zeros(2), np.ones(2), dtype=dtype)
    assert noise().shape == (2,) and noise().dtype == dtype
    noise.reset()

    noise.bind(5, (2,), np.random.default_rng(0))
    assert noise().shape == (5, 2) and noise().dtype == dtype


@pytest.mark.parametrize("kind", [NormalActionNoise, OrnsteinUhlenbeckActionNoise])
def test_samples_are_float32_unless_asked_otherwise(kind):
    assert kind(np.zeros(2), np.ones(2))().dtype == np.float32


@pytest.mark.parametrize("kind", [NormalActionNoise, OrnsteinUhlenbeckActionNoise])
def test_plain_numbers_hold_for_every_dimension(kind):
    numbers, arrays = kind(0.1, 0.2), kind([0.1] * 3, [0.2] * 3)
    assert np.array_equal(draw(bound(numbers, shape=(3,)), 5), draw(bound(arrays, shape=(3,)), 5))
    assert isinstance(numbers(), np.ndarray) and numbers().shape == ()


# Checkpoints and data.


@pytest.mark.parametrize("noise", NOISES, ids=NAMES)
def test_state_and_generator_continue_bit_for_bit(noise):
    generator = np.random.default_rng(9)
    running = deepcopy(noise)
    running.bind(3, (2,), generator)
    draw(running, 20)
    state, generator_state = running.get_state(), generator.bit_generator.state
    expected = draw(running, 20)

    generator = np.random.default_rng(0)
    generator.bit_generator.state = generator_state
    resumed = noise_from_config(noise.to_config())
    resumed.bind(3, (2,), generator)
    resumed.set_state(state)
    assert np.array_equal(draw(resumed, 20), expected)


@pytest.mark.parametrize("noise", NOISES, ids=NAMES)
def test_config_survives_json(noise):
    config = noise.to_config()
    restored = noise_from_config(json.loads(json.dumps(config, allow_nan=False)))

    assert type(restored) is type(noise)
    assert restored.to_config() == config
    assert np.array_equal(draw(bound(restored), 10), draw(bound(noise), 10))


def test_config_is_readable():
    assert NormalActionNoise([0.0, 0.5], 0.25).to_config() == {
        "kind": "normal",
        "mean": [0.0, 0.5],
        "sigma": 0.25,
        "dtype": "float32",
    }


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "pink", "sigma": 0.1}, "Unknown kind of noise 'pink'.*normal, ornstein_uhlenbeck or"),
        ({"mean": 0.0, "sigma": 0.1}, "Unknown kind of noise None"),
        ({"kind": "normal", "mean": 0.0}, "Cannot build normal noise from .*sigma"),
        ({"kind": "normal", "mean": 0.0, "sigma": 0.1, "theta": 1.0}, "Cannot build normal noise .*theta"),
        ({"kind": "normal", "mean": 0.0, "sigma": "wide"}, "sigma must hold numbers, got 'wide'"),
        ({"kind": "normal", "mean": 0.0, "sigma": 0.1, "dtype": "object"}, "must be a floating-point type"),
        ({"kind": "vectorized", "n_envs": 2}, "Unknown kind of noise None"),
    ],
)
def test_bad_config_is_explained(config, message):
    with pytest.raises(ValueError, match=message):
        noise_from_config(config)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, r"the state must hold \['state'\], got \[\]"),
        ({"state": np.zeros((3, 2)), "more": np.zeros(1)}, r"got \['more', 'state'\]"),
        ({"state": np.zeros((4, 2))}, r"the state must have shape \(3, 2\), got \(4, 2\)"),
    ],
)
def test_foreign_state_is_refused(state, message):
    with pytest.raises(ValueError, match=message):
        bound(NOISES[1]).set_state(state)


def test_state_is_a_copy():
    noise = bound(NOISES[1])
    state = noise.get_state()
    state["state"][:] = 100.0
    assert np.array_equal(noise.get_state()["state"], [[0.5, 0.4]] * 3)


# Bad arguments.


@pytest.mark.parametrize("kind", [NormalActionNoise, OrnsteinUhlenbeckActionNoise])
def test_bad_mean_and_sigma(kind):
    with pytest.raises(ValueError, match=r"sigma must not be negative, got -0.1"):
        kind(0.0, -0.1)
    with pytest.raises(ValueError, match="mean must be finite, got nan"):
        kind(np.nan, 0.1)
    with pytest.raises(ValueError, match=r"'mean': \(2,\), 'sigma': \(3,\)"):
        kind(np.zeros(2), np.ones(3))
    with pytest.raises(ValueError, match="dtype must be a floating-point type"):
        kind(0.0, 0.1, dtype=np.int64)


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
@pytest.mark.parametrize("name", ["theta", "dt"])
def test_bad_theta_and_dt(name, value):
    with pytest.raises(ValueError, match=f"{name} must be above 0 and finite, got {value}"):
        OrnsteinUhlenbeckActionNoise(0.0, 0.1, **{name: value})


def test_step_that_never_settles_is_refused():
    OrnsteinUhlenbeckActionNoise(0.0, 0.1, theta=1.9, dt=1.0)
    with pytest.raises(ValueError, match=r"theta \* dt must be below 2, got 2.0 \* 1.0"):
        OrnsteinUhlenbeckActionNoise(0.0, 0.1, theta=2.0, dt=1.0)


@pytest.mark.parametrize("parameter", ["mean", "sigma", "initial_noise"])
def test_parameter_that_does_not_fit_the_actions_is_named_with_both_shapes(parameter):
    noise = OrnsteinUhlenbeckActionNoise(**{"mean": 0.0, "sigma": 0.1, parameter: np.zeros(2)})
    with pytest.raises(ValueError, match=rf"{parameter} has shape \(2,\), but the actions have shape \(3,\)"):
        noise.bind(4, (3,), np.random.default_rng(0))


def test_bind_needs_an_environment():
    with pytest.raises(ValueError, match="n_envs must be at least 1, got 0"):
        bound(NormalActionNoise(0.0, 0.1), n_envs=0)


def test_choice_of_environments_needs_bind():
    with pytest.raises(ValueError, match=r"no environments to choose \[0\] from before bind"):
        OrnsteinUhlenbeckActionNoise(np.zeros(2), np.ones(2)).reset([0])


def test_vectorized_noise_for_another_number_of_environments():
    with pytest.raises(ValueError, match="holds noise for 3 environments, but there are 4"):
        bound(NOISES[2], n_envs=4)


@pytest.mark.parametrize("base_noise", [None, 0.1, NOISES[2]], ids=["none", "number", "vectorized"])
def test_vectorized_noise_needs_the_noise_of_one_environment(base_noise):
    with pytest.raises(TypeError, match="base_noise must be the noise of one environment"):
        VectorizedActionNoise(base_noise, n_envs=2)


def test_the_scale_of_a_vectorized_noise_is_that_of_its_copies():
    noise = VectorizedActionNoise(NormalActionNoise(np.zeros(2), 0.5), n_envs=2)
    noise.base_noise.sigma = np.zeros(())
    assert noise.scale == 0.5
    noise.noises[1].sigma = np.array([0.1, 0.2])
    assert noise.scale == pytest.approx((0.5 + 0.15) / 2)


def test_vectorized_noise_as_scripts_use_it():
    base_noise = NormalActionNoise(np.zeros(2), np.ones(2))
    noise = VectorizedActionNoise(base_noise, n_envs=3)
    noise.reset()
    noise.reset(indices=[0, 2])

    assert noise().shape == (3, 2)
    assert noise.base_noise is base_noise and noise.n_envs == 3 and len(noise.noises) == 3
    assert bound(noise)().shape == (3, 2)

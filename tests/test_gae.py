"""Returns and advantages against numbers worked out by hand and against sums written out term by term."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sbac.gae import explained_variance, gae, lambda_return, n_step_return

GAMMA = 0.9
SEEDS = range(5)


def block(seed: int, length: int = 12, n_envs: int = 3) -> dict[str, Tensor]:
    """Random experience in which episodes terminate, are cut, and run over the end of the block.

    Within an episode next_value[t] is value[t + 1]; where it ended, the successor has a value of its own.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (length, n_envs)
    event = torch.rand(shape, generator=generator)
    terminated, truncated = event < 0.15, event > 0.85

    value = torch.randn(shape, generator=generator, dtype=torch.float64)
    next_value = torch.randn(shape, generator=generator, dtype=torch.float64)
    goes_on = ~(terminated | truncated)[:-1]
    next_value[:-1][goes_on] = value[1:][goes_on]
    return {
        "reward": torch.randn(shape, generator=generator, dtype=torch.float64),
        "terminated": terminated,
        "truncated": truncated,
        "value": value,
        "next_value": next_value,
    }


def without_value(data: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in data.items() if name != "value"}


def written_out(data: dict[str, Tensor], t: int, env: int) -> list[float]:
    """G^(1), G^(2), ... of one step, up to the end of its episode or of the block, each summed explicitly."""
    reward, next_value = data["reward"][:, env].tolist(), data["next_value"][:, env].tolist()
    terminated, truncated = data["terminated"][:, env].tolist(), data["truncated"][:, env].tolist()

    returns = []
    for n in range(1, len(reward) - t + 1):
        last = t + n - 1
        bootstrap = 0.0 if terminated[last] else GAMMA**n * next_value[last]
        returns.append(sum(GAMMA**k * reward[t + k] for k in range(n)) + bootstrap)
        if terminated[last] or truncated[last]:
            break
    return returns


def for_each_step(data: dict[str, Tensor], function: Callable[[list[float]], float]) -> Tensor:
    length, n_envs = data["reward"].shape
    rows = [[function(written_out(data, t, env)) for env in range(n_envs)] for t in range(length)]
    return torch.tensor(rows, dtype=torch.float64)


def mixture(returns: list[float], gae_lambda: float) -> float:
    """(1 - lambda) sum_n lambda^(n-1) G^(n), and the whole tail of the weights on the longest return."""
    *shorter, longest = returns
    weighted = [(1 - gae_lambda) * gae_lambda**k * n_step for k, n_step in enumerate(shorter)]
    return sum(weighted) + gae_lambda ** len(shorter) * longest


def three_steps(**changes: list[float]) -> dict[str, Tensor]:
    """One environment, three steps: an episode is cut after the second, the third runs over the end."""
    data = {
        "reward": [1.0, 2.0, 3.0],
        "terminated": [0.0, 0.0, 0.0],
        "truncated": [0.0, 1.0, 0.0],
        "value": [0.5, 1.0, 1.5],
        "next_value": [1.0, 4.0, 2.0],
    } | changes
    return {name: torch.tensor(numbers, dtype=torch.float64) for name, numbers in data.items()}


def assert_equal(actual: Tensor, expected: Tensor | list[float]) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# By hand, with gamma = lambda = 1/2.


def test_three_steps_by_hand():
    # delta = 1 + 0.5 * 1 - 0.5, 2 + 0.5 * 4 - 1, 3 + 0.5 * 2 - 1.5 = 1, 3, 2.5; A_0 = 1 + 0.25 * 3
    advantage, return_ = gae(**three_steps(), gamma=0.5, gae_lambda=0.5)

    assert_equal(advantage, [1.75, 3.0, 2.5])
    assert_equal(return_, [2.25, 4.0, 4.0])


def test_three_steps_by_hand_with_a_termination():
    # delta_1 = 2 - 1 = 1; A_0 = 1 + 0.25 * 1
    data = three_steps(terminated=[0.0, 1.0, 0.0], truncated=[0.0, 0.0, 0.0])
    advantage, return_ = gae(**data, gamma=0.5, gae_lambda=0.5)

    assert_equal(advantage, [1.25, 1.0, 2.5])
    assert_equal(return_, [1.75, 2.0, 4.0])


def test_three_steps_by_hand_as_lambda_return():
    # G_2 = 3 + 0.5 * 2, G_1 = 2 + 0.5 * 4, G_0 = 1 + 0.5 * (0.5 * 1 + 0.5 * 4)
    assert_equal(lambda_return(**without_value(three_steps()), gamma=0.5, gae_lambda=0.5), [2.25, 4.0, 4.0])


def test_three_steps_by_hand_as_n_step_return():
    # Two steps from t = 0: 1 + 0.5 * 2 + 0.25 * 4. From t = 1 the cut, from t = 2 the end leave one step.
    data = without_value(three_steps())
    assert_equal(n_step_return(**data, gamma=0.5, n=1), [1.5, 4.0, 4.0])
    assert_equal(n_step_return(**data, gamma=0.5, n=2), [3.0, 4.0, 4.0])


# Three wrong treatments, on the three steps above, whose right advantage is (1.75, 3, 2.5).


def test_time_limit_treated_as_termination_is_another_number():
    data = three_steps(terminated=[0.0, 1.0, 0.0])
    wrong, _ = gae(**data, gamma=0.5, gae_lambda=0.5)
    assert_equal(wrong, [1.25, 1.0, 2.5])


def test_no_cut_at_truncation_is_another_number():
    data = three_steps(truncated=[0.0, 0.0, 0.0])
    wrong, _ = gae(**data, gamma=0.5, gae_lambda=0.5)
    assert_equal(wrong, [1.90625, 3.625, 2.5])


def test_bootstrap_at_termination_is_another_number():
    # If the second step terminated, (1.25, 1, 2.5) is right. Exchanged flags let V of the dead state in.
    data = three_steps(terminated=[0.0, 1.0, 0.0], truncated=[0.0, 0.0, 0.0])
    right, _ = gae(**data, gamma=0.5, gae_lambda=0.5)
    data["terminated"], data["truncated"] = data["truncated"], data["terminated"]
    wrong, _ = gae(**data, gamma=0.5, gae_lambda=0.5)

    assert_equal(right, [1.25, 1.0, 2.5])
    assert_equal(wrong, [1.75, 3.0, 2.5])


# Closed forms.


def test_random_blocks_hold_every_case():
    blocks = [block(seed) for seed in SEEDS]
    assert all(data["terminated"].any() and data["truncated"].any() for data in blocks)
    assert any((data["terminated"] | data["truncated"])[-1].any() for data in blocks)
    assert any(not (data["terminated"] | data["truncated"])[-1].all() for data in blocks)


@pytest.mark.parametrize("seed", SEEDS)
def test_lambda_zero_is_the_td_error(seed):
    data = block(seed)
    advantage, return_ = gae(**data, gamma=GAMMA, gae_lambda=0.0)
    target = data["reward"] + GAMMA * (1.0 - data["terminated"].double()) * data["next_value"]

    assert_equal(advantage, target - data["value"])
    assert_equal(return_, target)


@pytest.mark.parametrize("seed", SEEDS)
def test_lambda_one_is_monte_carlo_with_a_bootstrap_at_the_cut(seed):
    data = block(seed)
    _, return_ = gae(**data, gamma=GAMMA, gae_lambda=1.0)
    assert_equal(return_, for_each_step(data, lambda returns: returns[-1]))


@pytest.mark.parametrize("gae_lambda", [0.3, 0.95])
@pytest.mark.parametrize("seed", SEEDS)
def test_lambda_in_between_is_the_weighted_mixture_of_all_n_step_returns(seed, gae_lambda):
    data = block(seed)
    expected = for_each_step(data, lambda returns: mixture(returns, gae_lambda))
    advantage, return_ = gae(**data, gamma=GAMMA, gae_lambda=gae_lambda)

    assert_equal(return_, expected)
    assert_equal(advantage, expected - data["value"])
    assert_equal(lambda_return(**without_value(data), gamma=GAMMA, gae_lambda=gae_lambda), expected)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_gae_return_is_the_lambda_return(seed, gae_lambda):
    data = block(seed, length=64, n_envs=5)
    _, return_ = gae(**data, gamma=0.99, gae_lambda=gae_lambda)
    assert_equal(return_, lambda_return(**without_value(data), gamma=0.99, gae_lambda=gae_lambda))


@pytest.mark.parametrize("n", [1, 2, 5, 12, 100])
@pytest.mark.parametrize("seed", SEEDS)
def test_n_step_return_is_the_sum_written_out(seed, n):
    data = block(seed)
    expected = for_each_step(data, lambda returns: returns[min(n, len(returns)) - 1])
    assert_equal(n_step_return(**without_value(data), gamma=GAMMA, n=n), expected)


# Shapes, types, values that must not leak.


def estimates(data: dict[str, Tensor]) -> dict[str, Tensor]:
    advantage, return_ = gae(**data, gamma=GAMMA, gae_lambda=0.8)
    rest = without_value(data)
    return {
        "advantage": advantage,
        "return": return_,
        "lambda_return": lambda_return(**rest, gamma=GAMMA, gae_lambda=0.8),
        "n_step_return": n_step_return(**rest, gamma=GAMMA, n=3),
    }


def test_one_environment_without_its_axis_is_a_column_of_many():
    data = block(seed=0)
    together = estimates(data)
    for env in range(3):
        alone = estimates({name: tensor[:, env] for name, tensor in data.items()})
        for name, tensor in alone.items():
            assert torch.equal(tensor, together[name][:, env]), name


def test_flags_may_be_numbers():
    data = block(seed=1)
    numbers = data | {name: data[name].double() for name in ("terminated", "truncated")}
    for name, tensor in estimates(numbers).items():
        assert torch.equal(tensor, estimates(data)[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_float_type_is_kept(dtype):
    data = block(seed=2)
    floats = {name: data[name].to(dtype) for name in ("reward", "value", "next_value")}
    tolerance = 64 * torch.finfo(dtype).eps
    for name, tensor in estimates(data | floats).items():
        assert tensor.dtype == dtype, name
        torch.testing.assert_close(tensor.double(), estimates(data)[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_value_after_a_termination_does_not_leak(poison):
    data = block(seed=3)
    expected = estimates(data)
    poisoned = data | {"next_value": data["next_value"].masked_fill(data["terminated"], poison)}
    for name, tensor in estimates(poisoned).items():
        assert torch.equal(tensor, expected[name]), name


def test_one_step_is_enough():
    data = {name: tensor[-1:] for name, tensor in three_steps().items()}
    for name, tensor in estimates(data).items():
        assert tensor.shape == (1,), name


def test_arguments_are_left_alone():
    data = block(seed=4)
    before = {name: tensor.clone() for name, tensor in data.items()}
    estimates(data)
    assert all(torch.equal(tensor, before[name]) for name, tensor in data.items())


@pytest.mark.parametrize("name", ["terminated", "truncated", "value", "next_value"])
def test_argument_of_another_shape_is_named(name):
    data = block(seed=0)
    data[name] = data[name][:, :1]
    with pytest.raises(ValueError, match=rf"^{name} has shape \(12, 1\), but reward has shape \(12, 3\)"):
        gae(**data, gamma=GAMMA, gae_lambda=0.8)
    if name != "value":
        with pytest.raises(ValueError, match=rf"^{name} has shape"):
            lambda_return(**without_value(data), gamma=GAMMA, gae_lambda=0.8)
        with pytest.raises(ValueError, match=rf"^{name} has shape"):
            n_step_return(**without_value(data), gamma=GAMMA, n=3)


def test_empty_block_is_refused():
    with pytest.raises(ValueError, match="reward must hold at least one step"):
        estimates({name: tensor[:0] for name, tensor in block(seed=0).items()})


@pytest.mark.parametrize("n", [0, -1])
def test_horizon_below_one_step_is_refused(n):
    with pytest.raises(ValueError, match="n must be at least 1 step"):
        n_step_return(**without_value(block(seed=0)), gamma=GAMMA, n=n)


def test_explained_variance_by_hand():
    # Var[R] = 1.25; R - V = (0, 0, 1, 1) varies by 0.25.
    value, return_ = torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert explained_variance(value, return_).item() == pytest.approx(0.8, abs=1e-6)
    assert explained_variance(return_ + 7, return_).item() == 1
    assert explained_variance(torch.zeros(4), return_).item() == pytest.approx(0, abs=1e-6)
    assert explained_variance(-return_, return_).item() == pytest.approx(-3, abs=1e-6)


def test_returns_that_do_not_vary_leave_nothing_to_explain():
    assert explained_variance(torch.tensor([1.0, 2.0]), torch.tensor([5.0, 5.0])).item() == 0

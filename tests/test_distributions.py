"""Action distributions against torch.distributions and against the frequencies of their draws."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from sbac.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    DiagGaussianDistribution,
    Distribution,
    DistributionFamily,
    MultiCategoricalDistribution,
    SquashedDiagGaussianDistribution,
)

BATCH = 64


def categorical(seed: int = 0) -> CategoricalDistribution:
    generator = torch.Generator().manual_seed(seed)
    return CategoricalDistribution(3 * torch.randn(BATCH, 5, generator=generator, dtype=torch.float64))


def gaussian(seed: int = 0) -> DiagGaussianDistribution:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(BATCH, 3, generator=generator, dtype=torch.float64)
    return DiagGaussianDistribution(mean, torch.tensor([-1.0, 0.0, 0.7], dtype=torch.float64))


def test_categorical_agrees_with_torch() -> None:
    ours = categorical()
    theirs = torch.distributions.Categorical(logits=ours.logits)
    for action in range(5):
        actions = torch.full((BATCH,), action)
        assert ours.log_prob(actions).shape == (BATCH,)
        torch.testing.assert_close(ours.log_prob(actions), theirs.log_prob(actions), atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.entropy(), theirs.entropy(), atol=1e-6, rtol=0)
    assert torch.equal(ours.mode(), theirs.mode)
    # Actions come out of a buffer as they were stored.
    assert torch.equal(ours.log_prob(torch.ones(BATCH, dtype=torch.float32)), ours.log_prob(torch.ones(BATCH)))


def test_gaussian_agrees_with_torch() -> None:
    ours = gaussian()
    theirs = torch.distributions.Independent(torch.distributions.Normal(ours.mean, ours.log_std.exp()), 1)
    actions = 2 * torch.randn(BATCH, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert ours.log_prob(actions).shape == (BATCH,)
    torch.testing.assert_close(ours.log_prob(actions), theirs.log_prob(actions), atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.entropy(), theirs.entropy(), atol=1e-6, rtol=0)
    assert ours.entropy().shape == (BATCH,)
    assert torch.equal(ours.mode(), theirs.mean)


def test_values_known_by_heart() -> None:
    uniform = CategoricalDistribution(torch.full((1, 4), 7.0))
    assert uniform.entropy().item() == pytest.approx(math.log(4), abs=1e-6)
    assert uniform.log_prob(torch.tensor([2])).item() == pytest.approx(-math.log(4), abs=1e-6)

    standard = DiagGaussianDistribution(torch.zeros(1, 2), torch.zeros(2))
    assert standard.log_prob(torch.zeros(1, 2)).item() == pytest.approx(-math.log(2 * math.pi), abs=1e-6)
    assert standard.entropy().item() == pytest.approx(1 + math.log(2 * math.pi), abs=1e-6)


def test_gradients_agree_with_torch() -> None:
    logits = categorical().logits.requires_grad_()
    actions = torch.arange(BATCH) % 5
    ours, theirs = CategoricalDistribution(logits), torch.distributions.Categorical(logits=logits)
    for our, their in ((ours.log_prob(actions), theirs.log_prob(actions)), (ours.entropy(), theirs.entropy())):
        gradients = [torch.autograd.grad(value.sum(), logits, retain_graph=True)[0] for value in (our, their)]
        torch.testing.assert_close(*gradients, atol=1e-6, rtol=0)

    mean, log_std = gaussian().mean.requires_grad_(), torch.zeros(3, dtype=torch.float64, requires_grad=True)
    action = torch.full((BATCH, 3), 0.3, dtype=torch.float64)
    our = DiagGaussianDistribution(mean, log_std).log_prob(action)
    their = torch.distributions.Normal(mean, log_std.exp()).log_prob(action).sum(1)
    for a, b in zip(
        torch.autograd.grad(our.sum(), (mean, log_std)), torch.autograd.grad(their.sum(), (mean, log_std)), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_categorical_draws_have_the_stated_frequencies() -> None:
    probabilities = torch.tensor([0.02, 0.08, 0.2, 0.3, 0.4])
    n = 100_000
    draws = CategoricalDistribution(probabilities.log().expand(n, 5)).sample(torch.Generator().manual_seed(0))
    frequencies = torch.bincount(draws, minlength=5) / n
    # Four standard deviations of a frequency.
    margin = 4 * (probabilities * (1 - probabilities) / n).sqrt()
    assert ((frequencies - probabilities).abs() < margin).all()


def test_gaussian_draws_have_the_stated_moments() -> None:
    mean, log_std, n = torch.tensor([1.0, -2.0]), torch.tensor([0.5, -1.0]), 100_000
    draws = DiagGaussianDistribution(mean.expand(n, 2), log_std).sample(torch.Generator().manual_seed(0))
    std = log_std.exp()
    assert ((draws.mean(0) - mean).abs() < 4 * std / n**0.5).all()
    assert ((draws.std(0) - std).abs() < 4 * std / (2 * n) ** 0.5).all()
    assert abs(torch.corrcoef(draws.T)[0, 1]) < 4 / n**0.5
    within = ((draws - mean).abs() < std).float().mean(0)
    assert ((within - math.erf(0.5**0.5)).abs() < 0.006).all()


@pytest.mark.parametrize("make", [categorical, gaussian])
def test_a_generator_fixes_the_draws_whatever_the_global_one_does(make: type[Distribution]) -> None:
    def draw(global_seed: int, seed: int) -> Tensor:
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        drawn = make().sample(torch.Generator().manual_seed(seed))
        assert torch.equal(torch.get_rng_state(), before)
        return drawn

    assert torch.equal(draw(global_seed=1, seed=5), draw(global_seed=2, seed=5))
    assert not torch.equal(draw(global_seed=1, seed=5), draw(global_seed=1, seed=6))


def test_a_draw_carries_no_gradient() -> None:
    logits = torch.zeros(2, 3, requires_grad=True)
    assert not CategoricalDistribution(logits).sample().requires_grad
    mean = torch.zeros(2, 3, requires_grad=True)
    assert not DiagGaussianDistribution(mean, torch.zeros(3, requires_grad=True)).sample().requires_grad


def test_draws_do_not_write_into_the_parameters() -> None:
    ours = categorical()
    logits = ours.logits.clone()
    ours.sample()
    assert torch.equal(ours.logits, logits)


@pytest.mark.parametrize("n_rows", [1, 7, 64])
@pytest.mark.parametrize("deterministic", [True, False])
def test_a_choice_from_array_to_array_is_that_of_the_distribution(n_rows: int, deterministic: bool) -> None:
    family = DistributionFamily(spaces.Discrete(5))
    logits = torch.randn(n_rows, 5, generator=torch.Generator().manual_seed(3))
    logits[0] = 1.0  # all alike
    one, other = (torch.Generator().manual_seed(8) for _ in range(2))
    for _ in range(20):
        distribution = family(logits)
        expected = family.to_numpy(distribution.mode() if deterministic else distribution.sample(one))
        found = family.act(logits.numpy(), deterministic, other)
        assert found is not None and (found.dtype, found.shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(found, expected)
    assert torch.equal(one.get_state(), other.get_state())


@pytest.mark.parametrize("space", [spaces.Box(-1, 1, (2,)), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(2)])
def test_only_one_choice_is_made_from_array_to_array(space: spaces.Space) -> None:
    family = DistributionFamily(space)
    assert family.act(np.zeros((4, family.width), np.float32), True, None) is None


@pytest.mark.parametrize("make", [categorical, gaussian])
def test_the_way_back_is_that_of_autograd(make: type[Distribution]) -> None:
    ours = make()
    parameters = ours.logits if isinstance(ours, CategoricalDistribution) else ours.mean
    action = ours.sample(torch.Generator().manual_seed(0))
    of_log_prob, of_entropy = torch.randn(2, BATCH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    slopes = ours.slopes(action, of_log_prob, of_entropy)
    assert slopes is not None

    parameters.requires_grad_()
    log_std = getattr(ours, "log_std", None)
    if log_std is not None:
        log_std.requires_grad_()
    (ours.log_prob(action).dot(of_log_prob) + ours.entropy().dot(of_entropy)).backward()
    torch.testing.assert_close(slopes[0], parameters.grad, atol=1e-9, rtol=0)
    if log_std is None:
        assert slopes[1] is None
    else:
        torch.testing.assert_close(slopes[1], log_std.grad, atol=1e-9, rtol=0)


def test_what_a_choice_keeps_has_no_graph() -> None:
    logits = torch.zeros(2, 3, requires_grad=True)
    ours, action = CategoricalDistribution(logits), torch.tensor([0, 1])
    for _ in range(2):  # each use has a graph of its own
        ours.log_prob(action).sum().backward()
        ours.entropy().sum().backward()
    copy.deepcopy(ours)
    logits.requires_grad_(False)
    assert not ours.log_prob(action).requires_grad and not ours.entropy().requires_grad
    logits.requires_grad_()
    assert ours.log_prob(action).requires_grad and ours.entropy().requires_grad


# The other spaces.


def test_several_choices_are_independent() -> None:
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    ours = MultiCategoricalDistribution(logits, [2, 3])
    peers = [torch.distributions.Categorical(logits=part) for part in logits.split([2, 3], dim=1)]
    action = torch.tensor([[0, 2], [1, 0], [1, 1], [0, 0]])
    expected = peers[0].log_prob(action[:, 0]) + peers[1].log_prob(action[:, 1])
    torch.testing.assert_close(ours.log_prob(action), expected)
    torch.testing.assert_close(ours.entropy(), peers[0].entropy() + peers[1].entropy())
    assert torch.equal(ours.mode(), torch.stack([peer.probs.argmax(1) for peer in peers], dim=1))


def test_several_choices_are_drawn_with_their_probabilities() -> None:
    probabilities = torch.tensor([0.2, 0.8, 0.5, 0.3, 0.2])
    ours = MultiCategoricalDistribution(probabilities.log().expand(100_000, 5), [2, 3])
    drawn = ours.sample(torch.Generator().manual_seed(0))
    joint = torch.bincount(drawn[:, 0] * 3 + drawn[:, 1], minlength=6).view(2, 3) / 100_000
    # The standard error of a share is at most 0.0016.
    torch.testing.assert_close(joint, torch.outer(probabilities[:2], probabilities[2:]), atol=0.006, rtol=0)


def test_switches_are_bernoulli() -> None:
    logits = torch.tensor([[0.3, -2.0], [50.0, -80.0], [0.0, 1.0]], requires_grad=True)
    ours, peer = BernoulliDistribution(logits), torch.distributions.Bernoulli(logits=logits)
    for action in (torch.tensor([[1.0, 0.0]] * 3), torch.tensor([[0.0, 1.0]] * 3)):
        torch.testing.assert_close(ours.log_prob(action), peer.log_prob(action).sum(1))
    torch.testing.assert_close(ours.entropy(), peer.entropy().sum(1))
    assert ours.mode().tolist() == [[1, 0], [1, 0], [0, 1]]
    drawn = BernoulliDistribution(logits[:1].expand(100_000, 2)).sample(torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.mean(0), torch.sigmoid(logits[0]), atol=0.006, rtol=0)


@pytest.mark.parametrize("std", [0.05, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("mean", [0.0, -1.0, 3.0])
def test_a_squashed_density_integrates_to_one_and_has_its_entropy(mean: float, std: float) -> None:
    ours = SquashedDiagGaussianDistribution(torch.full((1, 1), mean).double(), torch.tensor([math.log(std)]).double())
    # Integrated over u = atanh(a), where the density is smooth: da = (1 - tanh(u)^2) du.
    unbounded = torch.linspace(mean - 9 * std, mean + 9 * std, 200_001, dtype=torch.float64)
    action = torch.tanh(unbounded)
    inside = action.abs() < 1 - 1e-12
    log_prob = ours.log_prob(action[:, None])
    mass = (log_prob.exp() * (1 - action.square()))[inside]
    width = unbounded[1] - unbounded[0]
    assert float(mass.sum() * width) == pytest.approx(1, abs=1e-5)
    entropy = -(mass * log_prob[inside]).sum() * width
    assert float(ours.entropy()) == pytest.approx(float(entropy), abs=2e-3)
    # Without the correction it would be that of the normal variable.
    plain = DiagGaussianDistribution(ours.mean, ours.log_std).entropy()
    assert float(plain) > float(ours.entropy()) + std**2 / 3


def test_squashed_terms_are_those_of_a_transformed_distribution() -> None:
    mean, log_std = torch.tensor([[0.5, -2.0], [0.0, 1.0]]), torch.tensor([-0.5, 0.2])
    ours = SquashedDiagGaussianDistribution(mean, log_std)
    peer = torch.distributions.TransformedDistribution(
        torch.distributions.Normal(mean, log_std.exp()), [torch.distributions.TanhTransform(cache_size=1)]
    )
    action = ours.sample(torch.Generator().manual_seed(0))
    assert (action.abs() < 1).all()
    torch.testing.assert_close(ours.log_prob(action), peer.log_prob(action).sum(1), rtol=1e-4, atol=1e-4)
    assert torch.equal(ours.mode(), torch.tanh(mean))
    # On a bound, which rounding reaches, it is finite.
    assert ours.log_prob(torch.ones(2, 2)).isfinite().all()

"""Returns and advantages from a block of experience: n-step return, lambda return, GAE.

Pure functions on torch tensors of any float type and on any device. Time comes first: (T,) for one
environment, (T, N) for N of them. Step t goes from s_t to s_{t+1}, and there are three ways to go on:

- neither flag: step t+1 of the block continues the episode;
- `terminated`: s_{t+1} is the end of the task, nothing follows it, its value is zero;
- `truncated`: the episode was cut (a time limit, say). s_{t+1} still has a value, so the return bootstraps
  from it, but step t+1 of the block belongs to another episode and must not flow back.

The end of the block is a cut like `truncated`. Therefore `next_value[t]` must be V(s_{t+1}) of the true
successor everywhere, also where an episode was cut; it is ignored where the episode terminated.
"""

import torch
from torch import Tensor


def gae(
    reward: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    value: Tensor,
    next_value: Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation: Schulman et al. 2016, arXiv:1506.02438, equations 11 to 16.

    delta_t = r_t + gamma (1 - terminated_t) V(s_{t+1}) - V(s_t)
    A_t = delta_t + gamma lambda (1 - terminated_t) (1 - truncated_t) A_{t+1}

    Args:
        reward: r_t, shape (T,) or (T, N).
        terminated: whether step t ended the task; bool, or a number that is not zero. Same shape.
        truncated: whether step t was the last of an episode that was cut. Same shape and types.
        value: V(s_t), same shape.
        next_value: V(s_{t+1}) of the true successor, same shape; need not be finite where `terminated`.
        gamma: discount factor, in [0, 1].
        gae_lambda: 0 gives the one-step TD error, 1 the Monte Carlo advantage, in [0, 1].

    Returns:
        The advantage A_t and the return A_t + V(s_t), both in the shape of `reward`. The return equals
        `lambda_return` where `next_value[t]` is `value[t + 1]` within each episode.

    Raises:
        ValueError: if the block is empty or an argument has another shape than `reward`.
    """
    _check_shapes(reward, terminated=terminated, truncated=truncated, value=value, next_value=next_value)

    # Masked, not multiplied by zero: the value after a terminal state may be anything, and 0 * inf is nan.
    terminated = terminated.bool()
    delta = reward - value + gamma * next_value.masked_fill(terminated, 0.0)
    decay = torch.full_like(delta, gamma * gae_lambda).masked_fill_(terminated | truncated.bool(), 0.0)

    advantage = _accumulate(delta, decay)
    return advantage, advantage + value


def lambda_return(
    reward: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    next_value: Tensor,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """The lambda return: the mixture of all n-step returns, each weighted (1 - lambda) lambda^(n-1).

    G_t = r_t + gamma (1 - terminated_t) [(1 - lambda) V(s_{t+1}) + lambda G_{t+1}]

    Where the episode was cut, and at the end of the block, G_{t+1} is unknown and V(s_{t+1}) takes its place.
    See Sutton & Barto 2018, Reinforcement Learning, sections 12.1 and 12.8.

    Args:
        reward: r_t, shape (T,) or (T, N).
        terminated: whether step t ended the task; bool, or a number that is not zero. Same shape.
        truncated: whether step t was the last of an episode that was cut. Same shape and types.
        next_value: V(s_{t+1}) of the true successor, same shape; need not be finite where `terminated`.
        gamma: discount factor, in [0, 1].
        gae_lambda: 0 gives the one-step TD target, 1 the Monte Carlo return, in [0, 1].

    Returns:
        G_t in the shape of `reward`.

    Raises:
        ValueError: if the block is empty or an argument has another shape than `reward`.
    """
    _check_shapes(reward, terminated=terminated, truncated=truncated, next_value=next_value)

    terminated = terminated.bool()
    following = torch.full_like(next_value, gae_lambda).masked_fill_(terminated | truncated.bool(), 0.0)
    following[-1] = 0.0  # the weight of G_{t+1}; V(s_{t+1}) has the rest
    known = reward + gamma * (1.0 - following) * next_value.masked_fill(terminated, 0.0)

    return _accumulate(known, gamma * following)


def n_step_return(
    reward: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    next_value: Tensor,
    gamma: float,
    n: int,
) -> Tensor:
    """The n-step return: r_t + gamma r_{t+1} + ... + gamma^(k-1) r_{t+k-1} + gamma^k V(s_{t+k}).

    k is n, or less where the episode or the block ends earlier. After a termination there is no V.
    See Sutton & Barto 2018, Reinforcement Learning, equation 7.1. With n as long as the block, it is the
    return of Mnih et al. 2016, arXiv:1602.01783, Algorithm S3.

    Args:
        reward: r_t, shape (T,) or (T, N).
        terminated: whether step t ended the task; bool, or a number that is not zero. Same shape.
        truncated: whether step t was the last of an episode that was cut. Same shape and types.
        next_value: V(s_{t+1}) of the true successor, same shape; need not be finite where `terminated`.
        gamma: discount factor, in [0, 1].
        n: the longest horizon, in steps, at least 1.

    Returns:
        The return of each step, in the shape of `reward`.

    Raises:
        ValueError: if n is less than 1, the block is empty, or an argument has another shape than `reward`.
    """
    _check_shapes(reward, terminated=terminated, truncated=truncated, next_value=next_value)
    if n < 1:
        raise ValueError(f"n must be at least 1 step, got {n!r}.")

    terminated = terminated.bool()
    ended = terminated | truncated.bool()
    one_step = reward + gamma * next_value.masked_fill(terminated, 0.0)

    # G^(1) = r_t + gamma V(s_{t+1}), then G^(k)_t = r_t + gamma G^(k-1)_{t+1} as long as the episode goes on.
    returns = one_step
    for _ in range(min(n, len(reward)) - 1):
        longer = torch.where(ended[:-1], one_step[:-1], reward[:-1] + gamma * returns[1:])
        returns = torch.cat((longer, one_step[-1:]))
    return returns


def _accumulate(term: Tensor, decay: Tensor) -> Tensor:
    """x_t = term_t + decay_t x_{t+1}, backwards from x_T = 0: one fused operation per step."""
    terms, decays = term.unbind(), decay.unbind()
    total = terms[-1]
    totals = [total]
    for t in range(len(terms) - 2, -1, -1):
        total = torch.addcmul(terms[t], decays[t], total)
        totals.append(total)
    return torch.stack(totals[::-1])


def _check_shapes(reward: Tensor, **others: Tensor) -> None:
    shape = reward.shape
    if reward.ndim == 0 or shape[0] == 0:
        raise ValueError(f"reward must hold at least one step, as (T,) or (T, N), got shape {tuple(shape)}.")
    for name, tensor in others.items():
        if tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, but reward has shape {tuple(shape)}: "
                "all arguments must have the same shape, (T,) or (T, N)."
            )


def explained_variance(value: Tensor, return_: Tensor) -> Tensor:
    """How much of the returns' variance the values explain: 1 - Var[R - V] / Var[R].

    Args:
        value: V(s), any shape.
        return_: R, the same shape.

    Returns:
        A scalar: 1 is perfect, 0 no better than a constant, below 0 worse. 0 where the returns do not vary.
    """
    spread, left = torch.stack((return_, return_ - value)).flatten(1).var(1, correction=0)
    return 1 - left / spread if spread > 0 else torch.zeros_like(spread)

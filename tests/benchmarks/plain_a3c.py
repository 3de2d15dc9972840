"""A plain PyTorch A3C worker, as public single-file implementations write it; sbac's is measured against it.

One forward pass with autograd per step, a list of graph nodes per rollout, RMSprop over lists of shared tensors.
"""

from __future__ import annotations

import time

import gymnasium
import torch
from torch import Tensor, nn
from torch.nn import functional


class ActorCritic(nn.Module):
    """The same two perceptrons as sbac's "MlpPolicy"."""

    def __init__(self, obs_dim: int, n_actions: int) -> None:
        super().__init__()
        self.actor = nn.Sequential(
            nn.Linear(obs_dim, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, n_actions)
        )
        self.critic = nn.Sequential(nn.Linear(obs_dim, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        return self.actor(obs), self.critic(obs)


class SharedRMSprop:
    """theta <- theta - eta g / (sqrt(v) + eps), with v in shared memory, tensor by tensor."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, alpha: float = 0.99, eps: float = 1e-5) -> None:
        self.parameters, self.lr, self.alpha, self.eps = parameters, lr, alpha, eps
        self.square_avg = [torch.zeros_like(parameter).share_memory_() for parameter in parameters]

    @torch.no_grad()
    def step(self, gradients: list[Tensor]) -> None:
        for parameter, gradient, square_avg in zip(self.parameters, gradients, self.square_avg, strict=True):
            square_avg.mul_(self.alpha).addcmul_(gradient, gradient, value=1 - self.alpha)
            parameter.addcdiv_(gradient, square_avg.sqrt().add_(self.eps), value=-self.lr)


def train(env_id: str, steps: int, n_steps: int, seed: int = 0) -> float:
    """Train one worker; returns steps per second."""
    torch.manual_seed(seed)
    env = gymnasium.make(env_id)
    shared = ActorCritic(env.observation_space.shape[0], int(env.action_space.n)).share_memory()
    model = ActorCritic(env.observation_space.shape[0], int(env.action_space.n))
    optimizer = SharedRMSprop(list(shared.parameters()), lr=7e-4)
    obs, _ = env.reset(seed=seed)
    state = torch.from_numpy(obs)
    taken, start = 0, time.perf_counter()
    while taken < steps:
        model.load_state_dict(shared.state_dict())
        values, log_probs, rewards, entropies = [], [], [], []
        done = False
        for _ in range(n_steps):
            logits, value = model(state.unsqueeze(0))
            probability = functional.softmax(logits, dim=-1)
            log_probability = functional.log_softmax(logits, dim=-1)
            entropies.append(-(log_probability * probability).sum(1, keepdim=True))
            action = probability.multinomial(num_samples=1).detach()
            values.append(value)
            log_probs.append(log_probability.gather(1, action))
            obs, reward, terminated, truncated, _ = env.step(action.item())
            taken += 1
            done = terminated or truncated
            rewards.append(float(reward))
            if done:
                obs, _ = env.reset()
            state = torch.from_numpy(obs)
            if done:
                break
        return_ = torch.zeros(1, 1) if done else model(state.unsqueeze(0))[1].detach()
        policy_loss = value_loss = torch.zeros(1, 1)
        for i in reversed(range(len(rewards))):
            return_ = 0.99 * return_ + rewards[i]
            advantage = return_ - values[i]
            value_loss = value_loss + 0.5 * advantage.pow(2)
            policy_loss = policy_loss - log_probs[i] * advantage.detach() - 0.01 * entropies[i]
        model.zero_grad()
        (policy_loss + 0.5 * value_loss).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step([parameter.grad for parameter in model.parameters()])
    return taken / (time.perf_counter() - start)

"""A3C: equal to A2C where it must be, exact counts, and workers that raise, hang or are killed."""

from __future__ import annotations

import copy
import gc
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

import sbac
from sbac import A2C, A3C, WorkerFault, evaluate_policy
from sbac.callbacks import BaseCallback, CheckpointCallback, EvalCallback, StopTrainingOnMaxEpisodes
from sbac.cli import main
from sbac.envs import make_environments
from sbac.logger import configure
from sbac.networks import BaseFeaturesExtractor
from sbac.normalization import Ledger, merge
from sbac.optimization import RMSpropTFLike
from sbac.processes import kill_with_descendants
from sbac.schedules import LinearSchedule
from sbac.transport import STEPS

SMALL: dict[str, Any] = {"policy_kwargs": {"net_arch": [16, 8]}, "seed": 0}


class Short(gymnasium.Env[Any, Any]):
    """Noise; episodes of `length` steps that terminate. May raise at a step of its own life."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, length: int = 7, raise_at: int = 0) -> None:
        self.length, self.raise_at, self.life = length, raise_at, 0

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(**kwargs)
        self.steps = 0
        return self._obs(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        self.life += 1
        if self.life == self.raise_at:
            raise RuntimeError("the gears are stuck")
        info = {"is_success": True} if self.steps == self.length else {}
        return self._obs(), float(action), self.steps == self.length, False, info

    def _obs(self) -> np.ndarray:
        return self.np_random.uniform(-1, 1, 2).astype(np.float32)


def workers_of(pid: int) -> list[int]:
    """The worker processes of a process."""
    found = subprocess.run(["pgrep", "-P", str(pid), "-f", "sbac.transport"], capture_output=True, text=True).stdout
    return [int(word) for word in found.split()]


def is_alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def open_files() -> list[str]:
    """Sockets, pipes and the like that this process holds open."""
    targets = []
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of the listing itself
            targets.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return sorted(re.sub(r"\d+", "N", target) for target in targets if target.startswith(("socket", "anon", "pipe")))


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """After every test: no child process, no zombie, no shared memory, no open descriptor."""
    gc.collect()
    before = set(os.listdir("/dev/shm")), open_files()
    yield
    children = subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True, text=True).stdout.split()
    children = [pid for pid in children if Path(f"/proc/{pid}").exists()]  # pgrep finds itself
    for pid in map(int, children):  # left by a test that failed: not for those after it
        kill_with_descendants(pid)
        os.waitpid(pid, 0)
    assert children == []
    gc.collect()
    assert (set(os.listdir("/dev/shm")), open_files()) == before


# Equal where it must be.


@pytest.mark.parametrize(
    "arguments", [{}, {"use_rms_prop": False}, {"policy_kwargs": {"optimizer_class": RMSpropTFLike}}]
)
@pytest.mark.parametrize("deterministic", [True, False])
def test_one_worker_equals_a2c_bit_for_bit(arguments, deterministic):
    # Pendulum's episodes are 200 steps, 40 rollouts of 5. 603 steps end within a rollout.
    common = {"seed": 3, "ent_coef": LinearSchedule(0.02, 0.0), "learning_rate": LinearSchedule(1e-3, 0.0), **arguments}
    a2c = A2C("MlpPolicy", "Pendulum-v1", **common).learn(603)
    a3c = A3C("MlpPolicy", "Pendulum-v1", n_workers=1, deterministic=deterministic, **common).learn(603)
    assert torch.equal(a3c.policy.flat, a2c.policy.flat)
    own, other = (model.policy.optimizer.state[model.policy.flat] for model in (a3c, a2c))
    assert all(torch.equal(own[name], other[name]) for name in other)
    assert (a3c.num_timesteps, a3c.n_updates) == (a2c.num_timesteps, a2c.n_updates) == (603, 121)
    assert [e["r"] for e in a3c.ep_info_buffer] == [e["r"] for e in a2c.ep_info_buffer]
    assert len(a3c.ep_info_buffer) == 3


def test_one_worker_normalises_as_a2c_does():
    # A schedule for gamma too: the discounted return, whose deviation scales rewards, follows it step by step.
    common = {"seed": 3, "normalize_obs": True, "normalize_reward": True, "gamma": LinearSchedule(0.95, 0.9)}
    a2c = A2C("MlpPolicy", "Pendulum-v1", ent_coef=0.01, **common).learn(403)
    a3c = A3C("MlpPolicy", "Pendulum-v1", n_workers=1, **common).learn(403)
    assert torch.equal(a3c.policy.flat, a2c.policy.flat)
    assert torch.equal(a3c.policy.normalizer.moments, a2c.policy.normalizer.moments)


class Marching(Short):
    """Observations that are known for each step of an episode, and a reward of 2."""

    def _obs(self) -> np.ndarray:
        return np.array([0.1 * self.steps, 0.3 - 0.02 * self.steps**2], np.float32)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        obs, _, *rest = super().step(action)
        return obs, 2.0, *rest


def test_workers_put_their_statistics_together_and_lose_nothing():
    # Rollouts are whole episodes, so that each of its five observations is seen equally often.
    model = A3C(
        "MlpPolicy", lambda: Marching(length=5), n_workers=2, normalize_obs=True, normalize_reward=True, **SMALL
    )
    model.policy.normalizer.add(np.array([[5.0], [0.25], [1.0]]) * np.ones(3))  # known from before
    model.learn(3_000)
    steps = np.arange(5)
    seen = np.array([np.float32(0.1 * steps), np.float32(0.3 - 0.02 * steps**2), 2.0 * np.cumsum(0.99**steps)], float)
    before = np.repeat(0.25 + np.sqrt(0.2) * np.array([1, -1, 1, -1, 0]) * np.sqrt(5 / 4), 1)
    everything = np.concatenate([np.tile(seen, 600), np.tile(before, (3, 1))], axis=1)  # (3, 3_005)
    count, mean, squares = model.policy.normalizer.moments.numpy()
    assert (count == 3_005).all()
    np.testing.assert_allclose(mean, everything.mean(1), rtol=1e-9)
    np.testing.assert_allclose(squares / count, everything.var(1), rtol=1e-9)


def test_a_worker_that_dies_as_it_writes_its_account_leaves_a_whole_one():
    before, seen = np.array([[2.0], [1.0], [4.0]]), np.array([[1.0], [4.0], [0.0]])
    accounts, valid = Ledger.blank(2, torch.as_tensor(before)).numpy(), np.zeros(2, np.int64)
    first, second = Ledger(accounts, valid, 0), Ledger(accounts, valid, 1)
    first.add(seen)
    second.add(seen)
    second.add(seen)
    accounts[1, 1 - valid[1]] = np.nan  # the page that it was about to write
    expected = merge(before, merge(seen, merge(seen, seen)))
    np.testing.assert_allclose(first.total(), expected)
    np.testing.assert_array_equal(first.total(), second.total())
    second.add(seen)  # as its successor does
    assert second.total()[0] == 6


def test_several_environments_of_one_worker_equal_a2cs():
    a2c = A2C("MlpPolicy", "CartPole-v1", n_envs=3, seed=1, ent_coef=0.0).learn(300)
    a3c = A3C("MlpPolicy", "CartPole-v1", n_envs=3, n_workers=1, seed=1, ent_coef=0.0).learn(300)
    assert torch.equal(a3c.policy.flat, a2c.policy.flat)


def test_rollouts_end_where_episodes_do():
    model = A3C("MlpPolicy", lambda: Short(length=7), n_workers=1, n_steps=5, **SMALL).learn(70)
    assert model.n_updates == 20  # 5 and 2 steps in turn
    assert A2C("MlpPolicy", Short(length=7), n_steps=5, **SMALL).learn(70).n_updates == 14


def test_in_turn_a_seed_fixes_every_bit_with_any_number_of_workers():
    def trained(seed: int, n_workers: int) -> Tensor:
        model = A3C("MlpPolicy", lambda: Short(), n_workers=n_workers, deterministic=True, **{**SMALL, "seed": seed})
        return model.learn(101).policy.flat.detach().clone()

    first, again, other, alone = trained(1, 3), trained(1, 3), trained(2, 3), trained(1, 1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, alone)


def test_two_workers_in_turn_are_rmsprop_steps_along_each_ones_gradient():
    """What reaches the shared weights, against rollouts, autograd and RMSprop in this process."""
    common = {"seed": 5, "n_steps": 4, "n_workers": 2, "max_grad_norm": None, "policy_kwargs": {"net_arch": [8]}}
    model = A3C("MlpPolicy", lambda: Short(length=6), deterministic=True, **common)
    theta, square_avg = model.policy.flat.detach().clone(), torch.zeros_like(model.policy.flat.detach())

    local = []
    for launch in range(2):
        worker = A3C("MlpPolicy", lambda: Short(length=6), **common)
        worker._take_launch(launch)
        env = make_environments(lambda: Short(length=6))
        local.append((worker, env, [env.reset(worker._env_seed)]))
    for turn in range(10):
        worker, env, (obs,) = local[turn % 2]
        with torch.no_grad():
            worker.policy.flat.copy_(theta)
        seen, actions, rewards, is_terminal = [], [], [], False
        while len(seen) < 4 and not is_terminal:
            action = worker.policy.act(obs, False, worker._act_generator)
            seen.append(torch.as_tensor(obs[0]))
            actions.append(int(action[0]))
            step = env.step(action)
            rewards.append(float(step.reward[0]))
            obs, is_terminal = step.obs, bool(step.terminated[0])
        local[turn % 2][2][:] = [obs]

        # R <- 0 or V(s_t); R <- r_i + gamma R. The loss by its formula.
        value, log_prob, entropy = worker.policy.evaluate_actions(torch.stack(seen), torch.tensor(actions))
        R = 0.0 if is_terminal else worker.policy.predict_values(torch.as_tensor(obs)).item()
        returns = []
        for reward in reversed(rewards):
            R = reward + 0.99 * R
            returns.insert(0, R)
        advantage = torch.tensor(returns) - value.detach()
        loss = (
            -(advantage * log_prob).mean()
            - 0.01 * entropy.mean()
            + 0.5 * (value - torch.tensor(returns)).square().mean()
        )
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(worker.policy.parameters()))])
        square_avg = 0.99 * square_avg + 0.01 * gradient**2
        theta = theta - 7e-4 * gradient / (square_avg.sqrt() + 1e-5)

    model.learn(2 * (4 + 2 + 4 + 2 + 4))  # each worker's rollouts, as episodes are six steps
    assert model.n_updates == 10
    assert torch.allclose(model.policy.flat, theta, rtol=0, atol=2e-6)


# Counts.


@pytest.mark.parametrize(("n_envs", "asked", "run"), [(1, 1, 1), (1, 503, 503), (3, 301, 303)])
def test_total_timesteps_is_exact_with_two_workers(n_envs, asked, run):
    model = A3C("MlpPolicy", lambda: Short(), n_workers=2, n_envs=n_envs, **SMALL).learn(asked)
    assert model.num_timesteps == run
    assert np.isfinite(model.policy.flat.detach().numpy()).all()


def test_a_second_run_counts_on_and_draws_other_numbers():
    model = A3C("MlpPolicy", lambda: Short(), n_workers=1, **SMALL).learn(50)
    assert (model.num_timesteps, model._n_launches) == (50, 1)
    model.learn(30, reset_num_timesteps=False)
    assert (model.num_timesteps, model._n_launches) == (80, 1)  # with its predecessor's random numbers
    model.learn(20)
    assert (model.num_timesteps, model._n_launches) == (20, 2)
    first = A3C("MlpPolicy", lambda: Short(), n_workers=1, **SMALL)
    seeds = []
    for launch in (0, 1, 2):
        first._take_launch(launch)
        seeds.append((first._env_seed, first._act_generator.initial_seed(), first._update_state.sum().item()))
    assert len(set(seeds)) == 3


class Stop(BaseCallback):
    """Stops in the midst of things."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def _on_step(self) -> bool:
        return self.num_timesteps < self.at


def in_turn(**arguments: Any) -> A3C:
    usual: dict[str, Any] = {"env": lambda: Short(), "n_workers": 2, "n_steps": 4, **SMALL}
    return A3C("MlpPolicy", deterministic=True, **{**usual, **arguments})


@pytest.mark.parametrize(
    "arguments", [{"n_workers": 3, "normalize_obs": True}, {"n_envs": 2, "policy_kwargs": {"dropout": 0.2}}]
)
def test_in_turn_a_run_that_is_stopped_saved_and_loaded_ends_as_one_that_was_not(arguments, tmp_path):
    whole = in_turn(**arguments).learn(300)
    stopped = in_turn(**arguments).learn(300, callback=Stop(at=130))
    assert 130 <= stopped.num_timesteps < 140
    stopped.save(tmp_path / "stopped", full=True)
    left = 300 - stopped.num_timesteps
    loaded = A3C.load(tmp_path / "stopped", env=lambda: Short())
    for model in (stopped, loaded):
        model.learn(left, reset_num_timesteps=False)
        assert torch.equal(model.policy.flat, whole.policy.flat)
        assert model.n_updates == whole.n_updates
        assert [episode["r"] for episode in model.ep_info_buffer] == [episode["r"] for episode in whole.ep_info_buffer]
    statistics = [model.policy.optimizer.state[model.policy.flat]["square_avg"] for model in (whole, loaded)]
    assert torch.equal(*statistics)


def test_in_turn_a_run_resumes_from_its_newest_checkpoint_exactly(tmp_path):
    def run(steps: int, folder: str) -> A3C:
        checkpoints = CheckpointCallback(save_freq=50, save_path=tmp_path / folder)
        return in_turn().learn(steps, callback=checkpoints, resume=True)

    whole = run(300, "whole")
    in_turn().learn(300, callback=[CheckpointCallback(save_freq=50, save_path=tmp_path / "cut"), Stop(at=170)])
    resumed = run(300, "cut")
    assert resumed.num_timesteps == whole.num_timesteps == 300
    assert torch.equal(resumed.policy.flat, whole.policy.flat)
    # The wrong variant: without the workers' states they begin new episodes, and end elsewhere.
    forgetful = A3C.load(next((tmp_path / "cut").glob("*_15?_steps.zip")), env=lambda: Short())
    forgetful._worker_states.clear()
    forgetful.learn(300 - forgetful.num_timesteps, reset_num_timesteps=False)
    assert not torch.equal(forgetful.policy.flat, whole.policy.flat)


def test_a_sigterm_to_the_whole_job_is_the_parents_to_answer(tmp_path):
    def terminate(variables, _):
        workers = workers_of(os.getpid())
        if len(workers) == 2 and variables["self"].num_timesteps >= 100:
            for pid in workers:
                os.kill(pid, signal.SIGTERM)

    whole = in_turn().learn(300)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no worker is replaced, and none keeps its state to itself
        cut = in_turn().learn(300, callback=[terminate, Stop(at=170)])
    cut.save(tmp_path / "cut", full=True)
    resumed = A3C.load(tmp_path / "cut", env=lambda: Short())
    resumed.learn(300 - resumed.num_timesteps, reset_num_timesteps=False)
    assert resumed.num_timesteps == whole.num_timesteps == 300
    assert torch.equal(resumed.policy.flat, whole.policy.flat)


def test_what_callbacks_put_off_is_done_when_one_of_them_stops_the_run(tmp_path):
    model = A3C("MlpPolicy", lambda: Short(), n_workers=1, **SMALL)
    model.learn(1e9, callback=[CheckpointCallback(save_freq=20, save_path=tmp_path), Stop(at=20)])
    (path,) = tmp_path.glob("*.zip")
    assert A3C.load(path).num_timesteps >= 20


class Impatient(BaseCallback):
    """Ends a training as soon as it has to wait."""

    def _on_idle(self) -> bool:
        return False


def test_in_turn_a_run_that_ends_before_its_workers_have_started_goes_on_exactly(tmp_path: Path) -> None:
    whole = in_turn().learn(90)
    model = in_turn().learn(90, callback=Impatient())
    assert model.num_timesteps == 0
    model.learn(90, callback=Stop(at=30), reset_num_timesteps=False)
    steps = model.num_timesteps
    assert 30 <= steps < 60
    model.learn(90 - steps, callback=Impatient(), reset_num_timesteps=False)
    assert model.num_timesteps == steps
    model.save(tmp_path / "model", full=True)
    for resumed in (model, A3C.load(tmp_path / "model", env=lambda: Short())):
        resumed.learn(90 - steps, reset_num_timesteps=False)
        assert torch.equal(resumed.policy.flat, whole.policy.flat)


class Sleeping(Short):
    """Noise; the twelfth step takes long."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if self.life == 11:
            time.sleep(self.seconds)
        return super().step(action)


def test_in_turn_a_full_save_in_the_midst_of_a_rollout_says_that_it_has_no_states(tmp_path: Path) -> None:
    class Saving(BaseCallback):
        is_saved = False

        def _on_idle(self) -> bool:
            if self.num_timesteps and not self.is_saved:
                self.is_saved = True
                with pytest.warns(UserWarning, match=r"workers \[0, 1\] did not tell their states"):
                    self.model.save(tmp_path / "model", full=True)
            return True

    saving = Saving()
    model = in_turn(env=lambda: Sleeping(1.0)).learn(60, callback=saving)
    assert saving.is_saved and model.num_timesteps == 60
    assert torch.equal(model.policy.flat, in_turn().learn(60).policy.flat)


def test_in_turn_an_interrupted_step_is_told_of_since_the_run_cannot_go_on_exactly() -> None:
    class Interrupting(BaseCallback):
        def _on_idle(self) -> bool:
            if self.num_timesteps >= 10:  # both workers have told of a rollout
                raise KeyboardInterrupt
            return True

    model = in_turn(env=lambda: Sleeping(600.0))
    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match=r"workers \[\d\] did not tell their states"):
        model.learn(60, callback=Interrupting())


class Filming(Short):
    """Noise; at its end, an episode tells more than a socket holds."""

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, _ = super().step(action)
        time.sleep(0.02)  # so that each end is told of by itself
        return obs, reward, terminated, truncated, {"film": bytes(1_000_000)} if terminated else {}


@pytest.mark.parametrize("deterministic", [True, False])
def test_reports_may_be_larger_than_what_a_socket_holds(deterministic: bool) -> None:
    films: list[int] = []

    def look(variables: dict[str, Any], _: object) -> None:
        films.extend(len(info["film"]) for info in variables["infos"] if "film" in info)

    model = A3C("MlpPolicy", lambda: Filming(), n_workers=1, deterministic=deterministic, **SMALL)
    assert model.learn(60, callback=look).num_timesteps == 60
    assert films == [1_000_000] * 8


def test_a_copy_made_in_training_is_in_none() -> None:
    copies: list[A3C] = []
    model = in_turn()
    model.learn(30, callback=lambda *_: copies.append(copy.deepcopy(model)))
    assert copies[0].learn(20).num_timesteps == 20


def test_other_environments_begin_new_episodes():
    model = in_turn().learn(30)
    assert all(state is not None for state in model._worker_states.by_rank)
    model.set_env(lambda: Short(length=3))
    model.learn(30, reset_num_timesteps=False)
    assert model.ep_info_buffer[-1]["l"] == 3


# Workers that fail.


class Signal(BaseCallback):
    """Sends a signal to a worker once a number of steps was taken."""

    def __init__(self, number: int, after: int) -> None:
        super().__init__()
        self.number, self.after, self.is_sent = number, after, False

    def _on_step(self) -> bool:
        if not self.is_sent and self.num_timesteps >= self.after:
            rows = self.model._worker_states.running._memory.rows
            deadline = time.monotonic() + 120
            while not rows[:, STEPS].all() and time.monotonic() < deadline:
                time.sleep(0.01)  # a worker that still sets itself up would be waited for longer
            os.kill(workers_of(os.getpid())[-1], self.number)
            self.is_sent = True
        return True


def test_a_killed_worker_is_replaced_and_the_count_is_right():
    model = A3C("MlpPolicy", lambda: Short(), n_workers=2, **SMALL)
    with pytest.warns(UserWarning, match=r"was killed by SIGKILL after [\d,]+ steps; replaced \(1 of 10\)"):
        model.learn(8_000, callback=Signal(signal.SIGKILL, after=500))
    assert model.num_timesteps == 8_000
    assert model._n_launches == 3
    assert np.isfinite(model.policy.flat.detach().numpy()).all()


def test_a_stopped_worker_is_replaced():
    model = A3C("MlpPolicy", lambda: Short(), n_workers=2, worker_timeout=1.0, **SMALL)
    with pytest.warns(UserWarning, match=r"took no step for 1 seconds and was ended"):
        model.learn(4_000, callback=Signal(signal.SIGSTOP, after=500))
    assert model.num_timesteps == 4_000


class Killer(BaseCallback):
    """Kills a worker, drawn at random, every 6,000 steps."""

    def __init__(self) -> None:
        super().__init__()
        self.kills = 0
        self.draw = random.Random(0)

    def _on_step(self) -> bool:
        if self.num_timesteps >= 6_000 * (self.kills + 1) and self.kills < 30:
            found = subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", "sbac.transport"], capture_output=True)
            os.kill(self.draw.choice([int(word) for word in found.stdout.split()]), signal.SIGKILL)
            self.kills += 1
        return True


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:worker .* was killed by SIGKILL")
def test_a3c_learns_cart_pole_although_thirty_workers_are_killed():
    more = {"n_steps": 16, "n_workers": 2, "n_envs": 4, "max_worker_restarts": 30}
    model = A3C("MlpPolicy", "CartPole-v1", LinearSchedule(3e-3, 0.0), seed=0, **more)
    killer, evaluation = Killer(), EvalCallback("CartPole-v1", n_eval_episodes=5, eval_freq=5_000, verbose=0)
    model.learn(200_000, callback=[killer, evaluation])
    assert (killer.kills, model.num_timesteps) == (30, 200_000)
    assert np.isfinite(model.policy.flat.detach().numpy()).all()
    # Workers that run freely make no two runs alike: of fourteen, thirteen ended with 500 and one with 246. The best of
    # ten evaluations leaves less to luck; 475 counts as solved, 22 is chance.
    assert evaluation.best_mean_reward >= 250


def test_a_worker_that_raises_is_replaced_until_it_is_too_much():
    model = A3C("MlpPolicy", lambda: Short(raise_at=60), n_workers=1, max_worker_restarts=1, **SMALL)
    before = model.policy.flat.detach().clone()
    with (
        pytest.warns(UserWarning, match=r"worker 0 .* raised an error after 56 steps; replaced \(1 of 1\)"),
        pytest.raises(
            WorkerFault,
            match=r"(?s)worker 0 .* raised an error after 112 steps, and max_worker_restarts=1 workers were replaced "
            r"already.*RuntimeError: the gears are stuck.*environment 0 \(Short\) raised RuntimeError at its step 60",
        ),
    ):
        model.learn(1_000)
    # Nothing of what was learned is lost.
    assert model.num_timesteps == 112
    assert not torch.equal(model.policy.flat, before)
    assert np.isfinite(model.policy.flat.detach().numpy()).all()
    model.set_env(lambda: Short())
    assert model.learn(20, reset_num_timesteps=False).num_timesteps == 132


class Leaving(Short):
    """Ends its process."""

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        sys.exit("the simulator has no licence")


def test_a_worker_that_exits_says_why() -> None:
    model = A3C("MlpPolicy", lambda: Leaving(), n_workers=1, max_worker_restarts=0, **SMALL)
    with pytest.raises(WorkerFault, match=r"(?s)raised an error.*in step\n.*SystemExit: the simulator has no licence"):
        model.learn(20)


def test_what_no_worker_can_make_is_answered_at_once():
    parent = os.getpid()

    def only_here() -> gymnasium.Env[Any, Any]:
        assert os.getpid() == parent, "the licence is for one process"
        return Short()

    model = A3C("MlpPolicy", only_here, n_workers=2, **SMALL)
    with pytest.raises(WorkerFault, match=r"(?s)could not be set up:.*the licence is for one process"):
        model.learn(100)
    assert model.num_timesteps == 0


def test_an_environment_that_sends_nan_never_reaches_the_weights():
    class Broken(Short):
        def _obs(self) -> np.ndarray:
            return np.full(2, np.nan if self.life == 30 else 0.5, np.float32)

    model = A3C("MlpPolicy", lambda: Broken(), n_workers=1, max_worker_restarts=0, **SMALL)
    with pytest.raises(
        WorkerFault, match=r"(?s)NotFiniteError: environment 0 sent an observation that is not finite at step 30"
    ):
        model.learn(1_000)
    assert np.isfinite(model.policy.flat.detach().numpy()).all()


def run_script(tmp_path: Path, text: str) -> subprocess.Popen[str]:
    """Start a script without a guard around its main part, as the leader of a process group."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(text))
    return subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a job in the background ignores
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(sbac.__file__).parents[1])},
    )


ENDLESS = """
    import gymnasium, numpy as np
    from sbac import A3C

    class Mine(gymnasium.Env):                      # defined in the main script, which has no guard
        observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
        action_space = gymnasium.spaces.Discrete(2)
        def reset(self, **kwargs):
            super().reset(**kwargs)
            return np.zeros(2, np.float32), {}
        def step(self, action):
            return np.zeros(2, np.float32), 1.0, False, False, {}

    gymnasium.register("Mine-v0", entry_point=Mine, max_episode_steps=10)
    model = A3C("MlpPolicy", "Mine-v0", n_workers=2, seed=0)
    def tell(locals_, globals_):
        if model.num_timesteps == 200:
            print("learning", flush=True)
    try:
        model.learn(1e9, callback=tell)
    except KeyboardInterrupt:
        model.save("kept")
        print("kept", model.num_timesteps, flush=True)
"""


def test_ctrl_c_ends_all_workers_and_keeps_the_model(tmp_path):
    process = run_script(tmp_path, ENDLESS)
    assert process.stdout is not None
    assert process.stdout.readline() == "learning\n"
    workers = workers_of(process.pid)
    assert len(workers) == 2
    pressed = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does
    out, err = process.communicate(timeout=30)
    assert time.monotonic() - pressed < 5
    assert not any(is_alive(pid) for pid in workers)
    assert err == ""
    kept = re.fullmatch(r"kept (\d+)\n", out)
    assert kept is not None
    steps = int(kept[1])
    assert steps >= 200
    assert A3C.load(tmp_path / "kept.zip").num_timesteps == steps


SLOW = """
    import os, subprocess, sys, time
    import gymnasium, numpy as np

    class Slow(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
        action_space = gymnasium.spaces.Discrete(2)
        steps, program = 0, None

        def reset(self, **kwargs):
            super().reset(**kwargs)
            return np.zeros(2, np.float32), {}

        def step(self, action):
            self.steps += 1
            KIND(self)
            return np.zeros(2, np.float32), 1.0, False, False, {}

        def close(self):
            if KIND is closing and self.steps:
                pause(600)

    def say_slow():
        os.write(1, b"slow\\n")                     # whole, where several processes write to one pipe

    def pause(seconds):
        say_slow()
        time.sleep(seconds)

    def stepping(env):
        if env.steps == 8:
            pause(600)

    def closing(env):
        pass

    def evaluating(env):
        if sys.argv[0] != "-c":                     # not in a worker
            pause(0.5)

    def asking(env):
        if env.program is None:
            env.program = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if env.steps == 8:
            say_slow()
        time.sleep(0.1)
        env.program.stdin.write(b"?")
        env.program.stdin.flush()
        assert env.program.stdout.read(1)           # it gets Ctrl-C too

    gymnasium.register("Slow-v0", entry_point=Slow, max_episode_steps=5)
"""


@pytest.mark.parametrize(
    ("kind", "deterministic", "words"),
    [
        ("stepping", False, ""),
        ("stepping", True, ""),
        ("closing", False, "--steps 20"),
        ("evaluating", False, "--eval-freq 5 --eval-episodes 1000"),
        ("asking", True, "--set max_worker_restarts=0"),
    ],
    ids=["stepping", "stepping in turn", "closing", "evaluating", "asking a program"],
)
def test_one_ctrl_c_ends_a_training_in_which_something_takes_long(
    kind: str, deterministic: bool, words: str, tmp_path: Path
) -> None:
    (tmp_path / "slow.py").write_text(textwrap.dedent(SLOW).replace("KIND", kind))
    arguments = "train a3c slow:Slow-v0 --out run --checkpoint-freq 0 --eval-freq 0 --set n_workers=2"
    argv = [*arguments.split(), "--set", f"deterministic={deterministic}", *words.split()]
    process = run_script(tmp_path, f"from sbac.cli import main\nraise SystemExit(main({argv!r}))")
    assert process.stdout is not None
    while not process.stdout.readline().endswith("slow\n"):  # maybe within a line of the parent's
        assert process.poll() is None
    workers = workers_of(process.pid)
    assert len(workers) == 2
    pressed = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    while any(is_alive(pid) for pid in workers):
        assert time.monotonic() - pressed < 5
        time.sleep(0.05)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    stopped = re.search(r"stopped at step ([\d,]+)", out)
    assert stopped is not None
    steps = int(stopped[1].replace(",", ""))
    assert steps == 20 if kind == "closing" else steps >= 5  # a rollout has 5 steps
    assert A3C.load(tmp_path / "run/model.zip").num_timesteps == steps
    (checkpoint,) = (tmp_path / "run/checkpoints").glob("*.zip")
    assert checkpoint.name == f"model_{steps}_steps.zip"
    assert A3C.load(checkpoint).num_timesteps == steps
    assert "Traceback" not in err  # nobody is replaced any more
    assert ("the evaluation at step" in err) is (kind == "evaluating")
    # Of a worker that was cut off, where it matters.
    assert ("did not tell their states" in err) is (deterministic and kind in ("stepping", "asking"))


@pytest.mark.parametrize(
    ("line", "before"),
    [
        ("model =", ""),
        # In the midst of a step.
        ("return np.zeros(2, np.float32), 1.0", "import os, time; os.write(1, b'learning\\n'); time.sleep(600)"),
        # A fork of the parent keeps its ends of the sockets open.
        ("if model.num", "import os, time; os.fork() or (os.closerange(0, 3), time.sleep(600))"),
    ],
    ids=["between two steps", "in a step", "forked"],
)
def test_workers_of_a_killed_parent_end(line: str, before: str, tmp_path: Path) -> None:
    script = re.sub(rf"( *){re.escape(line)}", lambda found: f"{found[1]}{before}\n{found[0]}", ENDLESS)
    process = run_script(tmp_path, script)
    assert process.stdout is not None
    assert process.stdout.readline() == "learning\n"
    workers = workers_of(process.pid)
    assert len(workers) == 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(is_alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    alive = [pid for pid in workers if is_alive(pid)]
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # the fork
    process.communicate()
    assert not alive


# The interface of every other algorithm.


def test_callbacks_log_evaluation_and_files(tmp_path):
    model = A3C("MlpPolicy", lambda: Short(), n_workers=2, **SMALL)
    model.set_logger(configure(tmp_path, ("csv",)))
    seen: dict[str, list[Any]] = {"steps": [], "dones": [], "worker": []}

    def watch(locals_: dict[str, Any], _: dict[str, Any]) -> None:
        seen["steps"].append(model.num_timesteps)
        seen["dones"].append(locals_["dones"].sum())
        seen["worker"].append(locals_["worker"])
        for done, info in zip(locals_["dones"], locals_["infos"], strict=True):
            assert ("episode" in info) == done

    evaluation = EvalCallback(lambda: Short(), n_eval_episodes=2, eval_freq=400, best_model_save_path=tmp_path)
    model.learn(1_000, callback=[watch, evaluation], log_interval=20)
    assert seen["steps"] == list(range(1, 1_001))
    assert set(seen["worker"]) == {0, 1}
    assert sum(seen["dones"]) == model.episodes.count
    assert evaluation.evaluations.timesteps == [400, 800]
    assert list(model.ep_success_buffer) == [1.0] * 100
    assert {episode["l"] for episode in model.ep_info_buffer} == {7}

    header, *rows = (tmp_path / "progress.csv").read_text().splitlines()
    for key in (
        "workers/fps_0",
        "workers/fps_1",
        "workers/restarts",
        "train/staleness",
        "train/policy_loss",
        "time/fps",
    ):
        assert key in header.split(",")
    assert len(rows) >= 2

    model.save(tmp_path / "a3c", full=True)
    for loaded in (A3C.load(tmp_path / "a3c"), sbac.load(tmp_path / "a3c")):
        assert torch.equal(loaded.policy.flat, model.policy.flat)
        assert (loaded.num_timesteps, loaded.n_updates, loaded._n_launches) == (1_000, model.n_updates, 2)
        assert loaded.n_workers == 2
        obs = np.array([0.3, -0.2], np.float32)
        assert loaded.predict(obs)[0] == model.predict(obs)[0]
    again = A3C.load(tmp_path / "a3c", env=lambda: Short())
    assert again.learn(50, reset_num_timesteps=False).num_timesteps == 1_050
    assert sbac.load(tmp_path / "best_model").num_timesteps in (400, 800)


def test_the_optimizers_statistics_go_into_the_file_and_on_from_it(tmp_path):
    model = A3C("MlpPolicy", lambda: Short(), n_workers=1, **SMALL).learn(40)
    model.save(tmp_path / "model")
    own = model.policy.state_tensors()["optimizer/square_avg"]
    stored = A3C.load(tmp_path / "model").policy.state_tensors()["optimizer/square_avg"]
    assert own.abs().sum() > 0
    assert torch.equal(own, stored)


def test_a_callback_stops_the_workers():
    model = A3C("MlpPolicy", lambda: Short(), n_workers=2, **SMALL)
    model.learn(1e9, callback=StopTrainingOnMaxEpisodes(max_episodes=20))
    assert 140 <= model.num_timesteps < 1e6


def test_an_error_in_a_callback_ends_the_workers_too():
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("of the user")

    model = A3C("MlpPolicy", lambda: Short(), n_workers=2, **SMALL)
    with pytest.raises(ZeroDivisionError, match="of the user"):
        model.learn(1e9, callback=fail)
    assert model.num_timesteps > 0


def test_a_callback_that_changes_what_workers_were_sent_is_told():
    class Slower(BaseCallback):
        def _on_step(self) -> bool:
            self.model.learning_rate, self.model.verbose = 1e-12, 0
            return True

    model = A3C("MlpPolicy", lambda: Short(), n_workers=1, **SMALL)
    with pytest.warns(UserWarning, match="^learning_rate changed while workers learn") as told:
        model.learn(200, callback=Slower())
    assert len(told) == 1
    before = model.get_parameters()["policy"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(50, reset_num_timesteps=False)
    after = model.get_parameters()["policy"]
    assert all(torch.allclose(after[name], before[name], rtol=0, atol=1e-9) for name in before)


def test_the_number_of_workers_is_fixed_once_they_have_rows():
    model = A3C("MlpPolicy", "CartPole-v1", n_workers=1)
    with pytest.raises(AttributeError, match="n_workers is 1 since the model was made"):
        model.n_workers = 2


def test_the_learning_rate_is_annealed_over_the_steps_of_all_workers():
    def trained(learning_rate: Any) -> tuple[Tensor, Tensor]:
        model = A3C("MlpPolicy", lambda: Short(), n_workers=2, deterministic=True, learning_rate=learning_rate, **SMALL)
        at_140: list[Tensor] = []
        model.learn(280, callback=lambda *_: at_140.append(model.policy.flat.detach().clone()))
        return at_140[139], at_140[-1]

    # Nothing moves any more in the second half, and the first half is as with a constant rate.
    half, end = trained(lambda remaining: 1e-3 * (remaining > 0.49))
    constant_half, constant_end = trained(1e-3)
    assert torch.equal(half, constant_half)
    assert not torch.equal(end, constant_end)
    assert (end - half).abs().max() < (constant_end - constant_half).abs().max() / 3


class Frozen(BaseFeaturesExtractor):
    """A body of which one part never learns, and another is frozen later."""

    def __init__(self, observation_space: spaces.Space[Any]) -> None:
        super().__init__(observation_space, 4)
        self.fixed, self.later = nn.Linear(2, 4), nn.Linear(4, 4)
        self.fixed.requires_grad_(False)

    def forward(self, obs: Tensor) -> Tensor:
        return torch.tanh(self.later(self.fixed(obs)))


def test_what_is_frozen_stays_and_reaches_the_workers():
    kwargs = {"features_extractor_class": Frozen, "net_arch": [8]}
    model = A3C("MlpPolicy", lambda: Short(), n_workers=1, seed=0, policy_kwargs=kwargs)
    body = model.policy.features_extractor
    with torch.no_grad():
        body.fixed.weight.fill_(0.5)
    body.later.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}
    model.learn(100)
    after = model.policy.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not any("features_extractor" in name for name in changed)


def test_the_command_line_trains_it(tmp_path, capsys):
    code = main(
        ["train", "a3c", "CartPole-v1", "--steps", "600", "--set", "n_workers=2", "--out", str(tmp_path / "run")]
    )
    assert code == 0
    assert "A3C on CartPole-v1: 600 steps" in capsys.readouterr().out
    assert sbac.load(tmp_path / "run/model.zip").num_timesteps == 600
    assert main(["eval", str(tmp_path / "run"), "--episodes", "2"]) == 0


def test_the_command_line_tells_of_workers_that_fail(tmp_path, capsys):
    gymnasium.register("Failing-v0", entry_point=lambda: Short(raise_at=20))
    try:
        code = main(
            [
                *("train", "a3c", "Failing-v0", "--steps", "600", "--eval-freq", "0", "--out", str(tmp_path / "run")),
                *("--set", "n_workers=1", "--set", "max_worker_restarts=0"),
            ]
        )
    finally:
        del gymnasium.registry["Failing-v0"]
    assert code == 1
    assert "the gears are stuck" in capsys.readouterr().err
    assert sbac.load(tmp_path / "run/model.zip").num_timesteps == 19


# Bad input.


@pytest.mark.parametrize(
    ("env", "arguments", "error", "text"),
    [
        (Short(), {}, ValueError, "a live environment (Short) cannot be sent to them: pass its id, or a function"),
        ([Short], {}, TypeError, "env must be an id or a function that makes an environment"),
        ("CartPoll-v1", {}, ValueError, "did you mean 'CartPole-v1'?"),
        (Short, {"n_workers": 0}, ValueError, "n_workers must be a whole number, at least 1, not 0"),
        (Short, {"n_envs": 0}, ValueError, "n_envs must be a whole number, at least 1, not 0"),
        (Short, {"worker_timeout": 0}, ValueError, "worker_timeout must be a finite number above 0, not 0"),
        (Short, {"max_worker_restarts": -1}, ValueError, "max_worker_restarts must be a whole number, at least 0"),
        (Short, {"deterministic": "yes"}, ValueError, "deterministic must be True or False, not 'yes'"),
        (Short, {"device": "meta"}, ValueError, "device must be 'auto' or 'cpu', not 'meta'"),
    ],
)
def test_bad_input_is_answered(env, arguments, error, text):
    with pytest.raises(error, match=re.escape(text)):
        A3C("MlpPolicy", env, **{**SMALL, **arguments})


def test_what_cannot_be_sent_is_named():
    stream = sys.stdout.buffer

    def make() -> gymnasium.Env[Any, Any]:
        assert stream
        return Short()

    model = A3C("MlpPolicy", make, n_workers=1, **SMALL)
    with pytest.raises(
        TypeError, match=r"holds something that belongs to this process .*; let the function make or open it itself"
    ):
        model.learn(10)


def test_ctrl_c_while_a_worker_is_started_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    start = subprocess.Popen
    started = []

    def interrupted(*arguments: Any, **others: Any) -> Any:
        started.append(start(*arguments, **others))
        os.kill(os.getpid(), signal.SIGINT)
        return started[-1]

    model = A3C("MlpPolicy", "CartPole-v1", n_workers=2, **SMALL)
    monkeypatch.setattr(subprocess, "Popen", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.learn(5_000)
    monkeypatch.undo()
    assert len(started) == 1 and started[0].returncode is not None and not is_alive(started[0].pid)


class WithProgram(Short):
    """Starts a program, and ends it as Ctrl-C would."""

    def __init__(self, file: Path, closing_seconds: float = 0.0) -> None:
        super().__init__()
        self._seconds = closing_seconds
        self._program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        with file.open("a") as pids:
            pids.write(f"{self._program.pid}\n")

    def close(self) -> None:
        time.sleep(self._seconds)
        self._program.send_signal(signal.SIGINT)
        self._program.wait()


@pytest.mark.parametrize("seconds", [0.0, 3.0])
def test_what_environments_started_is_ended_by_them(seconds: float, tmp_path: Path) -> None:
    file = tmp_path / "pids"
    A3C("MlpPolicy", lambda: WithProgram(file, seconds), n_workers=1, **SMALL).learn(20)
    started = [int(pid) for pid in file.read_text().split()]
    alive = [pid for pid in started if is_alive(pid)]
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    assert len(started) >= 2 and not alive  # one to see the spaces, and the worker's


class Hanging(WithProgram):
    """Starts a program, and hangs."""

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        time.sleep(600)
        raise AssertionError


@pytest.mark.skipif(not Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").exists(), reason="Linux tells of them")
@pytest.mark.filterwarnings("ignore:worker .* took no step for 1 seconds")
def test_what_a_hanging_environment_started_ends_with_its_worker(tmp_path: Path) -> None:
    file = tmp_path / "pids"
    model = A3C("MlpPolicy", lambda: Hanging(file), n_workers=1, worker_timeout=1, max_worker_restarts=1, **SMALL)
    with pytest.raises(WorkerFault, match="took no step for 1 seconds"):
        model.learn(20)
    started = [int(pid) for pid in file.read_text().split()]
    alive = [pid for pid in started if is_alive(pid)]
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    assert len(started) == 3 and not alive  # one to see the spaces, and two workers'


@pytest.mark.skipif(os.name != "posix", reason="descriptors of POSIX")
@pytest.mark.parametrize("closed", ["<&-", ">&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_are_none_of_the_workers_business(closed: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "from sbac import A3C\n"
        "model = A3C('MlpPolicy', 'CartPole-v1', n_workers=1, seed=0).learn(50)\n"
        f"model.save({str(tmp_path / 'model')!r})\n",
        encoding="utf-8",
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = ["/bin/sh", "-c", f'exec "$0" "$1" {closed}', sys.executable, str(script)]
    assert subprocess.run(command, env=environment, timeout=120).returncode == 0
    assert sbac.load(tmp_path / "model.zip").num_timesteps == 50


def test_an_id_may_name_the_module_that_registers_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "import gymnasium\n"
        "from gymnasium.envs.classic_control import PendulumEnv\n"
        "gymnasium.register('Mine-v0', entry_point=PendulumEnv, max_episode_steps=5)\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        model = A3C("MlpPolicy", "mine:Mine-v0", n_workers=1, **SMALL).learn(10)
    finally:
        gymnasium.registry.pop("Mine-v0", None)
        sys.modules.pop("mine", None)
    assert model.num_timesteps == 10
    assert [episode["l"] for episode in model.ep_info_buffer] == [5, 5]


@pytest.mark.filterwarnings("ignore:.*Using the latest versioned environment")
def test_an_id_may_leave_its_version_out() -> None:
    model = A3C("MlpPolicy", "CartPole", n_workers=1, **SMALL)
    assert model.learn(10).num_timesteps == 10
    assert model.env.env_id == "CartPole-v1"


def test_workers_see_the_spec_of_an_environment_that_only_this_process_registered():
    make: Callable[[], gymnasium.Env[Any, Any]] = lambda: Short(length=3)  # noqa: E731
    gymnasium.register("Here-v0", entry_point=make)
    try:
        model = A3C("MlpPolicy", "Here-v0", n_workers=1, **SMALL).learn(30)
    finally:
        del gymnasium.registry["Here-v0"]
    assert {episode["l"] for episode in model.ep_info_buffer} == {3}
    assert evaluate_policy(model, lambda: Short(length=3), 3)[1] >= 0

"""A training that is saved, loaded and continued equals one that was never stopped."""

from __future__ import annotations

import csv
import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sbac import A2C, DDPG, TD3
from sbac import tape as tape_module
from sbac.archive import ArchiveError, read_archive, write_archive
from sbac.base import BaseAlgorithm
from sbac.callbacks import (
    BaseCallback,
    CheckpointCallback,
    EvalCallback,
    EveryNTimesteps,
    LogEveryNTimesteps,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
)
from sbac.envs import make_environments
from sbac.logger import configure
from sbac.prioritized import PrioritizedReplayBuffer
from sbac.tape import Tape
from tests.environments import Counter, Random
from tests.kill import kill_test

SMALL = {"policy_kwargs": {"net_arch": [16, 8]}, "seed": 0}
REPLAY = {"learning_starts": 40, "batch_size": 8, "buffer_size": 300}


def everything(model: BaseAlgorithm) -> dict[str, Any]:
    """The weights, and what the optimizers and the generators hold."""
    state = {f"policy.{name}": value for name, value in model.policy.state_dict().items()}
    for name, network in model._trained().items():
        for index, entries in network.optimizer.state_dict()["state"].items():
            state.update({f"{name}.{index}.{key}": torch.as_tensor(value) for key, value in entries.items()})
    state["act"] = model._act_generator.get_state()
    state["update"] = model._update_state
    state["draw"] = torch.as_tensor(model.generator.random())
    return state


def assert_equal(one: BaseAlgorithm, other: BaseAlgorithm) -> None:
    ours, theirs = everything(one), everything(other)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


# Environments are put back.


@pytest.mark.parametrize("at", [57, 150, 203])
@pytest.mark.parametrize(
    ("cls", "env_id", "arguments"),
    [
        (A2C, "CartPole-v1", {"n_steps": 8}),
        (A2C, "Acrobot-v1", {}),
        (DDPG, "Pendulum-v1", REPLAY),
        (DDPG, "MountainCarContinuous-v0", {**REPLAY, "action_noise": None}),
        (TD3, "Pendulum-v1", REPLAY),
    ],
)
def test_a_run_continued_from_a_file_equals_one_never_stopped(
    cls: type[BaseAlgorithm], env_id: str, arguments: dict[str, Any], at: int, tmp_path: Path
) -> None:
    model = cls("MlpPolicy", env_id, **SMALL, **arguments)
    model.learn(301, callback=lambda *_: model.save(tmp_path / "at", full=True) if model.num_timesteps == at else None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        continued = cls.load(tmp_path / "at", env=env_id)
    assert continued.num_timesteps == at
    continued.learn(301 - at, reset_num_timesteps=False)
    assert_equal(continued, model)
    assert [(e["r"], e["l"]) for e in continued.ep_info_buffer] == [(e["r"], e["l"]) for e in model.ep_info_buffer]


def test_several_environments_with_wrappers_are_put_back_each_in_its_own_episode(tmp_path: Path) -> None:
    def factory() -> gymnasium.Env[Any, Any]:
        # Its wrappers count steps, remember observations and draw from the environment's generator.
        env = gymnasium.wrappers.StickyAction(gymnasium.make("CartPole-v1", max_episode_steps=23), 0.25)
        return gymnasium.wrappers.DelayObservation(env, delay=2)

    model = A2C("MlpPolicy", factory, n_envs=3, n_steps=7, **SMALL)
    model.learn(600, callback=lambda *_: model.save(tmp_path / "at", full=True) if model.num_timesteps == 303 else None)
    continued = A2C.load(tmp_path / "at", env=factory)
    assert len(set(continued.episodes.running_length)) > 1, "their episodes began at different times"
    continued.learn(600 - 303, reset_num_timesteps=False)
    assert_equal(continued, model)


def test_without_being_put_back_the_run_is_another(tmp_path: Path) -> None:
    """The test above would see it."""
    model = A2C("MlpPolicy", "CartPole-v1", **SMALL)
    model.learn(300, callback=lambda *_: model.save(tmp_path / "at", full=True) if model.num_timesteps == 103 else None)
    continued = A2C.load(tmp_path / "at", env="CartPole-v1")
    continued._reset_count = -1
    continued.learn(300 - 103, reset_num_timesteps=False)
    assert not torch.equal(continued.policy.flat, model.policy.flat)


def test_an_environment_found_unequal_begins_a_new_episode_and_the_old_one_is_truncated(tmp_path: Path) -> None:
    # It counts its episodes, which a fresh copy does not know of.
    def factory() -> gymnasium.Env[Any, Any]:
        return Counter(lengths=(5,))

    model = A2C("MlpPolicy", factory, n_steps=20, **SMALL)
    model.learn(40, callback=lambda *_: model.num_timesteps < 8)
    model.save(tmp_path / "at", full=True)
    with pytest.warns(UserWarning, match="will not go on exactly.*0: played again, its episode came out differently"):
        continued = A2C.load(tmp_path / "at", env=factory)
    assert continued._obs.tolist() == [[0, 1, 0]], "the reset after the one that was played again"
    buffer = continued.rollout_buffer
    assert buffer.truncated[:8, 0].tolist() == [False] * 7 + [True]
    assert buffer.get().bootstrap_obs.tolist() == [[0, 1, 3]], "the value of what followed the last step is asked for"
    assert continued.episodes.running_return.tolist() == [0]
    assert continued.episodes.running_length.tolist() == [0]


def test_a_cut_episode_is_truncated_in_the_replay_buffer_too(tmp_path: Path) -> None:
    def factory() -> gymnasium.Env[Any, Any]:
        return Counter(lengths=(5,))

    model = DDPG("MlpPolicy", factory, **SMALL, **REPLAY).learn(8)
    model.save(tmp_path / "at", full=True)
    with pytest.warns(UserWarning, match="will not go on exactly"):
        continued = DDPG.load(tmp_path / "at", env=factory)
    continued.learn(4, reset_num_timesteps=False)
    batch = continued.replay_buffer._batch(np.array([6, 7, 8]), gamma=0.9)
    assert batch.obs[:, 1:].tolist() == [[1, 1], [1, 2], [1, 0]]
    assert batch.successor[:, 1:].tolist() == [[1, 2], [1, 3], [1, 1]]
    assert batch.terminated.tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", ["vector", "options", "too long", "no generator"])
def test_what_cannot_be_put_back_is_said(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "too long":
        monkeypatch.setattr(tape_module, "LIMIT", 10)

    class Ungenerated(Random):
        np_random: Any = None

        def reset(self, **_: Any) -> tuple[np.ndarray, dict[str, Any]]:
            return np.zeros(1), {}

        def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
            return np.zeros(1), 0.0, False, False, {}

    def make() -> Any:
        if kind == "vector":
            return SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")])
        return Ungenerated if kind == "no generator" else "CartPole-v1"

    model = A2C("MlpPolicy", make(), **SMALL).learn(7)
    if kind == "options":
        model.env.env.reset(options={})
    model.save(tmp_path / "at", full=True)
    reason = "made from an id or a function" if kind == "vector" else "could not be recorded"
    with pytest.warns(UserWarning, match=reason):
        continued = A2C.load(tmp_path / "at", env=make())
    assert continued.learn(10, reset_num_timesteps=False).num_timesteps == 17


def test_new_episodes_are_not_those_of_the_start(tmp_path: Path) -> None:
    def make() -> SyncVectorEnv:
        return SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")])

    model = A2C("MlpPolicy", make(), **SMALL)
    model.learn(9)
    model.save(tmp_path / "at", full=True)
    with pytest.warns(UserWarning, match="will not go on exactly"):
        first, again = (A2C.load(tmp_path / "at", env=make()) for _ in range(2))
    assert np.array_equal(first._obs, again._obs), "loading twice gives the same"
    fresh = make_environments(make())
    assert not np.array_equal(first._obs, fresh.reset(model._env_seed))


def test_an_episode_is_recorded_bit_for_bit_whatever_the_actions() -> None:
    space = spaces.Dict(
        {"move": spaces.Box(-1, 1, (2, 2)), "press": spaces.MultiBinary(3), "turn": spaces.Discrete(3, start=-1)}
    )

    class Sum(gymnasium.Env[Any, Any]):
        observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
        action_space = space

        def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
            super().reset(**kwargs)
            self.total = self.np_random.random(2)
            return self.total.copy(), {}

        def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
            assert type(action) is dict and action["move"].shape == (2, 2) and action["turn"] in (-1, 0, 1)
            self.total += self.np_random.random() + action["move"].sum(0) * action["press"].sum() + action["turn"]
            return self.total.copy(), float(self.total.sum()), False, False, {}

    one, other = Sum(), Sum()
    recorder, player = Tape(one), Tape(other)
    space.seed(0)
    one.reset(seed=5)
    for _ in range(3):
        recorder.begin(None, None)
        obs, _ = one.reset()
        total = 0.0
        for _ in range(9):
            action = space.sample()
            recorder.add(action)
            obs, reward, *_ = one.step(action)
            total += reward
    recording = recorder.recording()
    assert recording is not None and recording.actions.shape == (9, 16 + 3 + 8)
    found, found_total = player.play(other, recording)
    assert np.array_equal(found, obs) and found_total == total
    assert other.np_random.random() == one.np_random.random()


def test_an_action_changed_later_is_recorded_as_it_was() -> None:
    env = gymnasium.make("Pendulum-v1")
    recorder = Tape(env)
    recorder.begin(0, None)
    action = np.array([0.5], np.float32)
    recorder.add(action)
    action[:] = 2
    recording = recorder.recording()
    assert recording is not None
    assert recording.actions.tobytes() == np.float32(0.5).tobytes()
    assert recording.seed == 0


# Runs are resumed from their checkpoints, with log and callbacks.


class Killed(BaseException):
    """What no code catches, as if the process were gone."""


class Kill(BaseCallback):
    """Kills at the call `at`, counted in this process."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def _on_training_start(self) -> None:
        self.left = self.at

    def _on_step(self) -> bool:
        self.left -= 1
        if self.left == 0:
            raise Killed
        return True


class Noting(BaseCallback):
    """Records a mean and a value of its own, and at which calls."""

    def _on_step(self) -> bool:
        self.logger.record_mean("own/mean", self.n_calls)
        if self.n_calls % 7 == 0:
            self.logger.record("own/seventh", self.num_timesteps)
        return True


def train(cls: type[BaseAlgorithm], env: Any, folder: Path, at: int = 0, steps: int = 400, **arguments: Any) -> Any:
    """One attempt at a run, as a script that is started again and again; returns the model."""
    model = cls("MlpPolicy", env, tensorboard_log=str(folder / "events"), **SMALL, **arguments)
    model.set_logger(configure(folder, ("csv", "json", "log")))
    patience = StopTrainingOnNoModelImprovement(1000)
    stop = StopTrainingOnMaxEpisodes(10_000)
    callbacks = [
        CheckpointCallback(23, folder / "checkpoints", resume="auto", keep_last=2),
        EvalCallback(
            env,
            callback_after_eval=patience,
            n_eval_episodes=2,
            eval_freq=31,
            log_path=folder,
            best_model_save_path=folder,
            deterministic=False,
            verbose=0,
        ),
        EveryNTimesteps(40, Noting()),
        LogEveryNTimesteps(90),
        stop,
        Kill(at),
    ]
    model.callbacks = {"patience": patience, "stop": stop, "noting": callbacks[2].callback}
    try:
        model.learn(steps, callback=callbacks, log_interval=3, tb_log_name="run")
    finally:
        model.close()
    return model


def rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of the log, without what tells the time."""
    lines = [json.loads(line) for line in (folder / "progress.json").read_text().splitlines()]
    with (folder / "progress.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(lines), "table and JSON hold the same rows"
    return [{k: v for k, v in line.items() if k not in ("time/fps", "time/time_elapsed")} for line in lines]


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves that TensorBoard shows."""
    accumulator = EventAccumulator(str(folder / "events" / "run_1"), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
        if tag not in ("time/fps", "time/time_elapsed")
    }


@pytest.mark.parametrize("kills", [(60,), (24, 47, 1, 90, 24)])
@pytest.mark.parametrize(
    ("cls", "env_id", "arguments"),
    [
        (A2C, "CartPole-v1", {"n_steps": 8, "n_envs": 2}),
        (DDPG, "Pendulum-v1", REPLAY),
        (TD3, "Pendulum-v1", {**REPLAY, "train_freq": (1, "episode"), "n_envs": 2}),
        (TD3, "MountainCarContinuous-v0", {**REPLAY, "replay_buffer_class": PrioritizedReplayBuffer, "dropout": 0.1}),
    ],
)
def test_a_run_killed_and_resumed_has_weights_log_and_evaluations_of_one_never_killed(
    cls: type[BaseAlgorithm],
    env_id: str,
    arguments: dict[str, Any],
    kills: tuple[int, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # TensorBoard reads event files in the order of their names: the second, then the host. Here a second has many.
    hosts = itertools.count()
    monkeypatch.setattr("socket.gethostname", lambda: f"host{next(hosts):06d}")

    def env() -> gymnasium.Env[Any, Any]:
        return gymnasium.make(env_id, max_episode_steps=37)

    whole = train(cls, env, tmp_path / "whole", **arguments)
    for at in kills:
        with pytest.raises(Killed):
            train(cls, env, tmp_path / "killed", at=at, **arguments)
    killed = train(cls, env, tmp_path / "killed", **arguments)

    assert killed.num_timesteps == whole.num_timesteps == 400
    assert_equal(killed, whole)
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    assert (tmp_path / "killed" / "log.txt").read_text().count("\n\n") == len(rows(tmp_path / "whole"))
    assert events(tmp_path / "killed") == events(tmp_path / "whole")
    ours, theirs = (dict(np.load(tmp_path / name / "evaluations.npz")) for name in ("killed", "whole"))
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[key], theirs[key]) for key in ours)
    best = [cls.load(tmp_path / name / "best_model") for name in ("killed", "whole")]
    assert best[0].num_timesteps == best[1].num_timesteps
    assert all(torch.equal(a, b) for a, b in zip(*(m.policy.state_dict().values() for m in best), strict=True))
    for name, callback in whole.callbacks.items():
        assert killed.callbacks[name].get_state() == callback.get_state(), name
    names = [[path.name for path in sorted((tmp_path / run / "checkpoints").iterdir())] for run in ("killed", "whole")]
    assert names[0] == names[1] and len(names[0]) == 2


def test_without_the_state_of_callbacks_and_log_the_rows_would_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above sees it where a resumed run does not go on with them."""
    train(A2C, "CartPole-v1", tmp_path / "whole", n_steps=8)
    with pytest.raises(Killed):
        train(A2C, "CartPole-v1", tmp_path / "killed", at=60, n_steps=8)
    monkeypatch.setattr("sbac.checkpoint.continue_run", lambda *_: None)
    train(A2C, "CartPole-v1", tmp_path / "killed", n_steps=8)
    assert rows(tmp_path / "killed") != rows(tmp_path / "whole")


def small(folder: Path, **arguments: Any) -> tuple[A2C, CheckpointCallback]:
    return A2C("MlpPolicy", "CartPole-v1", n_steps=4, **SMALL), CheckpointCallback(10, folder, **arguments)


def test_learn_resumes_when_asked_up_to_the_same_total(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, checkpoints = small(tmp_path)
    model.learn(25, callback=checkpoints, resume=True)
    assert "nothing to resume" in capsys.readouterr().out and model.num_timesteps == 25

    model, checkpoints = small(tmp_path)
    model.learn(33, callback=[checkpoints], resume=True)
    assert "resumed from" in capsys.readouterr().out
    assert model.num_timesteps == 33, "13 more, counted from where the run began"
    model, checkpoints = small(tmp_path)
    model.learn(20, callback=checkpoints, resume=True)
    assert model.num_timesteps == 30, "it has come further already"

    model, checkpoints = small(tmp_path)
    model.learn(5, callback=checkpoints)
    assert model.num_timesteps == 5, "nobody asked"
    with pytest.raises(ValueError, match="pass one as callback"):
        model.learn(5, resume=True)
    with pytest.raises(ValueError, match="'auto' or None, not 'yes'"):
        CheckpointCallback(1, tmp_path, resume="yes")


def test_the_newest_checkpoint_that_can_be_read_is_taken(tmp_path: Path) -> None:
    model, checkpoints = small(tmp_path)
    model.learn(40, callback=checkpoints)
    (tmp_path / "rl_model_40_steps.zip").write_bytes(b"PK but cut")
    (tmp_path / "other_90_steps.zip").write_bytes(b"of somebody else")
    model, checkpoints = small(tmp_path, keep_last=2)
    with pytest.warns(UserWarning, match="cannot be resumed from, the one before is tried.*40_steps"):
        model.learn(50, callback=checkpoints, resume=True)
    assert model.num_timesteps == 50
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["other_90_steps.zip", "rl_model_40_steps.zip", "rl_model_50_steps.zip"]

    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    model, checkpoints = small(tmp_path)
    before = model.policy.flat.clone()
    with pytest.warns(UserWarning), pytest.raises(ArchiveError, match="none of the 2 checkpoints"):
        model.learn(50, callback=checkpoints, resume=True)
    assert torch.equal(model.policy.flat, before) and model.num_timesteps == 0


def test_a_run_that_begins_anew_in_the_folder_is_the_one_resumed(tmp_path: Path) -> None:
    model, checkpoints = small(tmp_path)
    model.learn(90, callback=checkpoints)
    model, checkpoints = small(tmp_path, keep_last=1)
    model.learn(20, callback=checkpoints)
    assert len(list(tmp_path.iterdir())) == 8, "what another run wrote is not removed"
    model, checkpoints = small(tmp_path)
    model.learn(30, callback=checkpoints, resume=True)
    assert model.num_timesteps == 30


def test_other_arguments_are_told_and_another_algorithm_is_refused(tmp_path: Path) -> None:
    model, checkpoints = small(tmp_path)
    model.learn(20, callback=checkpoints)
    other = A2C("MlpPolicy", "CartPole-v1", n_steps=4, gamma=0.5, **SMALL)
    with pytest.warns(UserWarning, match="resumed with other arguments than it had: gamma is 0.5, was 0.99"):
        other.learn(30, callback=CheckpointCallback(10, tmp_path, resume="auto"))
    assert other.gamma == 0.5
    with pytest.raises(ValueError, match="full checkpoint of A2C, from which DDPG cannot resume"):
        DDPG("MlpPolicy", "Pendulum-v1", **SMALL).learn(30, callback=CheckpointCallback(10, tmp_path, resume="auto"))


def test_another_environment_is_told_and_other_spaces_are_refused_before_anything_changes(tmp_path: Path) -> None:
    model, checkpoints = small(tmp_path)
    model.learn(20, callback=checkpoints)
    other = A2C("MlpPolicy", "CartPole-v0", n_steps=4, **SMALL)
    with pytest.warns(UserWarning, match="other arguments than it had: env is 'CartPole-v0', was 'CartPole-v1'"):
        other.learn(30, callback=CheckpointCallback(10, tmp_path, resume="auto"))
    other = A2C("MlpPolicy", "Acrobot-v1", n_steps=4, **SMALL)
    before = other.policy.flat.clone()
    with pytest.raises(ValueError, match=r"another observation space than the run of .*30_steps\.zip: the model was"):
        other.learn(40, callback=CheckpointCallback(10, tmp_path, resume="auto"))
    assert torch.equal(other.policy.flat, before) and other.num_timesteps == 0


def test_a_copied_folder_is_resumed_from_the_checkpoint_written_last(tmp_path: Path) -> None:
    model, checkpoints = small(tmp_path)
    model.learn(90, callback=checkpoints)
    model, checkpoints = small(tmp_path)
    model.learn(20, callback=checkpoints)  # begun anew: its 20 steps are younger than those 90
    for age, steps in enumerate((10, 20, 90, 50)):
        os.utime(tmp_path / f"rl_model_{steps}_steps.zip", (1e9 + age, 1e9 + age))
    (tmp_path / "rl_model_95_steps.zip").write_bytes(b"PK but cut")
    os.utime(tmp_path / "rl_model_95_steps.zip", (1e9, 1e9))
    model, checkpoints = small(tmp_path)
    model.learn(30, callback=checkpoints, resume=True)
    assert model.num_timesteps == 30


HOLDER = """
import sys, time
from sbac.callbacks import CheckpointCallback
from sbac import A2C

class Wait(CheckpointCallback):
    def _on_step(self):
        print("holding", flush=True)
        time.sleep(600)

A2C("MlpPolicy", "CartPole-v1").learn(10, callback=Wait(10, sys.argv[1]))
"""


@contextmanager
def another_process_training(folder: Path) -> Iterator[bool]:
    """Yields whether it was let in."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        yield holder.stdout.readline() == "holding\n"
    finally:
        holder.kill()
        holder.communicate()


def test_two_processes_cannot_write_checkpoints_of_one_prefix_into_one_folder(tmp_path: Path) -> None:
    model, _ = small(tmp_path)
    model.learn(20)
    before = model.num_timesteps, model._obs.copy(), model.ep_info_buffer.copy()
    with another_process_training(tmp_path) as is_in:
        assert is_in
        for resume in (False, True):
            with pytest.raises(ValueError, match="another process is writing checkpoints rl_model_"):
                model.learn(20, callback=small(tmp_path)[1], resume=resume)
            assert model.num_timesteps == before[0] and model.ep_info_buffer == before[2]
            assert np.array_equal(model._obs, before[1]), "as if nobody had asked"
        model.learn(20, callback=small(tmp_path, name_prefix="other")[1])
    model.learn(20, callback=[small(tmp_path)[1], CheckpointCallback(5, tmp_path)])
    assert (tmp_path / "rl_model_20_steps.zip").exists(), "the dead hold nothing, nor does a process keep itself out"
    assert not list(tmp_path.glob(".*"))


class Meanwhile(BaseCallback):
    """Does something at step 12, and sees whether another process is let in at step 28."""

    def __init__(self, do: Callable[[], Any], folder: Path) -> None:
        super().__init__()
        self.do, self.folder = do, folder
        self.was_let_in: bool | None = None

    def _on_step(self) -> bool:
        if self.num_timesteps == 12:
            self.do()
        if self.num_timesteps == 28:
            with another_process_training(self.folder) as self.was_let_in:
                pass
        return True


@pytest.mark.parametrize("what", ["a copy", "a training inside", "a removed folder"])
def test_a_folder_is_held_again_with_each_checkpoint(what: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    do: dict[str, Callable[[], Any]] = {
        "a copy": lambda: shutil.copytree(folder, tmp_path / "copy"),  # closes the file, and so gives the lock back
        "a training inside": lambda: small(folder)[0].learn(10, callback=small(folder)[1]),
        "a removed folder": lambda: (shutil.rmtree(folder), folder.mkdir()),
    }
    model, checkpoints = small(folder)
    meanwhile = Meanwhile(do[what], folder)
    model.learn(40, callback=[checkpoints, meanwhile])
    assert meanwhile.was_let_in is False
    assert not (folder / ".rl_model.lock").exists()


def test_a_folder_that_another_process_took_over_gets_no_more_checkpoints(tmp_path: Path) -> None:
    """As may happen between two checkpoints."""

    class TakenOver(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps == 12:
                (tmp_path / ".rl_model.lock").unlink()
                self.other = stack.enter_context(another_process_training(tmp_path))
            return True

    model, checkpoints = small(tmp_path)
    taken = TakenOver()
    with ExitStack() as stack:
        with pytest.warns(UserWarning, match="checkpoint of step 20 was not written: another process writes there"):
            model.learn(20, callback=[checkpoints, taken])
        assert taken.other and (tmp_path / ".rl_model.lock").exists(), "it is the other's"
    assert model.num_timesteps == 20


def test_a_folder_is_let_go_when_a_callback_cannot_begin(tmp_path: Path) -> None:
    class Bad(BaseCallback):
        def _init_callback(self) -> None:
            raise OSError("no such device")

    model, checkpoints = small(tmp_path)
    with pytest.raises(OSError, match="no such device"):
        model.learn(20, callback=[checkpoints, Bad()])
    with another_process_training(tmp_path) as is_in:
        assert is_in
    with pytest.raises(ValueError, match="name_prefix begins the names of files in save_path, so it cannot be 'a/b'"):
        CheckpointCallback(10, tmp_path, "a/b")


def test_where_nothing_can_be_locked_nobody_is_kept_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".rl_model.lock").mkdir()  # stands for a file that cannot be opened
    model, checkpoints = small(tmp_path)
    assert model.learn(20, callback=checkpoints).num_timesteps == 20
    (tmp_path / ".rl_model.lock").rmdir()

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    model, checkpoints = small(tmp_path)
    assert model.learn(20, callback=checkpoints).num_timesteps == 20


@pytest.mark.parametrize("written", [-1, 2**63, 1.5, True, "12", None, [3]])
def test_a_checkpoint_that_says_nonsense_of_its_time_comes_before_the_others(written: Any, tmp_path: Path) -> None:
    model, checkpoints = small(tmp_path)
    model.learn(30, callback=checkpoints)
    path = tmp_path / "rl_model_10_steps.zip"
    file = read_archive(path)
    assert file.state is not None
    file.state["run"]["written"] = written
    write_archive(path, file)
    assert [one.name for one in checkpoints.checkpoints()] == [f"rl_model_{n}_steps.zip" for n in (10, 20, 30)]


def test_a_checkpoint_whose_spaces_are_none_is_passed_over(tmp_path: Path) -> None:
    model, checkpoints = small(tmp_path)
    model.learn(20, callback=checkpoints)
    file = read_archive(tmp_path / "rl_model_20_steps.zip")
    file.config["action_space"] = 5
    write_archive(tmp_path / "rl_model_20_steps.zip", file)
    model, checkpoints = small(tmp_path)
    with pytest.warns(
        UserWarning, match=r"the one before is tried: .*20_steps\.zip: config.json does not describe the"
    ):
        model.learn(20, callback=checkpoints, resume=True)
    assert model.num_timesteps == 20


def test_own_objects_need_no_leave_to_be_resumed_since_the_script_has_them(tmp_path: Path) -> None:
    class Own(torch.nn.Tanh):
        pass

    def make() -> A2C:
        return A2C("MlpPolicy", "CartPole-v1", seed=0, policy_kwargs={"activation_fn": Own})

    make().learn(20, callback=CheckpointCallback(10, tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = make().learn(30, callback=CheckpointCallback(10, tmp_path), resume=True)
    assert model.num_timesteps == 30


def test_a_checkpoint_that_cannot_be_written_is_told_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, checkpoints = small(tmp_path, keep_last=1)
    model.learn(10, callback=checkpoints)
    content = (tmp_path / "rl_model_10_steps.zip").read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.warns(UserWarning, match="the checkpoint of step 20 was not written.*No space left"):
        model.learn(15, callback=checkpoints, reset_num_timesteps=False)
    assert model.num_timesteps == 25
    assert [path.name for path in tmp_path.iterdir()] == ["rl_model_10_steps.zip"]
    assert (tmp_path / "rl_model_10_steps.zip").read_bytes() == content


def test_a_callback_whose_state_is_no_data_is_named(tmp_path: Path) -> None:
    class Strange(BaseCallback):
        def get_state(self) -> dict[str, Any]:
            return {"own": object()}

    model, checkpoints = small(tmp_path)
    with pytest.raises(ArchiveError, match=r"must be plain data.*callbacks\[1\]"):
        model.learn(10, callback=[Strange(), checkpoints])


@pytest.mark.parametrize(("task", "steps"), [("a2c", 4_000), ("a3c", 2_000), ("ddpg", 900), ("td3", 700)])
def test_a_process_killed_at_random_moments_ends_as_one_never_killed(task: str, steps: int, tmp_path: Path) -> None:
    """A short version of what `tests.kill` does by hand."""
    assert kill_test(task, steps, n_kills=3, seed=0, folder=tmp_path) == []


class FreezeAt(BaseCallback):
    """Freezes the first layer of the (first) actor at a step, once."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def _on_step(self) -> bool:
        if self.num_timesteps == self.at:
            policy = self.model.policy
            (policy.policy_net if hasattr(policy, "policy_net") else policy.actor.mu)[0].requires_grad_(False)
        return True


@pytest.mark.parametrize(
    ("cls", "env_id", "arguments"), [(A2C, "CartPole-v1", {"n_steps": 8}), (TD3, "Pendulum-v1", REPLAY)]
)
def test_what_a_callback_froze_stays_frozen_in_a_run_that_resumes(
    cls: type[BaseAlgorithm], env_id: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    def run(folder: str, steps: int) -> BaseAlgorithm:
        model: BaseAlgorithm = cls("MlpPolicy", env_id, **SMALL, **arguments)
        checkpoints = CheckpointCallback(60, tmp_path / folder, resume="auto")
        return model.learn(steps, callback=[FreezeAt(50), checkpoints])

    run("stopped", 70)
    whole, resumed = run("whole", 120), run("stopped", 120)
    assert resumed.num_timesteps == 120
    assert_equal(whole, resumed)

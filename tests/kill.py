"""Kills a training process at random moments, resumes it each time, and compares the end with a run never killed.

By hand: ``python -m tests.kill td3 --kills 20 --seed 0``.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sbac import A2C, A3C, DDPG, TD3, segments
from sbac.archive import read_archive
from sbac.base import BaseAlgorithm
from sbac.callbacks import CheckpointCallback, EvalCallback
from sbac.logger import configure

OFF_POLICY: dict[str, Any] = {"learning_starts": 100, "batch_size": 32, "buffer_size": 5_000}
TASKS: dict[str, tuple[type[BaseAlgorithm], str, dict[str, Any]]] = {
    "a2c": (A2C, "CartPole-v1", {"n_envs": 4}),
    "a3c": (A3C, "CartPole-v1", {"n_workers": 2, "deterministic": True}),
    "ddpg": (DDPG, "Pendulum-v1", OFF_POLICY),
    "td3": (TD3, "Hopper-v5", {**OFF_POLICY, "normalize_obs": True, "normalize_reward": True}),
}


def train(task: str, steps: int, folder: Path) -> None:
    """What the process does: begin the run, or go on with it."""
    cls, env_id, arguments = TASKS[task]
    segments.SMALL, segments.LARGE = 2**14, 2**16  # that buffers as small as these are written in segments
    torch.set_num_threads(1)
    with cls("MlpPolicy", env_id, seed=0, policy_kwargs={"net_arch": [32, 32]}, **arguments) as model:
        model.set_logger(configure(folder, ("csv",)))
        frequency = max(steps // model.n_envs // 40, 1)
        checkpoints = CheckpointCallback(frequency, folder / "checkpoints", resume="auto", keep_last=2)
        evaluation = EvalCallback(env_id, n_eval_episodes=2, eval_freq=3 * frequency, log_path=folder, verbose=0)
        print("ready", flush=True)
        model.learn(steps, callback=[checkpoints, evaluation])
        model.save(folder / "end", full=True, exclude=["run"])


def start(task: str, steps: int, folder: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "tests.kill", task, "--steps", str(steps), "--train", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"the training ended with {process.returncode}:\n{errors}")


def checkpoints_in(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("checkpoints/*.zip")}


def kill_test(task: str, steps: int, n_kills: int, seed: int, folder: Path) -> list[str]:
    """Run the test.

    Args:
        task: One of `TASKS`.
        steps: Transitions of the run.
        n_kills: How often the second run is killed, by SIGKILL.
        seed: Of the moments, which may lie before the first checkpoint, between two, or while one is written.
        folder: Where both runs go.

    Returns:
        What differs at the end: arrays of the full checkpoint, or of the evaluations. Nothing, if all is well.
    """
    process = start(task, steps, folder / "whole")
    assert process.stdout is not None
    process.stdout.readline()
    finish(process)
    rng = np.random.default_rng(seed)
    n_killed = 0
    for _ in range(n_kills):
        process = start(task, steps, folder / "killed")
        assert process.stdout is not None
        process.stdout.readline()
        # Workers may take seconds to start, so that the moments are counted from the checkpoints that are written.
        n_new, pause = int(rng.integers(0, 3)), rng.uniform(0, 0.3)
        before, seen = checkpoints_in(folder / "killed"), set()
        while process.poll() is None and len(seen) < n_new:
            time.sleep(0.005)
            seen |= checkpoints_in(folder / "killed") - before
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        n_killed += process.returncode == -signal.SIGKILL
        kept = sorted(checkpoints_in(folder / "killed"))
        n_segments = len(list((folder / "killed").glob("checkpoints/*_replay/*.zip")))
        moment = f"{pause:.2f} s after {n_new} new checkpoints"
        print(f"{task}: killed {moment}, checkpoints {kept}, {n_segments} segments", flush=True)
    finish(start(task, steps, folder / "killed"))
    print(f"{task}: {n_killed} of {n_kills} came before the end", flush=True)
    if n_killed == 0:
        return ["the run was over before it was killed once"]

    whole, killed = (read_archive(folder / name / "end.zip") for name in ("whole", "killed"))
    arrays, others = whole.arrays, killed.arrays
    different = [
        name for name in arrays.keys() | others.keys() if not np.array_equal(arrays.get(name), others.get(name))
    ]
    different += [name for name in ("counters", "class") if whole.meta[name] != killed.meta[name]]
    ours, theirs = (dict(np.load(folder / name / "evaluations.npz")) for name in ("whole", "killed"))
    different += [f"evaluations/{key}" for key in ours if not np.array_equal(ours[key], theirs[key])]
    print(f"{task}: {len(arrays)} arrays and the evaluations compared, {len(different)} differ", flush=True)
    return sorted(different)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train is not None:
        train(options.task, options.steps, options.train)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        different = kill_test(options.task, options.steps, options.kills, options.seed, Path(folder))
    print(*different, sep="\n")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())

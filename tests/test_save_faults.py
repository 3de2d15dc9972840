"""Saving that is cut off or denied, and many runs in one process: nothing is lost, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from sbac import TD3

ROOT = Path(__file__).parent.parent
SMALL = {"policy_kwargs": {"net_arch": [64, 64]}, "learning_starts": 10, "batch_size": 4, "buffer_size": 2_000}


def run(program: str, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_process_killed_as_it_saves_leaves_a_whole_file(tmp_path: Path) -> None:
    models = [TD3("MlpPolicy", "Pendulum-v1", seed=seed, **SMALL).learn(20) for seed in (0, 1)]
    for k, model in enumerate(models):
        model.save(tmp_path / f"model{k}", full=True)
    target = tmp_path / "run" / "model.zip"
    program = """
import sys
from sbac import TD3
models = [TD3.load(f"{sys.argv[1]}/model{k}") for k in (0, 1)]
print("ready", flush=True)
while True:
    for model in models:
        model.save(f"{sys.argv[1]}/run/model", full=True)
"""
    moments = np.random.default_rng(0).uniform(0, 0.4, 40)
    seen, n_cut = set(), 0
    models[0].save(target, full=True)
    # Six kills, and on a slow machine, where each falls into a first save, as many more as it takes.
    for k, moment in enumerate(moments):
        if k >= 6 and seen == {0, 1} and n_cut:
            break
        process = run(program, str(tmp_path))
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        found = TD3.load(target)
        equal = [torch.equal(found.policy.actor.flat, model.policy.actor.flat) for model in models]
        assert sum(equal) == 1
        assert found.replay_buffer.size() == 20
        seen.add(equal.index(True))
        n_cut = max(n_cut, len(list(target.parent.glob("*.tmp")) + list(target.parent.glob(".*.tmp"))))
    assert seen == {0, 1}, "both came to be written"
    assert n_cut >= 1, "no save was cut off in its midst"


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_folder_that_may_not_be_written_keeps_its_file() -> None:
    program = """
import os, sys
from sbac import TD3
model = TD3("MlpPolicy", "Pendulum-v1", seed=1)
if os.geteuid() == 0:
    os.seteuid(65534)  # root may write everywhere
try:
    model.save(sys.argv[1])
except OSError as error:
    print(type(error).__name__, error)
"""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.zip"
        TD3("MlpPolicy", "Pendulum-v1", seed=0).save(path)
        before = path.read_bytes()
        Path(folder).chmod(0o555)
        try:
            out, errors = run(program, str(path)).communicate()
        finally:
            Path(folder).chmod(0o755)
        assert out.startswith("PermissionError"), errors
        assert "any earlier one is unchanged" in out
        assert str(path) in out
        assert path.read_bytes() == before
        assert os.listdir(folder) == ["model.zip"]


@pytest.mark.slow
def test_fifty_runs_in_one_process_leave_memory_and_open_files_as_they_were(tmp_path: Path) -> None:
    """Two of the runs are A3C's, which has workers. From the tenth on, up to 16 MiB of memory may be added."""
    program = """
import gc, os, sys, warnings
import sbac
from sbac.callbacks import CheckpointCallback, EvalCallback
from sbac.logger import configure

def look():
    gc.collect()
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir("/proc/self/fd"))

small = {"policy_kwargs": {"net_arch": [16]}}
off = {**small, "learning_starts": 20, "batch_size": 8, "buffer_size": 1_000}
kinds = [("A2C", "CartPole-v1", small), ("DDPG", "Pendulum-v1", off), ("TD3", "Pendulum-v1", off)]
for k in range(50):
    name, env, arguments = ("A3C", "CartPole-v1", {**small, "n_workers": 1}) if k in (5, 45) else kinds[k % 3]
    folder = f"{sys.argv[1]}/{k}"
    with getattr(sbac, name)("MlpPolicy", env, seed=k, **arguments) as model:
        model.set_logger(configure(folder, ("csv", "json", "tensorboard")))
        checkpoints = CheckpointCallback(100, f"{folder}/checkpoints", resume="auto", keep_last=1)
        evaluation = EvalCallback(env, n_eval_episodes=1, eval_freq=100, log_path=folder, verbose=0)
        model.learn(200, callback=[checkpoints, evaluation])
        model.save(f"{folder}/model", full=True)
        getattr(sbac, name).load(f"{folder}/model").close()
    del model, checkpoints, evaluation
    print(*look(), flush=True)
"""
    out, errors = run(program, str(tmp_path)).communicate()
    rows = np.array([line.split() for line in out.splitlines()], float)
    assert rows.shape == (50, 2), errors
    memory, files = rows[9:].T
    assert memory[-10:].max() - memory[0] < 16, memory
    assert files.max() == files.min(), files

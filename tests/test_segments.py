"""Checkpoints of a large replay buffer write what is new, and give back all of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

import sbac
from sbac import DDPG, TD3
from sbac import segments as segments_module
from sbac.adapters import Step
from sbac.archive import Archive, ArchiveError, inspect_archive, read_archive, write_archive
from sbac.base import BaseAlgorithm
from sbac.buffers import ReplayBuffer
from sbac.callbacks import CheckpointCallback
from sbac.hindsight import HerReplayBuffer
from sbac.prioritized import PrioritizedReplayBuffer
from sbac.segments import Segment, Segments, read_segments
from tests.environments import BitFlip

ARGUMENTS: dict[str, Any] = {"learning_starts": 10, "batch_size": 4, "policy_kwargs": {"net_arch": [8]}, "seed": 0}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of some rows, not of megabytes."""
    monkeypatch.setattr(segments_module, "SMALL", 200)
    monkeypatch.setattr(segments_module, "LARGE", 600)
    monkeypatch.setattr("os.fsync", lambda _: None)  # hundreds of files, none of which must outlive the machine


def short_pendulum() -> gymnasium.Env[Any, Any]:
    return gymnasium.make("Pendulum-v1", max_episode_steps=17)


class Wide(gymnasium.Env[np.ndarray, np.ndarray]):
    """Noise in 4,000 bytes, in episodes of 50 steps."""

    observation_space = gymnasium.spaces.Box(-1, 1, (1_000,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(**kwargs)
        self.t = 0
        return self._obs(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.t += 1
        return self._obs(), 0.0, False, self.t == 50, {}

    def _obs(self) -> np.ndarray:
        return self.np_random.uniform(-1, 1, 1_000).astype(np.float32)


def make(env: Any = "Pendulum-v1", cls: type[BaseAlgorithm] = DDPG, **arguments: Any) -> Any:
    policy = arguments.pop("policy", "MlpPolicy")
    return cls(policy, env, **{**ARGUMENTS, "buffer_size": 90, **arguments})


def files(folder: Path) -> dict[str, int]:
    """The segments in a folder of checkpoints, and when they were written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("rl_model_replay/*")}


def checkpoint_of(folder: Path, step: int) -> Path:
    return folder / f"rl_model_{step}_steps.zip"


def needed(folder: Path, *steps: int) -> set[str]:
    """The segments that the checkpoints of these steps refer to."""
    states = [read_archive(checkpoint_of(folder, step)).state or {} for step in steps]
    return {name for state in states for name in state["replay_segments"]["segments"]}


def assert_same_buffers(one: ReplayBuffer, other: ReplayBuffer) -> None:
    """The tables of successors may be in another order."""
    ours, theirs = one.get_state(), other.get_state()
    assert ours.keys() == theirs.keys()
    orders = [np.argsort(state["after_index"]) for state in (ours, theirs)]
    for name in ours:
        a, b = ours[name], theirs[name]
        if name.split("/")[0] in ("after", "after_index"):
            a, b = a[orders[0]], b[orders[1]]
        assert a.dtype == b.dtype and np.array_equal(a, b), name


def assert_same(one: Any, other: Any) -> None:
    assert one.num_timesteps == other.num_timesteps
    assert_same_buffers(one.replay_buffer, other.replay_buffer)
    ours, theirs = one.policy.state_dict(), other.policy.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert one.generator.bit_generator.state == other.generator.bit_generator.state


# What is resumed is what was.


@pytest.mark.parametrize("at", [30, 90, 91, 260])
@pytest.mark.parametrize(
    ("env", "arguments"),
    [
        (short_pendulum, {}),
        (short_pendulum, {"cls": TD3, "n_envs": 3, "normalize_obs": True}),
        (
            short_pendulum,
            {
                "replay_buffer_class": PrioritizedReplayBuffer,
                "replay_buffer_kwargs": {"beta": 0.5},  # which else depends on how long the run is meant to be
                "n_steps": 3,
                "n_envs": 2,
            },
        ),
        (
            lambda: BitFlip(5),
            {"policy": "MultiInputPolicy", "replay_buffer_class": HerReplayBuffer, "n_envs": 2},
        ),
    ],
    ids=["one", "three", "prioritized", "hindsight"],
)
def test_a_resumed_run_equals_one_never_stopped_wherever_the_ring_is(
    env: Any, arguments: dict[str, Any], at: int, tmp_path: Path
) -> None:
    model = make(env, **arguments)
    model.learn(at, callback=CheckpointCallback(7, tmp_path, keep_last=2))
    assert files(tmp_path)
    resumed = make(env, **arguments)
    resumed.learn(at + 40, callback=CheckpointCallback(7, tmp_path, keep_last=2), resume=True)
    whole = make(env, **arguments).learn(at + 40)
    assert_same(resumed, whole)
    assert resumed.replay_buffer.n_added == whole.replay_buffer.n_added
    again = make(env, **arguments)
    again.learn(at + 40, callback=CheckpointCallback(7, tmp_path), resume=True)
    assert_same(again, whole)


@pytest.mark.parametrize("capacity", [20, 33])
def test_every_moment_of_a_ring_is_read_back(capacity: int, tmp_path: Path) -> None:
    """Episodes end, the environments are reset from outside, and between two checkpoints there are 0 to 50 rows."""
    space = gymnasium.spaces.Box(-9e9, 9e9, (3,), np.float64)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)
    buffer = ReplayBuffer(2 * capacity, space, action_space, n_envs=2)
    segments = Segments(tmp_path / "segments")
    generator = np.random.default_rng(capacity)
    obs = generator.random((2, 3))
    for _ in range(60):
        for _ in range(generator.integers(0, 50) if generator.random() < 0.2 else generator.integers(0, 4)):
            successor = generator.random((2, 3))
            ended = generator.random((2, 2)) < 0.2
            step = Step(successor, generator.random(2), *ended, successor, generator.random(2) < 0.9, {})
            buffer.add(obs, generator.random((2, 2)), step)
            obs = successor if generator.random() < 0.9 else generator.random((2, 3))
        taken = segments.take(buffer)
        if taken is None:
            assert buffer._rows_held() <= 7
            continue
        data, rest = taken
        read = ReplayBuffer(2 * capacity, space, action_space, n_envs=2)
        read.set_state({**rest, **read_segments(tmp_path / "segments", data)})
        assert_same_buffers(read, buffer)
        if generator.random() < 0.2:
            # As where a killed process goes on from here.
            segments, buffer = Segments(tmp_path / "segments"), read
            segments.adopt(data, buffer)
        if generator.random() < 0.5:
            segments.prune(data["segments"])
            assert {path.name for path in (tmp_path / "segments").iterdir()} == set(data["segments"])


def test_a_moved_run_resumes_and_its_checkpoints_load(tmp_path: Path) -> None:
    make().learn(60, callback=CheckpointCallback(30, tmp_path / "here"))
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    shutil.rmtree(tmp_path / "here")
    model = make()
    model.learn(100, callback=CheckpointCallback(30, tmp_path / "there"), resume=True)
    whole = make().learn(100)
    assert_same(model, whole)
    loaded = sbac.load(checkpoint_of(tmp_path / "there", 60), env="Pendulum-v1")
    loaded.learn(40, reset_num_timesteps=False)
    assert_same(loaded, whole)


def test_a_file_that_is_saved_holds_everything(tmp_path: Path) -> None:
    model = make()
    model.learn(60, callback=CheckpointCallback(30, tmp_path / "run"))
    model.save(tmp_path / "model", full=True)
    shutil.rmtree(tmp_path / "run")
    file = read_archive(tmp_path / "model")
    assert "replay_segments" not in (file.state or {}) and len(file.arrays["state/replay_buffer/obs"]) == 60
    assert_same_buffers(DDPG.load(tmp_path / "model").replay_buffer, model.replay_buffer)


def test_a_buffer_that_was_replaced_is_written_whole(tmp_path: Path) -> None:
    model, other = make(), make(seed=1)
    model.learn(50)
    other.learn(70)
    segments = Segments(tmp_path)
    assert segments.take(model.replay_buffer) is not None
    model.replay_buffer.set_state(other.replay_buffer.get_state())
    taken = segments.take(model.replay_buffer)
    assert taken is not None
    data, rest = taken
    model.replay_buffer.set_state({**rest, **read_segments(tmp_path, data)})
    assert_same_buffers(model.replay_buffer, other.replay_buffer)


def test_another_buffer_size_or_number_of_environments_needs_no_segments_of_before(tmp_path: Path) -> None:
    make().learn(120, callback=CheckpointCallback(60, tmp_path))
    larger = make(buffer_size=200)
    with pytest.warns(UserWarning, match="buffer_size is 200, was 90"):
        larger.learn(130, callback=CheckpointCallback(10, tmp_path), resume=True)
    assert larger.replay_buffer.size() == 100
    assert not needed(tmp_path, 120) & needed(tmp_path, 130), "its rows lie elsewhere"
    assert_same_buffers(DDPG.load(checkpoint_of(tmp_path, 130)).replay_buffer, larger.replay_buffer)

    two = make(n_envs=2)
    with pytest.warns(UserWarning, match="other arguments|the new one is empty"):
        two.learn(150, callback=CheckpointCallback(10, tmp_path), resume=True)
    assert two.replay_buffer.size() == 20
    assert_same_buffers(DDPG.load(checkpoint_of(tmp_path, 150)).replay_buffer, two.replay_buffer)


# What is written is what is new.


def test_bytes_written_follow_what_is_new_and_not_the_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments_module, "SMALL", 2**16)
    monkeypatch.setattr(segments_module, "LARGE", 2**20)
    model = make(Wide, buffer_size=1_500, learning_starts=1_400, train_freq=100)
    row = 4_000 + 4 + 4 + 1  # observation, action, reward, flags
    written: list[int] = []
    seen: set[tuple[str, int, int]] = set()

    class Count(CheckpointCallback):
        def _write(self) -> None:
            super()._write()
            everything = list((tmp_path / "run").rglob("*.zip"))
            now = {(path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in everything}
            written.append(sum(size for *_, size in now - seen))
            seen.update(now)

    for new, steps in ((20, 2_000), (200, 3_000)):
        written.clear()
        model.learn(steps, callback=Count(new, tmp_path / "run", keep_last=2, resume="auto"))
        model.save(tmp_path / "weights")
        weights = (tmp_path / "weights.zip").stat().st_size
        # The last segment is made anew while it is small. Episodes of 50 steps have one successor more.
        least, most = new * row, (new + new // 50 + 2) * row + 2**16 + weights + 2**15
        assert len(written) == (100 if new == 20 else 5)
        assert least < min(written) and max(written) < most < 1_500 * row / 3
    model.save(tmp_path / "all", full=True)
    assert (tmp_path / "all.zip").stat().st_size > 1_500 * row


def test_hindsight_writes_as_little(tmp_path: Path) -> None:
    """Whatever it knows of each row is in the segments."""
    arguments = {"policy": "MultiInputPolicy", "replay_buffer_class": HerReplayBuffer}
    model = make(lambda: BitFlip(5), buffer_size=1_000, **arguments)
    model.learn(600, callback=CheckpointCallback(300, tmp_path))
    arrays = [read_archive(checkpoint_of(tmp_path, step)).arrays for step in (300, 600)]
    sizes = [sum(a.nbytes for name, a in one.items() if "replay_buffer" in name) for one in arrays]
    assert sizes[0] == sizes[1] < 200


def test_what_changes_everywhere_stays_in_the_checkpoint(tmp_path: Path) -> None:
    model = make(replay_buffer_class=PrioritizedReplayBuffer)
    model.learn(60, callback=CheckpointCallback(60, tmp_path))
    arrays = read_archive(checkpoint_of(tmp_path, 60)).arrays
    assert len(arrays["state/replay_buffer/priority"]) == 60
    assert not any(name.startswith("state/replay_buffer/obs") for name in arrays)


def test_a_run_goes_on_with_the_segments_that_are_there(tmp_path: Path) -> None:
    make(buffer_size=2_000).learn(500, callback=CheckpointCallback(250, tmp_path))
    before = files(tmp_path)
    model = make(buffer_size=2_000)
    model.learn(750, callback=CheckpointCallback(250, tmp_path), resume=True)
    kept = needed(tmp_path, 750) & before.keys()
    assert len(kept) >= len(needed(tmp_path, 500)) - 1
    now = files(tmp_path)
    assert all(now[name] == before[name] for name in kept), "they are not written anew"


def test_a_small_buffer_stays_in_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments_module, "SMALL", 10_000)
    make().learn(60, callback=CheckpointCallback(30, tmp_path))
    assert not (tmp_path / "rl_model_replay").exists()
    assert len(read_archive(checkpoint_of(tmp_path, 60)).arrays["state/replay_buffer/obs"]) == 60


# What is removed.


def test_removed_are_the_segments_that_no_checkpoint_needs(tmp_path: Path) -> None:
    model = make(buffer_size=300)
    seen: set[str] = set()

    class Look(CheckpointCallback):
        def _write(self) -> None:
            super()._write()
            steps = [int(path.name.split("_")[2]) for path in self.checkpoints()]
            assert len(steps) <= 2
            assert files(tmp_path).keys() == needed(tmp_path, *steps)
            seen.update(files(tmp_path))

    model.learn(1_000, callback=Look(50, tmp_path, keep_last=2))
    assert len(seen) > 2 * len(files(tmp_path)), "others were there and are gone"
    for step in (950, 1_000):
        assert DDPG.load(checkpoint_of(tmp_path, step)).num_timesteps == step


def test_segments_of_an_earlier_run_and_of_unreadable_checkpoints_stay(tmp_path: Path) -> None:
    make().learn(60, callback=CheckpointCallback(30, tmp_path))
    theirs, theirs_of_60 = needed(tmp_path, 30), needed(tmp_path, 60)
    checkpoint_of(tmp_path, 60).write_bytes(b"cut")
    orphan, half = tmp_path / "rl_model_replay" / Segment(0, 9, 32 * "a").name, tmp_path / "rl_model_replay" / ".a.tmp"
    for path in (orphan, half):
        path.write_bytes(b"left by a process that was killed")
        late = time.time() + 60
        os.utime(path, (late, late))
    make(seed=1).learn(40, callback=CheckpointCallback(20, tmp_path, keep_last=1))
    assert files(tmp_path).keys() == theirs | theirs_of_60 | needed(tmp_path, 40)
    assert DDPG.load(checkpoint_of(tmp_path, 30)).num_timesteps == 30


def test_what_a_killed_process_left_half_written_is_removed_in_time(tmp_path: Path) -> None:
    left, fresh, own = (tmp_path / name for name in (f".{16 * 'a'}.tmp", f".{16 * 'b'}.tmp", ".own.tmp"))
    for path in (left, fresh, own):
        path.write_bytes(b"half")
    for path in (left, own):
        os.utime(path, (time.time() - 7_200,) * 2)
    make().learn(30, callback=CheckpointCallback(30, tmp_path))
    assert not left.exists()
    assert fresh.exists() and own.exists()


def test_older_checkpoints_that_cannot_be_removed_are_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    model = make()
    monkeypatch.setattr(Segments, "prune", refuse)
    with pytest.warns(UserWarning, match="older checkpoints could not be removed.*Permission denied"):
        model.learn(60, callback=CheckpointCallback(30, tmp_path, keep_last=1))
    assert model.num_timesteps == 60


# What is missing or damaged.


def only_of(folder: Path, newer: int, older: int) -> Path:
    """A segment that only the newer of two checkpoints needs."""
    return folder / "rl_model_replay" / min(needed(folder, newer) - needed(folder, older))


@pytest.mark.parametrize("what", ["missing", "cut", "flipped", "another", "empty"])
def test_a_checkpoint_without_its_segments_is_not_resumed_from(what: str, tmp_path: Path) -> None:
    make().learn(60, callback=CheckpointCallback(30, tmp_path))
    path = only_of(tmp_path, 60, 30)
    content = path.read_bytes()
    if what == "missing":
        path.unlink()
    else:
        other = next(one for one in path.parent.iterdir() if one != path)
        flipped = bytearray(content)
        flipped[content.index(b"\x93NUMPY") + 200] ^= 1
        contents = {"cut": content[:-30], "flipped": flipped, "another": other.read_bytes(), "empty": b""}
        path.write_bytes(contents[what])
    with pytest.raises(ArchiveError, match=f"its replay buffer cannot be restored: .*{path.name}"):
        DDPG.load(checkpoint_of(tmp_path, 60))
    model = make()
    with pytest.warns(UserWarning, match="the one before is tried"):
        model.learn(60, callback=CheckpointCallback(30, tmp_path), resume=True)
    assert_same_buffers(model.replay_buffer, make().learn(60).replay_buffer)
    assert path.read_bytes() == content, "it was written again, although a file of its name was there"
    assert DDPG.load(checkpoint_of(tmp_path, 60)).num_timesteps == 60


def test_a_model_is_as_it_was_where_no_checkpoint_has_its_segments(tmp_path: Path) -> None:
    make().learn(60, callback=CheckpointCallback(30, tmp_path))
    shutil.rmtree(tmp_path / "rl_model_replay")
    model = make()
    before = model.actor.flat.clone()
    with (
        pytest.warns(UserWarning, match="is missing, a segment of the replay buffer: the folder rl_model_replay"),
        pytest.raises(ArchiveError, match="none of the 2 checkpoints"),
    ):
        model.learn(60, callback=CheckpointCallback(30, tmp_path), resume=True)
    assert torch.equal(model.actor.flat, before) and model.replay_buffer.size() == model.num_timesteps == 0


def test_a_checkpoint_in_an_open_file_says_what_it_lacks(tmp_path: Path) -> None:
    make().learn(30, callback=CheckpointCallback(30, tmp_path))
    with checkpoint_of(tmp_path, 30).open("rb") as file, pytest.raises(ArchiveError, match="loaded by its path only"):
        DDPG.load(file)


def written(folder: Path) -> tuple[Segments, dict[str, Any]]:
    segments = Segments(folder)
    taken = segments.take(make().learn(80).replay_buffer)
    assert taken is not None and len(taken[0]["segments"]) > 2
    return segments, taken[0]


@pytest.mark.parametrize(
    "name",
    [
        "../x.zip",
        "/etc/passwd",
        "x.zip",
        f"0_3_{32 * 'a'}.zip/..",
        f"-1_3_{32 * 'a'}.zip",
        f"0_{'9' * 19}_{32 * 'a'}.zip",
    ],
)
def test_names_that_are_none_of_segments_are_refused(name: str, tmp_path: Path) -> None:
    _, data = written(tmp_path)
    with pytest.raises(ArchiveError, match="is no name of a segment"):
        read_segments(tmp_path, {**data, "segments": [*data["segments"], name]})


def test_segments_that_are_not_all_rows_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    _, data = written(tmp_path)
    names = data["segments"]
    huge = {"n_rows": 10**15, "n_added": 10**15}
    lies: list[dict[str, Any]] = [
        {"segments": names[:-1]},
        {"segments": names[1:]},
        {"segments": [names[0], *names[2:]]},
        {"segments": [*names, names[-1]]},
        {"segments": names[::-1]},
        {"segments": []},
        {"n_added": 81},
        {"n_added": 79},
        huge,
        {**huge, "segments": [*names, Segment(80, 10**15, 32 * "a").name]},
    ]
    tracemalloc.start()
    try:
        for lie in lies:
            with pytest.raises(ArchiveError):
                read_segments(tmp_path, {**data, **lie})
        # A file that lies about its rows, with an honest digest.
        arrays = read_archive(tmp_path / names[-1]).arrays
        last = Segment.named(names[-1])
        liar = Segment(last.start, 10**15, segments_module._digest(arrays))
        write_archive(tmp_path / liar.name, Archive(arrays=arrays))
        with pytest.raises(ArchiveError, match=r"no segment of this buffer: rows/\w+ has shape"):
            read_segments(tmp_path, {**data, **huge, "segments": [*names[:-1], liar.name]})
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "data",
    [{"n_rows": "many"}, {"segments": None}, {"segments": [1]}, {"n_added": None}, {"folder": 3}, None],
)
def test_references_that_make_no_sense_are_an_archive_error(data: Any, tmp_path: Path) -> None:
    make().learn(30, callback=CheckpointCallback(30, tmp_path))
    file = read_archive(checkpoint_of(tmp_path, 30))
    assert file.state is not None
    file.state["replay_segments"] = data if data is None else {**file.state["replay_segments"], **data}
    write_archive(tmp_path / "rl_model_31_steps.zip", file)
    with pytest.raises(ArchiveError, match="its replay buffer cannot be restored"):
        DDPG.load(tmp_path / "rl_model_31_steps.zip")


def test_a_segment_that_cannot_be_written_costs_a_warning_and_the_next_checkpoint_has_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    calls = iter(range(1_000))

    def fail_sometimes(path: Path, archive: Archive) -> Any:
        if next(calls) in (3, 9):
            raise OSError(28, "No space left on device")
        return write_archive(path, archive)

    monkeypatch.setattr(segments_module, "write_archive", fail_sometimes)
    with pytest.warns(UserWarning, match="was not written.*No space left"):
        model.learn(90, callback=CheckpointCallback(15, tmp_path, keep_last=2))
    assert len(list(tmp_path.glob("*.zip"))) == 2
    assert_same_buffers(DDPG.load(checkpoint_of(tmp_path, 90)).replay_buffer, model.replay_buffer)


def test_a_segment_is_a_model_file_that_can_be_inspected(tmp_path: Path) -> None:
    _, data = written(tmp_path)
    content = inspect_archive(tmp_path / data["segments"][0])
    assert content["meta"]["class"] == "Segment" and not content["objects"]


def test_whenever_the_disk_is_full_the_last_checkpoint_loads(tmp_path: Path) -> None:
    """After a random number of bytes of a file: in segments as in checkpoints."""
    program = """
import os, resource, sys, warnings
from pathlib import Path
import numpy as np
from sbac import DDPG, segments
from sbac.callbacks import CheckpointCallback

folder = Path(sys.argv[1])
os.fsync = lambda _: None  # none of these files must outlive the machine
segments.SMALL, segments.LARGE = 2**10, 2**13
random = np.random.default_rng(0)

def make():
    how = {"buffer_size": 400, "learning_starts": 10, "train_freq": 10, "batch_size": 4, "gradient_steps": 1}
    return DDPG("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": [4]}, seed=0, **how)

model, checkpoints = make(), CheckpointCallback(20, folder, keep_last=2)
model.learn(100, callback=checkpoints)
last, n_failed, in_segments = 100, 0, 0
for _ in range(15):
    largest = max(path.stat().st_size for path in folder.glob("*.zip"))
    limit = int(random.integers(0, largest * 1.2))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.learn(20, callback=checkpoints, reset_num_timesteps=False)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    told = [str(warning.message) for warning in caught]
    assert len(told) <= 1 and all("was not written" in text for text in told), told
    n_failed += len(told)
    in_segments += any("rl_model_replay" in text for text in told)
    last = last if told else model.num_timesteps
    resumed = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CheckpointCallback(20, folder).restore(resumed)
    assert resumed.num_timesteps == last, (resumed.num_timesteps, last)
    assert not list(folder.rglob("*.tmp"))
    if not told:
        ours, theirs = model.replay_buffer.get_state(), resumed.replay_buffer.get_state()
        assert all(np.array_equal(ours[name], theirs[name]) for name in ("obs", "action", "reward", "flags", "pos"))
assert 0 < in_segments < n_failed < 15, (in_segments, n_failed)
"""
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr

"""Replay that stores each frame of a stack once: its batches are those of a buffer that stores all, bit for bit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import FrameStackObservation

import sbac.segments
from sbac import DDPG, TD3
from sbac.adapters import Step
from sbac.buffers import ReplayBatch, ReplayBuffer
from sbac.envs import make_environments
from sbac.frames import FrameStackReplayBuffer
from sbac.segments import Segments, read_segments
from sbac.trees import Tree, batch_size, leaves, rows, set_rows, space_tree, tree_map

ACTION = spaces.Box(-1, 1, (1,), np.float32)
IMAGE = spaces.Box(0, 255, (3, 2), np.uint8)
FRAMES: dict[str, spaces.Space[Any]] = {
    "image": IMAGE,
    "float64": spaces.Box(-np.inf, np.inf, (2,), np.float64),
    "dict": spaces.Dict({"camera": IMAGE, "more": spaces.Dict({"speed": spaces.Box(-1, 1, (2, 1), np.float32)})}),
}


class Film(gymnasium.Env[Any, Any]):
    """Noise for frames; episodes end at random, in both ways, some of them before a stack is full.

    Args:
        space: Of one frame.
        end: The chance that a step terminates the episode, and that a time limit cuts it.
    """

    action_space = ACTION

    def __init__(self, space: spaces.Space[Any], end: float = 0.1) -> None:
        self.observation_space, self.end = space, end

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self._frame(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        terminated, truncated = self.np_random.random(2) < self.end
        return self._frame(), self.np_random.normal(), bool(terminated), bool(truncated), {}

    def _frame(self) -> Any:
        def noise(leaf: spaces.Space[Any]) -> np.ndarray:
            return (self.np_random.random(leaf.shape or ()) * (255 if leaf.dtype == np.uint8 else 1)).astype(leaf.dtype)

        return tree_map(noise, space_tree(self.observation_space))


def film(space: spaces.Space[Any], k: int = 4, padding: str = "reset", end: float = 0.1) -> gymnasium.Env[Any, Any]:
    return FrameStackObservation(Film(space, end), k, padding_type=padding)


def footage(n_rows: int, n_envs: int, kind: str = "image", mode: Any = AutoresetMode.SAME_STEP, **more: Any) -> Any:
    """A space of stacks, and what to add: rows of environments that somebody also resets, in the midst of episodes."""
    door = make_environments(
        SyncVectorEnv([lambda: film(FRAMES[kind], **more) for _ in range(n_envs)], autoreset_mode=mode)
    )
    rng, steps = np.random.default_rng(1), []
    obs = door.reset(0)
    for _ in range(n_rows):
        if rng.random() < 0.1:
            obs = door.reset()
        action = rng.uniform(-1, 1, (n_envs, 1)).astype(np.float32)
        step = door.step(action)
        steps.append((obs, action, step))
        obs = step.obs
    door.close()
    return door.observation_space, steps


def pair(space: spaces.Space[Any], buffer_size: int, n_envs: int, n_steps: int = 1) -> list[ReplayBuffer]:
    """A buffer that stores all, and one that stores frames, which draw alike."""
    return [
        cls(buffer_size, space, ACTION, n_envs=n_envs, generator=np.random.default_rng(2), n_steps=n_steps)
        for cls in (ReplayBuffer, FrameStackReplayBuffer)
    ]


def everything(buffer: ReplayBuffer) -> ReplayBatch:
    """A batch of all that the buffer holds."""
    return buffer._batch(np.arange(buffer._rows_held() * buffer.n_envs), 0.9)


def assert_same(one: ReplayBatch, other: ReplayBatch) -> None:
    """Equal to the last bit, in dtypes and shapes too."""
    pairs = zip(leaves(tuple(one)), leaves(tuple(other)), strict=True)
    for (name, a), (_, b) in pairs:
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), name


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize(("n_envs", "n_rows"), [(1, 1), (3, 1), (1, 2), (3, 3), (2, 4), (1, 25), (3, 25)])
def test_batches_are_those_of_a_buffer_that_stores_all(mode: Any, n_steps: int, n_envs: int, n_rows: int) -> None:
    space, steps = footage(90, n_envs, mode=mode)
    plain, frames = pair(space, n_rows * n_envs, n_envs, n_steps)
    for step in steps:
        plain.add(*step)
        frames.add(*step)
        assert frames.size() == plain.size()
        assert_same(everything(plain), everything(frames))
        if plain.size():
            assert_same(plain.sample(5), frames.sample(5))
    assert plain.full
    flags = np.concatenate([step.terminated | step.truncated for _, _, step in steps])
    assert np.count_nonzero(flags) > 5


@pytest.mark.parametrize("kind", FRAMES)
@pytest.mark.parametrize("padding", ["reset", "zero"])
@pytest.mark.parametrize("k", [1, 2, 7])
def test_frames_of_every_kind_and_stacks_of_every_size(kind: str, padding: str, k: int) -> None:
    space, steps = footage(60, 2, kind, k=k, padding=padding)
    plain, frames = pair(space, 40, 2)
    assert isinstance(frames, FrameStackReplayBuffer)
    assert frames.stack_size == k
    for step in steps:
        plain.add(*step)
        frames.add(*step)
        assert_same(everything(plain), everything(frames))


def test_nothing_is_taken_on_trust() -> None:
    """Stacks that move on by none or two frames, change an old frame, differ in the sign of a zero, or are any."""
    space = spaces.Box(-np.inf, np.inf, (3, 2), np.float32)
    plain, frames = pair(space, 24, 2)
    rng = np.random.default_rng(0)
    obs = rng.integers(-1, 2, (2, 3, 2)).astype(np.float32)
    for t in range(200):
        following = np.concatenate([obs[:, 1:], rng.integers(-1, 2, (2, 1, 2))], axis=1, dtype=np.float32)
        match rng.integers(8):
            case 0:
                following = obs.copy()
            case 1:
                following = np.concatenate([obs[:, 2:], rng.integers(-1, 2, (2, 2, 2))], axis=1, dtype=np.float32)
            case 2:
                following[t % 2, 0] += 1
            case 3:
                following = np.where(following == 0, -following, following)
            case 4:
                following = np.asfortranarray(rng.normal(size=(2, 3, 2)).astype(np.float32))
        step = Step(following, np.zeros(2), np.zeros(2, bool), np.zeros(2, bool), following, np.ones(2, bool), [{}] * 2)
        for buffer in (plain, frames):
            buffer.add(obs, np.full((2, 1), t / 200), step)
        assert_same(everything(plain), everything(frames))
        obs = following


@pytest.mark.parametrize("n_rows", [4, 25])
def test_what_is_overwritten_would_be_missed(n_rows: int, monkeypatch: Any) -> None:
    """The stack of the oldest row is not to be had from rows: without it in the table, batches are wrong."""
    space, steps = footage(2 * n_rows, 1, end=0.0)
    monkeypatch.setattr(FrameStackReplayBuffer, "_forget", ReplayBuffer._forget)
    plain, frames = pair(space, n_rows, 1)
    for step in steps:
        plain.add(*step)
        frames.add(*step)
    with pytest.raises(AssertionError):
        assert_same(everything(plain), everything(frames))


def test_what_is_held_is_a_copy() -> None:
    space, steps = footage(12, 2)
    plain, frames = pair(space, 40, 2)
    for obs, action, step in steps:
        plain.add(obs, action, step)
        own = tree_map(np.array, obs)
        frames.add(own, action, step)
        set_rows(own, slice(None), 0)
    before = everything(frames)
    assert_same(everything(plain), before)
    before.obs.zero_()
    before.successor.zero_()
    assert_same(everything(plain), everything(frames))


def test_after_a_reset_it_fills_as_if_new() -> None:
    space, steps = footage(40, 2)
    plain, frames = pair(space, 20, 2)
    for step in steps[:25]:
        frames.add(*step)
    frames.reset()
    assert frames.size() == 0
    for step in steps[25:]:
        plain.add(*step)
        frames.add(*step)
        assert_same(everything(plain), everything(frames))


# Bytes.


def held_bytes(tree: Tree) -> int:
    return sum(leaf.nbytes for _, leaf in leaves(tree))


@pytest.mark.parametrize("k", [2, 4])
def test_bytes_are_those_of_one_frame(k: int) -> None:
    """Of episodes of 200 steps of images, 1 / k of the other's, and not 6 % more with all tables."""
    space = spaces.Box(0, 255, (k, 28, 28), np.uint8)
    plain, frames = pair(space, 2_000, 2)
    each = 28 * 28 + 4 + 4 + 1
    assert frames.nbytes == 2_000 * (each + 1)  # the one tells whether there is a whole stack
    assert plain.nbytes == 2_000 * (each + (k - 1) * 28 * 28)

    rng = np.random.default_rng(0)
    obs = np.zeros((2, *space.shape), np.uint8)
    for t in range(1, 1_501):
        frame = rng.integers(0, 256, (2, 1, 28, 28), np.uint8)
        successor = np.concatenate([obs[:, 1:], frame], axis=1)
        ends = np.full(2, t % 200 == 0)
        following = np.repeat(frame, k, axis=1) if ends[0] else successor
        for buffer in (plain, frames):
            buffer.add(
                obs, np.zeros((2, 1)), Step(following, np.zeros(2), ends, ~ends & ends, successor, ~ends | ends, [])
            )
        obs = following
    assert isinstance(frames, FrameStackReplayBuffer)
    assert frames.full
    # The last 1000 steps of each: five episodes end in them, and five begin, and the ring somewhere.
    assert len(frames._successor_of) == len(plain._successor_of) == 2 * 5
    assert len(frames._stacks) == 2 * (5 + 1)
    stack = k * 28 * 28
    assert all(held_bytes(whole) == stack for whole in frames._stacks.values())
    total, plain_total = (buffer.nbytes + stack * len(buffer._successor_of) for buffer in (frames, plain))
    assert total + stack * len(frames._stacks) < 1.06 / k * plain_total


def test_frames_and_not_stacks_are_what_the_memory_is_for() -> None:
    space = spaces.Box(0, 255, (4, 84, 84), np.uint8)
    # 84 x 84 + 4 + 4 + 1 = 7065 bytes each, 1e9 of them.
    with pytest.raises(MemoryError, match=r"would take 6579\.8 GiB \(1,000,000,000 transitions of 7,065 bytes\)"):
        FrameStackReplayBuffer(10**9, space, ACTION)


def test_where_stacks_do_not_move_on_it_is_said_once() -> None:
    space = spaces.Box(0, 255, (3, 2, 2), np.uint8)  # an image with its channels first, and no stack
    rng = np.random.default_rng(0)
    buffer = FrameStackReplayBuffer(2_000, space, ACTION)
    obs = rng.integers(0, 256, (1_100, 1, 3, 2, 2), np.uint8)
    none, zero = np.zeros(1, bool), np.zeros(1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for t in range(1_099):
            buffer.add(obs[t], np.zeros((1, 1)), Step(obs[t + 1], zero, none, none, obs[t + 1], ~none, []))
    assert len(told) == 1
    assert "of 1,000 observations, 1,001 are not the one before moved on by one of 3 frames" in str(told[0].message)
    torch.testing.assert_close(everything(buffer).obs, torch.as_tensor(obs[:1_099, 0]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("space", "text"),
    [
        (spaces.Box(-1, 1, (3,), np.float32), r"but Box\(.*\) is not of shape \(frames, \*frame_shape\)"),
        (spaces.Discrete(3), r"but Discrete\(3\) is not of shape"),
        (spaces.MultiBinary((4, 2)), r"but MultiBinary\(\(4, 2\)\) is not of shape"),
        (spaces.Box(np.array([[0, 0], [-1, 0]]), 1.0, dtype=np.float64), "has different bounds along its first axis"),
        (
            spaces.Dict({"a": spaces.Box(0, 1, (4, 2)), "b": spaces.Box(0, 1, (3, 2))}),
            r"\(at 'b' in Dict.*\) has 3 of them and 'a' 4",
        ),
        (
            spaces.Dict({"camera": spaces.Box(0, 255, (4, 2, 2), np.uint8), "speed": spaces.Box(-1, 1, (2,))}),
            r"\(at 'speed' in Dict.*\) is not of shape",
        ),
    ],
)
def test_a_space_that_is_no_stack_is_named(space: spaces.Space[Any], text: str) -> None:
    with pytest.raises(
        ValueError, match=rf"(?s)FrameStackObservation makes them, .*{text}.*: leave out replay_buffer_cl"
    ):
        FrameStackReplayBuffer(10, space, ACTION)


# States.


def copied(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array.copy() for name, array in state.items()}


@pytest.mark.parametrize("kind", ["image", "dict"])
@pytest.mark.parametrize("larger", [0, 1, 5])
def test_a_restored_buffer_goes_on_as_if_never_stored(kind: str, larger: int) -> None:
    """Stored when empty and at each place of the ring in its first two rounds, into one as large or larger."""
    space, steps = footage(30, 2, kind)
    others = footage(30, 2, kind, mode=AutoresetMode.NEXT_STEP)[1]
    for stored_at in range(18):
        stored, plain = FrameStackReplayBuffer(14, space, ACTION, n_envs=2), ReplayBuffer(14, space, ACTION, n_envs=2)
        for step in steps[:stored_at]:
            stored.add(*step)
            plain.add(*step)
        reference, restored = pair(space, 14 + 2 * larger, 2)
        for step in others[: stored_at % 8]:
            restored.add(*step)  # something else, which is to be forgotten
        reference.set_state(copied(plain.get_state()))
        restored.set_state(copied(stored.get_state()))
        for step in steps[stored_at:]:
            assert_same(everything(reference), everything(restored))
            reference.add(*step)
            restored.add(*step)
        assert_same(everything(reference), everything(restored))


def test_a_buffer_may_take_back_its_own_state() -> None:
    space, steps = footage(40, 2)
    plain, frames = pair(space, 30, 2)
    for step in steps:
        plain.add(*step)
        frames.add(*step)
        frames.set_state(frames.get_state())
    assert_same(everything(plain), everything(frames))


DAMAGES: dict[str, tuple[Any, str]] = {
    "whole_index": (lambda index: index[1:], "before which there are no frames"),
    "whole_index twice": (lambda index: np.repeat(index[:1], len(index)), "a list of places"),
    "whole_index beyond": (lambda index: np.where(index == index.max(), 30, index), "among those of 15 rows of 2 env"),
    "whole_index float": (lambda index: index.astype(float), "a list of places"),
    "whole short": (lambda stacks: stacks[1:], r"of shape \(\d+, 4, 3, 2\) and dtype uint8"),
    "whole dtype": (lambda stacks: stacks.astype(np.int16), "and dtype uint8"),
    "newest": (lambda newest: newest[:, -1], r"of shape \(2, 4, 3, 2\)"),
    "obs": (lambda obs: obs[:, :, :2], "the stored obs has shape"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_refused_and_nothing_changed(damage: str) -> None:
    space, steps = footage(19, 2)
    frames = pair(space, 30, 2)[1]
    for step in steps:
        frames.add(*step)
    frames.set_state(frames.get_state())
    before = everything(frames)
    state = copied(frames.get_state())
    # The first entry is to be one of the oldest row's.
    order = np.argsort(state["whole_index"] != frames.pos * 2, kind="stable")
    state["whole_index"], state["whole"] = state["whole_index"][order], state["whole"][order]
    change, text = DAMAGES[damage]
    name = damage.split()[0]
    with pytest.raises(ValueError, match=text):
        frames.set_state({**state, name: change(state[name])})
    assert_same(before, everything(frames))
    frames.set_state(state)
    assert_same(before, everything(frames))


def test_the_state_of_another_class_is_refused_with_its_reason() -> None:
    space, steps = footage(9, 2)
    plain, frames = pair(space, 30, 2)
    plain.add(*steps[0])
    frames.add(*steps[0])
    with pytest.raises(ValueError, match="lacks whole_index: it was stored by another class of buffer"):
        frames.set_state(plain.get_state())
    with pytest.raises(ValueError, match="does not fit this buffer's"):
        plain.set_state(frames.get_state())
    assert_same(everything(plain), everything(frames))


def test_segments_hold_frames(monkeypatch: Any, tmp_path: Path) -> None:
    """Checkpoints of one run, each of which writes what is new: also when the ring has gone round since."""
    monkeypatch.setattr(sbac.segments, "SMALL", 1)
    space, steps = footage(60, 2)
    plain, frames = pair(space, 40, 2)
    segments = Segments(tmp_path / "segments")
    for t, step in enumerate(steps):
        plain.add(*step)
        frames.add(*step)
        if t % 7 == 6:
            taken = segments.take(frames)
            assert taken is not None
            restored = pair(space, 40, 2)[1]
            restored.set_state({**read_segments(tmp_path / "segments", taken[0]), **copied(taken[1])})
            assert_same(everything(plain), everything(restored))


# In an algorithm.


def stacked_film() -> gymnasium.Env[Any, Any]:
    return film(FRAMES["image"], k=3, end=0.05)


def make(cls: Any, buffer: type[ReplayBuffer], **arguments: Any) -> Any:
    return cls(
        "MlpPolicy",
        stacked_film,
        buffer_size=60,
        learning_starts=20,
        batch_size=8,
        replay_buffer_class=buffer,
        policy_kwargs={"net_arch": [8, 8]},
        seed=0,
        **arguments,
    )


def weights(model: Any) -> bytes:
    return b"".join(tensor.numpy().tobytes() for tensor in model.policy.state_dict().values())


@pytest.mark.parametrize("cls", [DDPG, TD3])
@pytest.mark.parametrize("arguments", [{}, {"n_envs": 3, "n_steps": 3}], ids=["one", "many"])
def test_weights_are_those_that_a_buffer_that_stores_all_leads_to(
    cls: Any, arguments: dict[str, Any], tmp_path: Path
) -> None:
    """Also where the run was stopped, saved in full, and loaded."""
    plain, whole = (make(cls, buffer, **arguments).learn(100) for buffer in (ReplayBuffer, FrameStackReplayBuffer))
    assert plain.n_updates > 60
    assert weights(whole) == weights(plain)

    stopped = make(cls, FrameStackReplayBuffer, **arguments)
    stopped.learn(100, callback=lambda locals_, _: bool(locals_["self"].num_timesteps < 70))
    stopped.save(tmp_path / "model", full=True)
    loaded = cls.load(tmp_path / "model", env=stacked_film)
    assert type(loaded.replay_buffer) is FrameStackReplayBuffer
    assert_same(everything(stopped.replay_buffer), everything(loaded.replay_buffer))
    loaded.learn(100 - loaded.num_timesteps, reset_num_timesteps=False)
    assert weights(loaded) == weights(plain)


def test_a_file_of_the_buffer_alone(tmp_path: Path) -> None:
    model = make(DDPG, FrameStackReplayBuffer).learn(100)
    model.save_replay_buffer(tmp_path / "replay")
    other = make(DDPG, FrameStackReplayBuffer)
    other.load_replay_buffer(tmp_path / "replay")
    assert_same(everything(model.replay_buffer), everything(other.replay_buffer))


def test_images_reach_the_convolutions() -> None:
    space = spaces.Box(0, 255, (40, 40), np.uint8)
    model = TD3(
        "CnnPolicy",
        lambda: film(space),
        buffer_size=40,
        learning_starts=8,
        batch_size=4,
        replay_buffer_class=FrameStackReplayBuffer,
        seed=0,
    ).learn(12)
    batch = model.replay_buffer.sample(4)
    assert batch.obs.dtype == torch.uint8
    assert batch.obs.shape == batch.successor.shape == (4, 4, 40, 40)
    assert batch_size(rows(batch.obs, slice(2))) == 2

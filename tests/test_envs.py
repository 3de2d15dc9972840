"""The door to environments: the same transitions from each kind of vector environment, and faults that are named."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import TimeLimit, TransformAction, TransformObservation
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from gymnasium.wrappers.vector import TransformAction as TransformVectorAction
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from sbac.adapters import Infos, Step
from sbac.envs import ActionCodec, Environments, make_environments
from sbac.guards import EnvironmentFault, NotFiniteError
from sbac.trees import leaves, space_tree, tree_map
from tests.environments import (
    EPISODE_LENGTHS,
    TIME_LIMIT,
    BareVectorEnv,
    Counter,
    InPlace,
    InPlaceVecEnv,
    InPlaceVectorEnv,
    Misbehaving,
    Random,
    Recorder,
    ShapedVecEnv,
    counters,
)

MODES = list(AutoresetMode)
N_TRANSITIONS = 25
"""Of each environment: several episodes, some ended by termination, some by the time limit."""


@pytest.fixture
def _must_not_hang() -> Iterator[None]:
    def expired(*_: Any) -> None:
        pytest.fail("a call to the environments hangs")

    previous = signal.signal(signal.SIGALRM, expired)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


class Transition(NamedTuple):
    obs: tuple[float, ...]
    action: float  # in the units of an algorithm
    reward: float
    terminated: bool
    truncated: bool
    successor: tuple[float, ...]


def choose(obs: np.ndarray) -> np.ndarray:
    """An action in {-1, 0, 1} that depends on everything observed, for observations (n, 3): (n, 1)."""
    return (obs.sum(axis=1, keepdims=True) % 3 - 1).astype(np.float32)


def by_hand(index: int, time_limit: int = TIME_LIMIT) -> list[Transition]:
    """What happens in one Counter, counted without any environment."""
    transitions, episode, t = [], 0, 0
    while len(transitions) < N_TRANSITIONS:
        action = (index + episode + t) % 3 - 1
        t += 1
        terminated = t == EPISODE_LENGTHS[index][episode % len(EPISODE_LENGTHS[index])]
        truncated = t == time_limit
        transitions.append(
            Transition(
                obs=(index, episode, t - 1),
                action=action,
                reward=100 * episode + 10 * t + {-1: -1, 0: 1, 1: 3}[action],
                terminated=terminated,
                truncated=truncated,
                successor=(index, episode, t),
            )
        )
        if terminated or truncated:
            episode, t = episode + 1, 0
    return transitions


def through_the_door(
    door: Environments, successor: Callable[[Step], np.ndarray] = lambda step: step.successor, only_valid: bool = True
) -> list[list[Transition]]:
    """What each environment did, as an algorithm would collect it."""
    found: list[list[Transition]] = [[] for _ in range(door.num_envs)]
    obs = door.reset()
    while min(map(len, found)) < N_TRANSITIONS:
        action = choose(obs)
        step = door.step(action)
        assert step.terminated.dtype == step.truncated.dtype == bool
        # Read only now: an environment that wrote over what it returned earlier would be noticed.
        for i in range(door.num_envs):
            if step.valid[i] or not only_valid:
                found[i].append(
                    Transition(
                        tuple(obs[i]),
                        float(action[i, 0]),
                        float(step.reward[i]),
                        bool(step.terminated[i]),
                        bool(step.truncated[i]),
                        tuple(successor(step)[i]),
                    )
                )
        obs = step.obs
    door.close()
    return [transitions[:N_TRANSITIONS] for transitions in found]


KINDS: dict[str, Callable[[], Any]] = {
    "list of factories": counters,
    "list of factories that write in place": lambda: counters(InPlace),
    "hand-made VecEnv": lambda: ShapedVecEnv(counters()),
    "VecEnv that writes in place": lambda: InPlaceVecEnv(counters()),
    "DummyVecEnv": lambda: DummyVecEnv([lambda make=make: Monitor(make()) for make in counters()]),
    "AsyncVectorEnv without copies": lambda: AsyncVectorEnv(
        counters(), copy=False, autoreset_mode=AutoresetMode.DISABLED
    ),
}
for _mode in MODES:
    KINDS[f"SyncVectorEnv {_mode.value}"] = lambda mode=_mode: SyncVectorEnv(counters(), autoreset_mode=mode)
    KINDS[f"SyncVectorEnv without copies {_mode.value}"] = lambda mode=_mode: SyncVectorEnv(
        counters(), copy=False, autoreset_mode=mode
    )
    for _flags in (bool, np.uint8, np.int64, np.float32):
        KINDS[f"VectorEnv that writes in place, {_flags.__name__} {_mode.value}"] = lambda mode=_mode, flags=_flags: (
            InPlaceVectorEnv(SyncVectorEnv(counters(), autoreset_mode=mode), flags)
        )
    KINDS[f"AsyncVectorEnv {_mode.value}"] = lambda mode=_mode: AsyncVectorEnv(counters(), autoreset_mode=mode)


# The same transitions, whatever they come from.


@pytest.mark.usefixtures("_must_not_hang")
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_vector_environment_yields_the_same_transitions(kind: str) -> None:
    truth = [by_hand(index) for index in range(3)]
    assert any(t.terminated for t in truth[0])
    assert any(t.truncated for t in truth[0])

    assert through_the_door(make_environments(KINDS[kind]())) == truth


@pytest.mark.parametrize("n_envs", [1, 3])
def test_the_parts_of_observations_that_are_written_in_place_are_kept(n_envs: int) -> None:
    def factory(make: Callable[[], Any]) -> Callable[[], Any]:
        space = spaces.Dict({"a": spaces.Tuple([Counter().observation_space]), "b": spaces.Discrete(2)})
        return lambda: TransformObservation(make(), lambda obs: {"a": (obs,), "b": 1}, space)

    door = make_environments([factory(make) for make in counters(InPlace)[:n_envs]])
    obs = door.reset()
    for truth in list(zip(*(by_hand(index) for index in range(n_envs)), strict=True))[:12]:
        step = door.step(choose(obs["a"][0]))
        np.testing.assert_array_equal(obs["a"][0], [each.obs for each in truth])
        np.testing.assert_array_equal(step.successor["a"][0], [each.successor for each in truth])
        for i in range(n_envs):
            if truth[i].terminated or truth[i].truncated:
                np.testing.assert_array_equal(step.infos[i]["terminal_observation"]["a"][0], truth[i].successor)
        obs = step.obs


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
def test_the_observation_after_a_reset_is_not_the_successor(mode: AutoresetMode) -> None:
    door = make_environments(SyncVectorEnv(counters(), autoreset_mode=mode))
    wrong = through_the_door(door, successor=lambda step: step.obs)

    for index in range(3):
        differing = {i for i, (a, b) in enumerate(zip(wrong[index], by_hand(index), strict=True)) if a != b}
        assert differing == {i for i, t in enumerate(by_hand(index)) if t.terminated or t.truncated}


def test_the_empty_step_of_next_step_autoreset_is_no_transition() -> None:
    door = make_environments(SyncVectorEnv(counters(), autoreset_mode=AutoresetMode.NEXT_STEP))
    wrong = through_the_door(door, only_valid=False)

    assert all(wrong[index] != by_hand(index) for index in range(3))


def test_next_step_autoreset_forgets_an_ended_episode_at_reset() -> None:
    door = make_environments(SyncVectorEnv([lambda: Counter(lengths=(1,))], autoreset_mode=AutoresetMode.NEXT_STEP))
    door.reset()
    assert door.step(np.zeros((1, 1))).terminated.all()
    door.reset()
    assert door.step(np.zeros((1, 1))).valid.all()


@pytest.mark.parametrize("kind", [*MODES, "DummyVecEnv"])
def test_an_episode_that_terminates_at_its_time_limit_terminates(kind: AutoresetMode | str) -> None:
    def factory() -> gymnasium.Env[Any, Any]:
        return TimeLimit(Counter(lengths=(TIME_LIMIT,)), TIME_LIMIT)

    env = DummyVecEnv([factory]) if kind == "DummyVecEnv" else SyncVectorEnv([factory], autoreset_mode=kind)
    door = make_environments(env)
    door.reset()
    steps = [door.step(np.zeros((1, 1), np.float32)) for _ in range(TIME_LIMIT)]

    assert [bool(step.terminated[0]) for step in steps] == [False] * (TIME_LIMIT - 1) + [True]
    assert steps[-1].infos[0]["TimeLimit.truncated"] is False
    np.testing.assert_array_equal(steps[-1].successor, [[0, 0, TIME_LIMIT]])


def native_cartpole(time_limit: int) -> Any:
    return gymnasium.make_vec(
        "CartPole-v1", num_envs=3, vectorization_mode="vector_entry_point", max_episode_steps=time_limit
    )


def envpool_cartpole(time_limit: int) -> Any:
    envpool = pytest.importorskip("envpool")
    return envpool.make("CartPole-v1", env_type="gymnasium", num_envs=3, seed=1, max_episode_steps=time_limit)


def cartpole_successor(obs: np.ndarray, action: int) -> np.ndarray:
    """One Euler step of the pole's equations of motion (Barto, Sutton and Anderson 1983)."""
    x, x_dot, theta, theta_dot = obs.astype(np.float64)
    force = 10.0 if action == 1 else -10.0
    push = (force + 0.05 * theta_dot**2 * np.sin(theta)) / 1.1
    theta_acc = (9.8 * np.sin(theta) - np.cos(theta) * push) / (0.5 * (4 / 3 - 0.1 * np.cos(theta) ** 2 / 1.1))
    x_acc = push - 0.05 * theta_acc * np.cos(theta) / 1.1
    return np.array([x, x_dot, theta, theta_dot]) + 0.02 * np.array([x_dot, x_acc, theta_dot, theta_acc])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("make", [native_cartpole, envpool_cartpole])
def test_natively_vectorised_environments_follow_the_equations_of_motion(make: Callable[[int], Any]) -> None:
    time_limit = 14
    door = make_environments(make(time_limit))
    assert door.num_envs == 3
    assert door.observation_space.shape == (4,)

    obs = door.reset()
    length = np.zeros(3, int)
    n_terminated = n_truncated = n_skipped = n_ended = 0
    for t in range(60):
        # The first environment balances until the time limit, the others fall over.
        action = np.array([int(obs[0, 2] + obs[0, 3] > 0), 1, 0])
        step = door.step(action)
        for i in range(3):
            moved = cartpole_successor(obs[i], int(action[i]))
            if not step.valid[i]:
                assert np.abs(moved - step.successor[i]).max() > 1e-3
                assert np.abs(step.obs[i]).max() <= 0.05
                length[i] = 0
                n_skipped += 1
                continue
            np.testing.assert_allclose(step.successor[i], moved, atol=1e-5)
            length[i] += 1
            assert step.reward[i] == 1
            assert step.truncated[i] == (length[i] == time_limit)
            assert step.terminated[i] == (abs(moved[2]) > 12 * 2 * np.pi / 360)
            n_terminated += int(step.terminated[i])
            n_truncated += int(step.truncated[i])
            n_ended += int((step.terminated[i] or step.truncated[i]) and t < 59)
        obs = step.obs
    door.close()
    assert min(n_terminated, n_truncated) > 2
    assert n_skipped == n_ended


# Infos.


def test_infos_are_made_only_when_somebody_looks() -> None:
    class Untouchable(dict[str, Any]):
        def items(self) -> Any:
            raise AssertionError("looked at")

    infos = Infos(Untouchable(), 2, {})
    assert len(infos) == 2
    with pytest.raises(AssertionError, match="looked at"):
        infos[0]
    with pytest.raises(IndexError):
        infos[2]


@pytest.mark.parametrize("mode", MODES)
def test_infos_hold_what_each_environment_sent(mode: AutoresetMode) -> None:
    door = make_environments(SyncVectorEnv(counters(), autoreset_mode=mode))
    door.reset()
    steps = [door.step(np.zeros((3, 1), np.float32)) for _ in range(TIME_LIMIT)]

    # The first environment terminates at its third step, the second meets the time limit at its fifth.
    quiet, terminated, truncated = steps[1].infos[0], steps[2].infos[0], steps[4].infos[1]
    assert quiet == {"t": 2, "name": "env 0", "outer": {"inner": {"episode": 0}}}

    np.testing.assert_array_equal(terminated.pop("terminal_observation"), [0, 0, 3])
    assert terminated == {
        "t": 3,
        "name": "env 0",
        "outer": {"inner": {"episode": 0}},
        "is_success": True,
        "TimeLimit.truncated": False,
    }
    np.testing.assert_array_equal(truncated.pop("terminal_observation"), [1, 0, 5])
    assert truncated == {"t": 5, "name": "env 1", "outer": {"inner": {"episode": 0}}, "TimeLimit.truncated": True}


def test_infos_are_a_sequence() -> None:
    infos = Infos({"a": np.array([1, 2, 3]), "all": "same", "ragged": [[1], [2, 3], []]}, 3, {1: {"end": True}})
    assert infos[-1] == {"a": 3, "all": "same", "ragged": []}
    assert infos[1:] == [{"a": 2, "all": "same", "ragged": [2, 3], "end": True}, infos[2]]
    assert list(infos) == [infos[0], infos[1], infos[2]]


# Gymnasium 1.4's wrapper loses count of the other environments where only some are reset, as in the third mode.
@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
def test_infos_hold_the_episode_that_a_vector_wrapper_recorded(mode: AutoresetMode) -> None:
    door = make_environments(RecordEpisodeStatistics(SyncVectorEnv(counters(), autoreset_mode=mode)))
    door.reset()
    steps = [door.step(np.full((3, 1), -1, np.float32)) for _ in range(3)]

    assert "episode" not in steps[1].infos[0]
    episode = steps[2].infos[0]["episode"]
    assert (episode["r"], episode["l"]) == (9 + 19 + 29, 3)
    assert "episode" not in steps[2].infos[1]


# What may be passed as env.


def test_an_id_an_instance_a_factory_and_a_list_make_environments() -> None:
    by_id = make_environments("CartPole-v1", n_envs=2)
    assert (by_id.num_envs, by_id.env_id) == (2, "CartPole-v1")
    assert by_id.observation_space.shape == (4,)

    by_instance = make_environments(gymnasium.make("CartPole-v1"))
    assert (by_instance.num_envs, by_instance.env_id) == (1, "CartPole-v1")

    by_factory = make_environments(Counter, n_envs=3)
    assert (by_factory.num_envs, by_factory.env_id) == (3, None)
    assert len({id(env.unwrapped) for env in by_factory.env.envs}) == 3

    by_list = make_environments(counters())
    np.testing.assert_array_equal(by_list.reset(), [[0, 0, 0], [1, 0, 0], [2, 0, 0]])
    assert make_environments(by_list) is by_list
    assert make_environments(by_list, n_envs=3) is by_list


def test_resets_are_counted() -> None:
    door = make_environments(Counter)
    assert door.reset_count == 0
    door.reset()
    door.reset()
    assert door.reset_count == 2


def test_closing_the_door_closes_the_environments() -> None:
    env = ShapedVecEnv(counters())
    make_environments(env).close()
    assert env.closed


@pytest.mark.parametrize("n_envs", [0, -1, 1.5, True, "2"])
def test_n_envs_is_a_positive_whole_number(n_envs: Any) -> None:
    with pytest.raises(ValueError, match=r"n_envs must be a whole number, at least 1, not "):
        make_environments("CartPole-v1", n_envs=n_envs)


def test_n_envs_must_fit_what_is_given() -> None:
    with pytest.raises(ValueError, match=r"n_envs=2 needs 2 environments, but env is one live environment.*lambda"):
        make_environments(Counter(), n_envs=2)
    for env in (counters(), SyncVectorEnv(counters()), ShapedVecEnv(counters()), make_environments(counters())):
        with pytest.raises(ValueError, match=r"n_envs=2 does not fit: env already holds 3 environments"):
            make_environments(env, n_envs=2)


def test_a_factory_must_make_a_new_environment_each_time() -> None:
    env = Counter()
    with pytest.raises(ValueError, match=r"environment 1 returned the same object as an earlier one"):
        make_environments(lambda: env, n_envs=2)
    with pytest.raises(ValueError, match=r"environment 2 returned the same object as an earlier one"):
        make_environments([Counter, lambda: env, lambda: TimeLimit(env, 3)])


def test_what_is_no_environment_is_refused() -> None:
    with pytest.raises(TypeError, match=r"function for environment 0 returned builtins.int, not a gymnasium.Env"):
        make_environments(lambda: 3)
    for env in (3, None, [], [1, 2]):
        with pytest.raises(TypeError, match=r"env must be an id, a gymnasium.Env, .* not builtins\."):
            make_environments(env)


@pytest.mark.parametrize(("wrong", "right"), [("CartPol-v1", "CartPole-v1"), ("cartpole-v1", "CartPole-v1")])
def test_an_unknown_id_suggests_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown environment '{wrong}'; did you mean '{right}'\?"):
        make_environments(wrong)


def test_an_unknown_id_far_from_all_others_says_where_to_look() -> None:
    with pytest.raises(ValueError, match=r"unknown environment 'Qqqqqqqqqqqqqqq-v0'; gymnasium.pprint_registry\(\)"):
        make_environments("Qqqqqqqqqqqqqqq-v0")


def test_an_id_that_needs_a_missing_package_says_so() -> None:
    def entry_point() -> gymnasium.Env[Any, Any]:
        raise gymnasium.error.DependencyNotInstalled("pip install stones")

    gymnasium.register("sbac-tests/NeedsStones-v0", entry_point=entry_point)
    try:
        with pytest.raises(ValueError, match=r"NeedsStones-v0' needs a package that is not installed: .*stones"):
            make_environments("sbac-tests/NeedsStones-v0")
    finally:
        del gymnasium.registry["sbac-tests/NeedsStones-v0"]


# Faults are named: which environment, which step.


def three(culprit: int, at: int, what: str) -> list[Callable[[], gymnasium.Env[Any, Any]]]:
    return [lambda index=index: Misbehaving(index, culprit, at, what) for index in range(3)]


def run(door: Environments, steps: int = 5) -> None:
    door.reset()
    for _ in range(steps):
        run_on(door)


def run_on(door: Environments) -> Step:
    return door.step(np.zeros((door.num_envs, 1), np.float32))


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("raise", EnvironmentFault, r"environment 1 \(Misbehaving\) raised ValueError at its step 3: boom"),
        (
            "shape",
            EnvironmentFault,
            r"environment 1 \(Misbehaving\) sent an observation of shape \(1,\) and dtype float32 at its step 3; "
            r"its observation_space promises \(2,\) and float32",
        ),
        (
            "float64",
            EnvironmentFault,
            r"environment 1 \(Misbehaving\) sent an observation of shape \(2,\) and dtype float64 at its step 3; .*"
            r"promises \(2,\) and float32: return an array such as numpy.asarray\(obs, dtype=numpy.float32\)",
        ),
        ("list", EnvironmentFault, r"environment 1 .* shape \(2,\) and dtype float64 at its step 3"),
        ("nan", NotFiniteError, r"environment 1 sent an observation that is not finite at step 3: \[ 0\. nan\]"),
        ("inf_reward", NotFiniteError, r"environment 1 sent the reward inf at step 3"),
    ],
)
def test_a_fault_is_one_error_that_names_environment_and_step(what: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        run(make_environments(three(culprit=1, at=3, what=what)))
    assert str(caught.value).count("environment 1") == 1


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("raise", r"environment 2 \(Misbehaving\) raised ValueError at reset after 0 steps: boom"),
        ("shape", r"environment 2 \(Misbehaving\) sent an observation of shape \(1,\) .* at reset after 0 steps"),
        ("nan", r"environment 2 sent an observation that is not finite at reset"),
    ],
)
def test_a_fault_at_reset_is_named(what: str, message: str) -> None:
    with pytest.raises((EnvironmentFault, NotFiniteError), match=message):
        run(make_environments(three(culprit=2, at=0, what=what)))


def test_a_registered_environment_is_named_by_its_id() -> None:
    gymnasium.register(
        "sbac-tests/Raises-v0", entry_point=lambda: Misbehaving(0, 0, 2, "raise"), disable_env_checker=True
    )
    try:
        with pytest.raises(EnvironmentFault, match=r"environment 0 \(sbac-tests/Raises-v0\) raised .* step 2: boom"):
            run(make_environments("sbac-tests/Raises-v0"))
    finally:
        del gymnasium.registry["sbac-tests/Raises-v0"]


@pytest.mark.parametrize("kind", [SyncVectorEnv, ShapedVecEnv])
def test_faults_in_a_vector_environment_name_the_step(kind: Callable[..., Any]) -> None:
    message = rf"the vector environment .*{kind.__name__}.* raised ValueError at step 3: boom"
    with pytest.raises(EnvironmentFault, match=message):
        run(make_environments(kind(three(culprit=1, at=3, what="raise"))))
    for what, name in (("nan", "observation"), ("inf_reward", "reward")):
        with pytest.raises(NotFiniteError, match=rf"environment 1 of .*{kind.__name__}.* sent .*{name}.* at step 3"):
            run(make_environments(kind(three(culprit=1, at=3, what=what))))


class Faulty(gymnasium.vector.VectorWrapper[Any, Any, Any]):
    """A vector environment that fails in its third step: it raises, or the last of its environments sends NaN."""

    def __init__(self, env: Any, what: str) -> None:
        super().__init__(env)
        self.what, self.steps = what, 0

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        obs, reward, *others = self.env.step(actions)
        self.steps += 1
        if self.steps == 3:
            if self.what == "raise":
                raise ValueError("boom")
            obs, reward = obs.copy(), reward.copy()
            (obs if self.what == "observation" else reward)[-1] = np.nan
        return obs, reward, *others


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("make", [native_cartpole, envpool_cartpole])
def test_a_natively_vectorised_environment_that_fails_names_itself(make: Callable[[int], Any]) -> None:
    def balance(env: Any) -> None:
        door = make_environments(env)
        door.reset()
        for _ in range(4):
            door.step(np.zeros(3, int))

    name = "CartPole"  # in its repr
    with pytest.raises(EnvironmentFault, match=rf"the vector environment .*{name}.* raised ValueError at step 3: boom"):
        balance(Faulty(make(10), "raise"))
    for what in ("observation", "reward"):
        with pytest.raises(NotFiniteError, match=rf"environment 2 of .*{name}.* sent .*{what}.* at step 3"):
            balance(Faulty(make(10), what))


def test_a_vector_environment_whose_observations_do_not_fit_its_space_is_refused() -> None:
    env = ShapedVecEnv(counters())
    env.observation_space = spaces.Box(0, 1, (4,), np.float32)
    with pytest.raises(
        EnvironmentFault, match=r"ShapedVecEnv.* shape \(3, 3\) and dtype float32 at reset; .* \(3, 4\) and float32"
    ):
        make_environments(env).reset()

    env.observation_space = spaces.Box(0, 1, (3,), np.float16)
    with pytest.raises(EnvironmentFault, match=r"shape \(3, 3\) and dtype float32 at reset; .* \(3, 3\) and float16"):
        make_environments(env).reset()


def test_a_nan_action_is_named_and_not_sent() -> None:
    recorders = [Recorder(spaces.Box(-2, 2, (2,), np.float32)) for _ in range(3)]
    door = make_environments([lambda env=env: env for env in recorders])
    door.reset()
    action = np.zeros((3, 2), np.float32)
    door.step(action)
    action[2, 1] = np.nan
    with pytest.raises(NotFiniteError, match=r"action for environment 2 at step 2 is not finite: \[ 0\. nan\]"):
        door.step(action)
    assert [len(env.received) for env in recorders] == [1, 1, 1]


@pytest.mark.filterwarnings("ignore::UserWarning:gymnasium")
@pytest.mark.usefixtures("_must_not_hang")
def test_a_worker_that_raises_is_named() -> None:
    door = make_environments(AsyncVectorEnv(three(culprit=1, at=3, what="raise")))
    with pytest.raises(EnvironmentFault, match=r"^environment 1 of AsyncVectorEnv.* ValueError at step 3: boom$"):
        run(door)
    door.close()


@pytest.mark.filterwarnings("ignore::UserWarning:gymnasium")
@pytest.mark.usefixtures("_must_not_hang")
def test_workers_that_raise_together_are_all_named() -> None:
    factories = [lambda i=i: Misbehaving(i, culprit=i if i != 1 else -1, at=2, what="raise") for i in range(3)]
    door = make_environments(AsyncVectorEnv(factories))
    with pytest.raises(EnvironmentFault, match=r"^environment 0, 2 of AsyncVectorEnv.* at step 2: boom$"):
        run(door)
    door.close()


@pytest.mark.usefixtures("_must_not_hang")
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_worker_is_named_and_nothing_hangs(victim: int) -> None:
    env = AsyncVectorEnv(three(culprit=-1, at=0, what=""))
    door = make_environments(env)
    run(door, steps=3)
    os.kill(env.processes[victim].pid, signal.SIGKILL)

    message = rf"process of environment {victim} \(exit code -9\) of AsyncVectorEnv\(num_envs=3\) died, noticed at "
    with pytest.raises(EnvironmentFault, match=message + "step 4"):
        run_on(door)
    with pytest.raises(EnvironmentFault, match=message + "step 5"):
        run_on(door)
    with pytest.raises(EnvironmentFault, match=message + "reset"):
        door.reset()
    door.close()
    assert not any(process.is_alive() for process in env.processes)


@pytest.mark.usefixtures("_must_not_hang")
def test_closing_does_not_wait_for_a_worker_that_was_killed_unnoticed() -> None:
    env = AsyncVectorEnv(three(culprit=-1, at=0, what=""))
    door = make_environments(env)
    door.reset()
    os.kill(env.processes[1].pid, signal.SIGKILL)
    env.processes[1].join()
    door.close()
    assert not any(process.is_alive() for process in env.processes)


@pytest.mark.usefixtures("_must_not_hang")
def test_stepping_closed_workers_is_not_taken_for_their_death() -> None:
    door = make_environments(AsyncVectorEnv(three(culprit=-1, at=0, what="")))
    door.reset()
    door.close()
    door.close()
    with pytest.raises(EnvironmentFault, match=r"raised ClosedEnvironmentError at step 1"):
        run_on(door)


def test_same_step_autoreset_without_final_observations_is_refused() -> None:
    door = make_environments(BareVectorEnv({"autoreset_mode": AutoresetMode.SAME_STEP}))
    door.reset()
    with pytest.raises(EnvironmentFault, match=r"resets in the same step but sent no 'final_obs'"):
        run_on(door)


def test_a_vector_environment_that_states_no_autoreset_mode_is_taken_for_next_step() -> None:
    with pytest.warns(UserWarning, match=r"does not state metadata\['autoreset_mode'\]; taken for next-step"):
        door = make_environments(BareVectorEnv({}))
    door.reset()
    assert run_on(door).valid.all()
    assert not run_on(door).valid.any()


# Actions.


def random_boxes(dtype: Any) -> list[spaces.Box]:
    rng = np.random.default_rng(0)
    ends = np.sort(rng.normal(size=(200, 2, 3)) * 10.0 ** rng.integers(-6, 7, size=(200, 2, 3)), axis=1).astype(dtype)
    awkward = [(-1e-8, 1e8), (-0.1, 0.7), (1e6, 1e6 + 1), (0.3, 0.3), (-1, 3), (-3e38, 3e38)]
    return [spaces.Box(low, high, dtype=dtype) for low, high in ends] + [
        spaces.Box(low, high, (3,), dtype) for low, high in awkward
    ]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_finite_box_is_reached_exactly_to_its_ends_and_never_left(dtype: Any) -> None:
    missed = 0
    for space in random_boxes(dtype):
        codec = ActionCodec(space)
        ones = np.ones(3, np.float32)
        np.testing.assert_array_equal(codec.to_env(-ones), space.low)
        np.testing.assert_array_equal(codec.to_env(ones), space.high)
        for value in (-5, np.nextafter(np.float32(-1), -2), -0.999, 0, 1e-8, 0.3, np.nextafter(np.float32(1), 2), 5):
            native = codec.to_env(ones * np.float32(value))
            assert space.contains(native), (space, value, native)

        # Without care for rounding, some ends are missed.
        low, high = space.low.astype(np.float64), space.high.astype(np.float64)
        missed += int(np.any((low / 2 + high / 2 + (high / 2 - low / 2)).astype(dtype) != space.high))
    assert missed > 0


def test_a_finite_box_is_rescaled_linearly() -> None:
    codec = ActionCodec(spaces.Box(np.array([-1, 0], np.float32), np.array([3, 10], np.float32)))
    actions = np.array([[-1, -1], [-0.5, 0], [0, 0.5], [1, 1]], np.float32)
    native = codec.to_env(actions)
    np.testing.assert_allclose(native, [[-1, 0], [0, 5], [1, 7.5], [3, 10]], rtol=1e-7)
    assert native.dtype == np.float32
    np.testing.assert_allclose(codec.from_env(native), actions, rtol=1e-7)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_actions_survive_the_way_to_an_environment_and_back(dtype: Any) -> None:
    rng = np.random.default_rng(1)
    actions = rng.uniform(-1, 1, size=(50, 3)).astype(np.float32)
    actions[0], actions[1] = -1, 1
    codec = ActionCodec(spaces.Box(np.array([-3, 0, 1], dtype), np.array([-1, 5, 1.5], dtype), dtype=dtype))
    np.testing.assert_allclose(codec.from_env(codec.to_env(actions)), actions, atol=1e-6)


def test_an_integer_box_is_rounded_to_whole_numbers_inside_it() -> None:
    space = spaces.Box(-3, 10, (1,), np.int64)
    codec = ActionCodec(space)
    whole = np.arange(-3, 11)[:, None]
    np.testing.assert_array_equal(codec.to_env(codec.from_env(whole)), whole)
    for value in np.linspace(-1.2, 1.2, 101, dtype=np.float32):
        native = codec.to_env(np.array([value]))
        assert space.contains(native)
        assert abs(native[0] - np.clip(3.5 + 6.5 * value, -3, 10)) <= 0.5 + 1e-6

    pixels = ActionCodec(spaces.Box(0, 255, (2,), np.uint8))
    np.testing.assert_array_equal(pixels.to_env(np.array([-1.0, 1.0])), np.array([0, 255], np.uint8))


def test_an_infinite_box_is_left_alone() -> None:
    codec = ActionCodec(spaces.Box(-np.inf, np.inf, (3,), np.float32))
    action = np.array([-1e30, 0.1, 123.456], np.float32)
    np.testing.assert_array_equal(codec.to_env(action), action)
    np.testing.assert_array_equal(codec.from_env(action), action)
    assert not codec.rescales


def test_a_half_infinite_box_is_clipped() -> None:
    codec = ActionCodec(spaces.Box(np.array([0, -np.inf], np.float32), np.array([np.inf, 2], np.float32)))
    actions = np.array([[-3, -3], [0.5, 0.5], [7, 7]], np.float32)
    np.testing.assert_array_equal(codec.to_env(actions), np.array([[0, -3], [0.5, 0.5], [7, 2]], np.float32))
    assert not codec.rescales


def test_discrete_actions_are_counted_from_the_start_of_the_space() -> None:
    space = spaces.Discrete(3, start=-1)
    codec = ActionCodec(space)
    native = codec.to_env(np.arange(3))
    np.testing.assert_array_equal(native, [-1, 0, 1])
    assert native.dtype == space.dtype
    assert all(space.contains(action) for action in native)
    np.testing.assert_array_equal(codec.from_env(native), [0, 1, 2])


def test_the_door_sends_actions_in_the_units_of_the_environment() -> None:
    discrete = [Recorder(spaces.Discrete(3, start=-1)) for _ in range(3)]
    door = make_environments([lambda env=env: env for env in discrete])
    door.reset()
    door.step(np.array([0, 1, 2]))
    assert [int(env.received[0]) for env in discrete] == [-1, 0, 1]
    door.step_native(np.array([0, 1, -1]))
    assert [int(env.received[1]) for env in discrete] == [0, 1, -1]

    box = Recorder(spaces.Box(0, 10, (2, 2), np.float32))
    door = make_environments(box)
    door.reset()
    door.step(np.array([[[-1, 1], [0, 0.5]]], np.float32))
    np.testing.assert_array_equal(box.received[0], [[0, 10], [5, 7.5]])
    assert box.received[0].dtype == np.float32
    door.step_native(np.full((1, 2, 2), 0.5, np.float32))
    np.testing.assert_array_equal(box.received[1], np.full((2, 2), 0.5))


SPACES_OF_ACTIONS = [
    spaces.Discrete(5),
    spaces.Discrete(5, start=2),
    spaces.MultiDiscrete([5, 5]),
    spaces.MultiBinary(2),
    spaces.Box(-1, 1, (2,), np.float32),
    spaces.Box(-np.inf, np.inf, (2,), np.float32),
    spaces.Dict({"x": spaces.MultiDiscrete([5, 5]), "y": spaces.MultiBinary(2)}),
]


@pytest.mark.parametrize("space", SPACES_OF_ACTIONS, ids=str)
@pytest.mark.parametrize("is_vectorised", [False, True])
def test_actions_that_an_environment_writes_into_stay_what_was_chosen(
    space: spaces.Space[Any], is_vectorised: bool
) -> None:
    def overwrite(action: Any) -> Any:
        sent = copy.deepcopy(action)
        for _, leaf in leaves(action):
            if isinstance(leaf, np.ndarray):
                leaf[...] = 0
        return sent

    def factory() -> gymnasium.Env[Any, Any]:
        env = Recorder(space)
        return env if is_vectorised else TransformAction(env, overwrite, space)

    door = make_environments(TransformVectorAction(SyncVectorEnv([factory]), overwrite) if is_vectorised else factory)
    chosen = tree_map(lambda leaf: np.ones((1, *leaf.shape), leaf.dtype), space_tree(space))
    native = door.codec.to_env(chosen)
    door.reset(seed=0)
    door.step(chosen)
    assert all((leaf == 1).all() for _, leaf in leaves(chosen))

    # And what is recorded is what was taken.
    recording = door.recordings()[0]
    if not is_vectorised:
        assert recording is not None
        assert recording.actions.tobytes() == b"".join(leaf.tobytes() for _, leaf in leaves(native))


# Seeds.

SEEDABLE: dict[str, Callable[[], Any]] = {
    "factories": lambda: [Random] * 3,
    "SyncVectorEnv": lambda: SyncVectorEnv([Random] * 3),
    "DummyVecEnv": lambda: DummyVecEnv([Random] * 3),
    "hand-made VecEnv": lambda: ShapedVecEnv([Random] * 3),
}


def observed(door: Environments, seed: int | None) -> np.ndarray:
    """Of the first four steps: (4, n)."""
    rows = [door.reset(seed=seed)]
    rows += [door.step(np.zeros(door.num_envs, int)).obs for _ in range(3)]
    return np.stack(rows)[..., 0]


@pytest.mark.parametrize("kind", SEEDABLE)
def test_a_seed_fixes_what_is_observed(kind: str) -> None:
    door, other = make_environments(SEEDABLE[kind]()), make_environments(SEEDABLE[kind]())
    first = observed(door, seed=3)
    np.testing.assert_array_equal(observed(other, seed=3), first)
    np.testing.assert_array_equal(observed(door, seed=3), first)
    # Without a seed, the generators go on.
    assert not np.isin(observed(door, seed=None), first).any()


@pytest.mark.parametrize("kind", SEEDABLE)
def test_no_two_environments_share_a_seed_even_between_runs_with_adjacent_seeds(kind: str) -> None:
    door = make_environments(SEEDABLE[kind]())
    first = np.stack([door.reset(seed=seed)[:, 0] for seed in range(20)])
    assert len(np.unique(first)) == first.size

    # Counting on from the seed, as vector environments do by themselves, makes runs overlap.
    env = SyncVectorEnv([Random] * 3)
    assert env.reset(seed=0)[0][1] == env.reset(seed=1)[0][0]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_natively_vectorised_environment_is_seeded() -> None:
    door = make_environments(native_cartpole(100))
    first = door.reset(seed=3)
    assert len(np.unique(first)) == first.size
    np.testing.assert_array_equal(door.reset(seed=3), first)
    assert not np.isin(door.reset(seed=4), first).any()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_envpool_has_no_gymnasium_id() -> None:
    assert make_environments(envpool_cartpole(10)).env_id is None


def test_a_reset_of_some_environments_leaves_the_others_where_they_are() -> None:
    env = make_environments("CartPole-v1", n_envs=2).env
    env.reset(seed=0)
    obs = env.step(np.array([0, 1]))[0]
    after, _ = env.reset(options={"reset_mask": np.array([True, False])})
    np.testing.assert_array_equal(after[1], obs[1])
    assert not np.array_equal(after[0], obs[0])

"""The command line, run as a user runs it: in a folder of its own, judged by what it prints, returns and leaves."""

from __future__ import annotations

import csv
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import gymnasium
import numpy as np
import pygame
import pytest
import torch
from gymnasium import spaces
from gymnasium.envs.classic_control import CartPoleEnv
from gymnasium.envs.registration import EnvSpec
from PIL import Image

from sbac import A2C, evaluate_policy, load
from sbac.cli import main


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A finished short run of A2C."""
    assert main(["train", "--steps", "2000", "--out", "run", "--eval-episodes", "2"]) == 0
    return folder / "run"


def test_train_leaves_one_folder_with_everything(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {path.name for path in run.iterdir()}
    assert names >= {
        "model.zip",
        "best_model.zip",
        "config.json",
        "progress.csv",
        "evaluations.npz",
        "learning_curve.png",
    }
    assert any(name.startswith("events.out.tfevents") for name in names)

    config = json.loads((run / "config.json").read_text())
    assert (config["algorithm"], config["env"], config["seed"], config["steps"]) == ("A2C", "CartPole-v1", 0, 2000)
    assert config["arguments"] == {"n_envs": 8}  # from the recipe
    assert load(run / "model.zip").num_timesteps == 2000
    history = np.load(run / "evaluations.npz")
    assert history["timesteps"].tolist() == list(range(96, 2000, 96))  # a twentieth, in whole steps of 8
    assert history["results"].shape == (20, 2)
    assert Image.open(run / "learning_curve.png").size[0] > 400
    printed = capsys.readouterr().out
    assert "n_envs=8" in printed
    assert "return over 20 episodes" in printed


def test_progress_ends_at_100_percent(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("train --steps 50 --n-envs 8 --out run --eval-freq 0".split()) == 0
    assert "A2C: 100 %  56/50 steps" in capsys.readouterr().out


def test_default_folders_are_numbered(folder: Path) -> None:
    for _ in range(2):
        assert main(["train", "--steps", "16", "--eval-episodes", "1"]) == 0
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["A2C_CartPole-v1_1", "A2C_CartPole-v1_2"]


def test_runs_that_start_at_once_have_folders_of_their_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir = Path.mkdir

    def late(path: Path, *arguments: Any, **keywords: Any) -> None:
        """Another run takes the first number just before this one does."""
        if path.name.endswith("_1"):
            mkdir(path, parents=True)
        mkdir(path, *arguments, **keywords)

    monkeypatch.setattr(Path, "mkdir", late)
    assert main("train --steps 16 --eval-freq 0".split()) == 0
    assert list((folder / "runs/A2C_CartPole-v1_1").iterdir()) == []
    assert (folder / "runs/A2C_CartPole-v1_2/model.zip").exists()


def test_commands_that_are_suggested_can_be_typed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--steps", "16", "--eval-freq", "0", "--out", "it's a run"]) == 0
    suggested = capsys.readouterr().out.split("see it: ")[1].split("    ")[0]
    assert shlex.split(suggested) == ["sbac", "watch", "it's a run"]


def test_an_empty_folder_may_be_the_runs(folder: Path) -> None:
    (folder / "run").mkdir()
    assert main("train --steps 16 --eval-freq 0 --out run".split()) == 0
    assert (folder / "run/model.zip").exists()


def test_a_preset_takes_the_place_of_the_recipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "train td3 Pendulum-v1 --steps 5 --out run --eval-freq 0 --set preset=paper".split()
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "hyperparameters: preset='paper'; the preset takes the place of the recipe\n" in printed
    model = load("run/model.zip")
    assert (model.batch_size, model.gamma) == (100, 0.99)  # the paper's; the recipe has 0.98


def test_an_id_without_a_version_has_its_recipe(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("train a2c CartPole --steps 16 --eval-freq 0".split()) == 0
    assert "A2C on CartPole-v1: 16 steps, seed 0\nhyperparameters: n_envs=8\n" in capsys.readouterr().out
    assert load("runs/A2C_CartPole-v1_1/model.zip").n_envs == 8


def test_a_missing_recipe_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "train a2c Acrobot-v1 --steps 16 --eval-freq 0".split()
    assert main(words) == 0
    assert "hyperparameters: no recipe for Acrobot-v1: the defaults\n" in capsys.readouterr().out
    assert main([*words, "--set", "gamma=0.9"]) == 0
    assert "hyperparameters: gamma=0.9; no recipe for Acrobot-v1: the defaults\n" in capsys.readouterr().out
    assert main([*words, "--no-recipe"]) == 0
    assert "hyperparameters: none but the defaults\n" in capsys.readouterr().out


def test_set_overrides_the_recipe(folder: Path) -> None:
    arguments = [
        "--set gamma=0.5",
        "--set policy_kwargs.net_arch=[16,8]",
        "--set action_noise.kind=ornstein_uhlenbeck",
        "--set action_noise.sigma=0.4",
        "--set action_noise.theta=0.3",
        "--set critic_learning_rate=lin_0.01",
        "--set max_grad_norm=none",
    ]
    words = " ".join(["train ddpg Pendulum-v1 --steps 20 --out run --eval-episodes 1", *arguments]).split()
    assert main(words) == 0
    model = load("run/model.zip")
    assert model.gamma == 0.5
    assert model.policy_kwargs == {"net_arch": [16, 8]}
    assert model.action_noise.to_config()["kind"] == "ornstein_uhlenbeck"
    assert model.action_noise.sigma == 0.4
    assert model.action_noise.theta == 0.3
    assert model.critic_learning_rate(0.5) == 0.005
    assert model.max_grad_norm is None
    assert model.batch_size == 256  # still the recipe's


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("train a3d CartPole-v1", ["unknown algorithm 'a3d'", "'a3c'"]),
        ("train a2c CartPol-v1", ["unknown environment 'CartPol-v1'", "'CartPole-v1'"]),
        ("train a2c CartPole-v1 --policy MlpPolcy", ["no policy 'MlpPolcy'", "'MlpPolicy'"]),
        ("train a2c CartPole-v1 --set gama=0.9", ["no argument 'gama'", "'gamma'"]),
        ("train a2c CartPole-v1 --set gamma=1.5", ["gamma", "at most 1", "1.5"]),
        ("train a2c CartPole-v1 --set gamma", ["NAME=VALUE", "'gamma'"]),
        ("train a2c CartPole-v1 --set seed=3", ["--set seed=", "use --seed"]),
        ("train a2c CartPole-v1 --set verbose=abc", ["--set verbose=", "use --verbose"]),
        ("train a2c CartPole-v1 --set n_timesteps=9", ["--set n_timesteps=", "use --steps"]),
        ("train a2c CartPole-v1 --set tensorboard_log=tb", ["--set tensorboard_log=", "event files"]),
        ("train a2c CartPole-v1 --set stats_window_size=abc", ["stats_window_size", "'abc'"]),
        ("train a2c CartPole-v1 --set rollout_buffer_class=abc", ["--set rollout_buffer_class=", "from Python only"]),
        ("train td3 Pendulum-v1 --set preset=papre", ["no preset 'papre'", "'paper'"]),
        ("train a2c CartPole-v1 --set policy_kwargs.net_arc=[8]", ["'net_arc'", "'net_arch'"]),
        ("train ddpg CartPole-v1", ["Discrete(2)", "DDPG"]),
        ("train a2c CartPole-v1 --steps -3", ["--steps", "-3"]),
        ("train a2c CartPole-v1 --device gpu9", ["device", "gpu9"]),
        ("train ddpg Pendulum-v1 --set buffer_size=1e13", ["buffer_size", "memory"]),
        ("train a2c CartPole-v1 --set n_steps=1e12", ["allocate", "1000000000000"]),
        ("train a2c CartPole-v1 --eval-episodes 0", ["--eval-episodes", "at least 1", "0"]),
        ("train a2c CartPole-v1 --eval-freq -5", ["--eval-freq", "at least 0", "-5"]),
        ("eval nothing.zip", ["nothing.zip"]),
        ("eval nothing.zip --episodes 0", ["--episodes", "at least 1", "0"]),
        ("watch nothing.zip --episodes 0", ["--episodes", "at least 1", "0"]),
        ("inspect nothing.zip", ["nothing.zip"]),
        ("plot nothing", ["nothing"]),
    ],
)
def test_bad_input_is_one_clear_line_and_leaves_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], words: str, parts: list[str]
) -> None:
    assert main(words.split()) == 2
    errors = capsys.readouterr().err.strip()
    assert len(errors.splitlines()) == 1
    assert all(part in errors for part in parts), errors
    assert list(folder.iterdir()) == []


def test_a_device_that_this_torch_lacks_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("train a2c CartPole-v1 --device cuda:99".split()) == 2
    errors = capsys.readouterr().err.strip()
    assert errors.startswith("sbac train: device")
    assert "'cuda:99'" in errors
    assert len(errors.splitlines()) == 1
    assert list(folder.iterdir()) == []


def test_a_file_in_place_of_a_folder_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "file").write_text("mine")
    assert main("train a2c CartPole-v1 --out file/sub".split()) == 2
    errors = capsys.readouterr().err.strip()
    assert "Not a directory" in errors
    assert "file/sub" in errors
    assert len(errors.splitlines()) == 1
    assert (folder / "file").read_text() == "mine"


def test_eval_freq_0_never_evaluates(folder: Path) -> None:
    assert main("train a2c CartPole-v1 --steps 800 --out run --eval-freq 0".split()) == 0
    names = {path.name for path in (folder / "run").iterdir()}
    assert "model.zip" in names
    assert not names & {"best_model.zip", "evaluations.npz"}


def test_set_changes_one_entry_of_a_recipes_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "train ddpg Pendulum-v1 --steps 5 --out run --eval-episodes 1 --set action_noise.sigma=0.3".split()
    assert main(words) == 0
    assert load("run/model.zip").action_noise.to_config() == {
        "kind": "normal",
        "mean": 0.0,
        "sigma": 0.3,
        "dtype": "float32",
    }
    assert "NormalActionNoise(mean=0.0, sigma=0.3)" in capsys.readouterr().out


def test_an_existing_folder_is_not_touched(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*.*")}
    assert main(["train", "--steps", "50", "--out", "run"]) == 2
    assert "--out run exists already" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*.*")} == before


def test_eval_reads_the_best_model_of_a_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["eval", "run", "--episodes", "3"]) == 0
    printed = capsys.readouterr().out
    assert "run/best_model.zip on CartPole-v1, 3 episodes" in printed
    assert main(["eval", "run/model.zip", "--env", "Pendulum-v1"]) == 2
    errors = capsys.readouterr().err
    assert "Discrete(2)" in errors or "Box" in errors


def test_watch_writes_films(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    assert main(["watch", "run", "--episodes", "2", "--video", "films/run.gif"]) == 0
    printed = capsys.readouterr().out
    steps = [int(line.split(", ")[1].split()[0]) for line in printed.splitlines() if line.startswith("episode ")]
    assert len(steps) == 2
    film = Image.open("films/run.gif")
    milliseconds = 0
    for frame in range(film.n_frames):  # equal neighbours are one frame that lasts longer
        film.seek(frame)
        milliseconds += film.info["duration"]
    assert milliseconds == 20 * sum([*steps, 1, 1])  # CartPole renders 50 frames a second, and each end is shown
    assert main(["watch", "run", "--episodes", "1", "--video", "run.mp4"]) == 0
    assert Path("run.mp4").stat().st_size > 1000
    assert main(["watch", "run", "--video", "run.avi"]) == 2
    assert main(["watch", "run", "--episodes", "1"]) == 0  # a window, on a screen that nobody sees


def test_a_run_knows_the_module_that_registers_its_environment(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "own.py").write_text(
        "import gymnasium\n"
        "from gymnasium.envs.classic_control import CartPoleEnv\n"
        "gymnasium.register('Own-v0', entry_point=CartPoleEnv, max_episode_steps=9)\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(folder)
    try:
        assert main(["train", "a2c", "own:Own-v0", "--steps", "20", "--out", "run"]) == 0
        gymnasium.registry.pop("Own-v0")  # as in a new process
        sys.modules.pop("own")
        assert main(["eval", "run", "--episodes", "1"]) == 0
        assert "on own:Own-v0" in capsys.readouterr().out
    finally:
        gymnasium.registry.pop("Own-v0", None)
        sys.modules.pop("own", None)
    (folder / "run" / "config.json").unlink()
    assert main(["eval", "run", "--env", "CartPole-v1", "--episodes", "1"]) == 0


def test_a_models_file_lets_no_module_run(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "trap.py").write_text("raise SystemExit('it ran')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    A2C("MlpPolicy", "CartPole-v1", seed=0).save("model")
    monkeypatch.setattr("sbac.cli.inspect", lambda file: {"config": {"env_id": "trap:CartPole-v1"}})
    for command in ("eval", "watch"):
        assert main([command, "model.zip"]) == 2
        assert "if you trust it, add --env trap:CartPole-v1" in capsys.readouterr().err


def test_watch_answers_an_environment_that_there_is_not(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", "run", "--env", "Nowhere-v0", "--video", "film.gif"]) == 2
    told = capsys.readouterr().err  # Gymnasium may suggest another, among those that are installed
    assert told.startswith("sbac watch: Environment `Nowhere` doesn't exist.") and told.count("\n") == 1


class Rendered(gymnasium.Env[np.ndarray, Any]):
    """Six steps in which the reward tells the action; one action after the other is allowed, if `masks`."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 4}
    observation_space = spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, masks: bool, render_mode: str | None = None) -> None:
        self.masks, self.render_mode = masks, render_mode
        self.action_space = spaces.Discrete(3) if masks else spaces.Box(-1e6, 1e6, (1,), np.float32)
        self.now = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.now = 0
        return self.seen()

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        reward = float(action == self.now % 3) if self.masks else float(action[0])
        self.now += 1
        return self.seen()[0], reward, self.now == 6, False, self.seen()[1]

    def seen(self) -> tuple[np.ndarray, dict[str, Any]]:
        allowed = {"action_mask": np.arange(3) == self.now % 3} if self.masks else {}
        return np.array([np.sin(self.now), 1], np.float32), allowed

    def render(self) -> Any:
        return np.zeros((16, 16, 3), np.uint8)


@pytest.mark.parametrize("masks", [True, False], ids=["masks", "memory"])
def test_watch_shows_the_policy_with_its_masks_and_its_memory(
    masks: bool, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = EnvSpec("Rendered-v0", entry_point=Rendered, kwargs={"masks": masks})
    monkeypatch.setitem(gymnasium.registry, "Rendered-v0", spec)
    model = A2C("MlpPolicy" if masks else "MlpLstmPolicy", "Rendered-v0", seed=0)
    model.save("model")
    expected, _ = evaluate_policy(model, "Rendered-v0", n_eval_episodes=1)
    assert main(["watch", "model.zip", "--video", "film.gif", "--episodes", "2"]) == 0
    printed = capsys.readouterr().out
    assert printed.count(f"return {expected:.2f}, 6 steps") == 2, (printed, expected)
    assert expected == 6 if masks else abs(expected) > 1


def test_watch_ends_when_its_window_is_closed(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    pygame.display.init()
    pygame.event.post(pygame.event.Event(pygame.QUIT))
    assert main(["watch", "run", "--episodes", "3"]) == 0
    assert "episode 1" not in capsys.readouterr().out
    assert not pygame.display.get_init(), "closed again"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have a display of their own")
def test_watch_ends_on_sigterm_and_says_where_nothing_is_seen(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    code = (
        "import gymnasium, sys; from sbac import cli\n"
        "step = gymnasium.wrappers.TimeLimit.step\n"
        "def told(self, action): print('steps', flush=True); return step(self, action)\n"
        "gymnasium.wrappers.TimeLimit.step = told\n"
        "sys.exit(cli.main(['watch', 'run', '--episodes', '1000']))"
    )
    with _python("-c", code, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as watcher:
        assert watcher.stdout is not None and watcher.stderr is not None
        assert watcher.stdout.readline() == "steps\n"
        watcher.terminate()
        assert watcher.wait(20) == -signal.SIGTERM
        assert "there is no display here" in watcher.stderr.read()


def test_plot_and_inspect(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", "run", "--out", "curve.png"]) == 0
    assert Image.open("curve.png").size[0] > 400
    capsys.readouterr()
    assert main(["inspect", "run/model.zip"]) == 0
    printed = capsys.readouterr().out
    assert "A2C, format 1" in printed
    assert "policy/action_net.weight (2, 64) float32" in printed
    assert "full checkpoint: yes" in printed
    assert "actions Discrete(2)" in printed and "policy = 'MlpPolicy'" in printed
    assert main(["inspect", "run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["env_id"] == "CartPole-v1"


def test_a_run_that_another_process_trains_is_left_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also the model that it left, and its log."""
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    code = (
        "import sys; from pathlib import Path; from sbac.hold import Hold\n"
        "with Hold(Path('run/checkpoints/.model.lock'), ''): print('held', flush=True); sys.stdin.read()"
    )
    with _python("-c", code, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        assert main(["train", "--resume", "run", "--steps", "9000"]) == 2
        assert "another process is writing checkpoints" in capsys.readouterr().err
        holder.communicate("")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_that_cannot_be_taken_over_keeps_its_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "model.zip").read_bytes()
    for path in (run / "checkpoints").iterdir():
        path.write_bytes(b"")
    with pytest.warns(UserWarning, match="cannot be resumed from"):
        assert main(["train", "--resume", "run", "--steps", "9000"]) == 2
    assert "can be resumed from" in capsys.readouterr().err
    assert (run / "model.zip").read_bytes() == before


def test_inspect_shows_an_object_of_the_users_own_as_it_lies_in_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Own(torch.nn.Tanh):
        pass

    A2C("MlpPolicy", "CartPole-v1", policy_kwargs={"activation_fn": Own}).save(tmp_path / "own")
    assert main(["inspect", str(tmp_path / "own.zip")]) == 0
    printed = capsys.readouterr().out
    assert 'policy_kwargs = {"activation_fn": {"__object__"' in printed and "of the user's own: yes" in printed


class _Failing(gymnasium.Env[np.ndarray, np.ndarray]):
    """Sends NaN at its 30th step."""

    observation_space = gymnasium.spaces.Box(-1, 1, (2,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))
    steps = 0

    def reset(self, **kwargs: object) -> tuple[np.ndarray, dict[str, object]]:
        return np.zeros(2, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, object]]:
        self.steps += 1
        return np.zeros(2, np.float32), float("nan") if self.steps == 30 else 0.0, False, False, {}


def test_a_failing_environment_is_named_and_the_model_saved(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gymnasium.register("Failing-v0", entry_point=_Failing, max_episode_steps=5)
    try:
        assert main("train a2c Failing-v0 --steps 100 --out run --eval-episodes 1 --eval-freq 1000".split()) == 1
    finally:
        gymnasium.registry.pop("Failing-v0")
    errors = capsys.readouterr().err
    assert "environment 0" in errors
    assert "step 30" in errors
    assert "run/model.zip" in errors
    model = load("run/model.zip")
    assert model.num_timesteps == 29
    assert all(np.isfinite(tensor.numpy()).all() for tensor in model.policy.state_dict().values())


class _Pressing(gymnasium.Env[np.ndarray, np.ndarray]):
    """Presses Ctrl-C at some of its steps, which are counted over all its instances; its episodes take 5."""

    observation_space = gymnasium.spaces.Box(-1, 1, (2,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))
    presses: tuple[int, ...] = ()
    steps = 0

    def reset(self, **kwargs: object) -> tuple[np.ndarray, dict[str, object]]:
        return np.zeros(2, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, object]]:
        _Pressing.steps += 1
        for _ in range(self.presses.count(self.steps)):
            _press()
        return np.zeros(2, np.float32), 0.0, False, False, {}


def _press(*_: object, **__: object) -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.fixture
def pressing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Pressing]]:
    monkeypatch.setattr(_Pressing, "steps", 0)
    monkeypatch.setattr(_Pressing, "presses", ())
    gymnasium.register("Pressing-v0", entry_point=_Pressing, max_episode_steps=5)
    yield _Pressing
    gymnasium.registry.pop("Pressing-v0")


PRESSING = "train a2c Pressing-v0 --steps 40 --out run --eval-episodes 1".split()


def test_ctrl_c_stops_at_the_next_step_saves_and_says_where(
    pressing: type[_Pressing], capfd: pytest.CaptureFixture[str]
) -> None:
    pressing.presses = (12,)
    assert main([*PRESSING, "--eval-freq", "0"]) == 130
    printed, errors = capfd.readouterr()
    assert errors.startswith("stopping at the next step")
    assert "(again: at once)" in errors
    assert "stopped at step 12; the model is in run/model.zip" in printed
    assert load("run/model.zip").num_timesteps == 12
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_during_an_evaluation_is_answered_at_once(
    pressing: type[_Pressing], capfd: pytest.CaptureFixture[str]
) -> None:
    pressing.presses = (12,)  # in the evaluation after the tenth step of training
    assert main([*PRESSING, "--eval-freq", "10"]) == 130
    assert capfd.readouterr().err.startswith("stopping at the next step")
    assert pressing.steps == 15
    assert load("run/model.zip").num_timesteps == 10


def test_a_second_ctrl_c_ends_at_once_and_saves(pressing: type[_Pressing], capfd: pytest.CaptureFixture[str]) -> None:
    pressing.presses = (12, 13, 13, 13)
    assert main([*PRESSING, "--eval-freq", "10", "--eval-episodes", "100"]) == 130
    printed, errors = capfd.readouterr()
    assert len(errors.strip().splitlines()) == 1
    assert "stopped at step 10; the model is in run/model.zip" in printed
    assert pressing.steps == 13  # of an evaluation of five hundred
    assert load("run/model.zip").num_timesteps == 10


def test_nothing_interrupts_saving(
    pressing: type[_Pressing], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = A2C.save

    def pressed(*arguments: Any, **keywords: Any) -> None:
        _press()
        _press()
        save(*arguments, **keywords)

    monkeypatch.setattr(A2C, "save", pressed)
    assert main([*PRESSING, "--eval-freq", "0", "--checkpoint-freq", "0"]) == 130
    printed, errors = capfd.readouterr()
    assert errors.splitlines() == ["saving the model first"] * 2
    assert "the model is in run/model.zip" in printed
    assert load("run/model.zip").num_timesteps == 40


@pytest.mark.parametrize("function", ["plot_learning_curve", "evaluate_policy"])
def test_ctrl_c_after_the_training_keeps_the_model(
    pressing: type[_Pressing], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    monkeypatch.setattr(f"sbac.cli.{function}", _press)
    assert main(PRESSING) == 130
    printed, errors = capfd.readouterr()
    assert errors == ""
    assert printed.splitlines()[-1] == "interrupted; the model is in run/model.zip"
    assert load("run/model.zip").num_timesteps == 40


def test_ctrl_c_ends_the_other_commands_with_one_line(
    pressing: type[_Pressing], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(PRESSING) == 0
    monkeypatch.setattr("sbac.cli.plot_learning_curve", _press)
    monkeypatch.setattr("sbac.cli.check_film", _press)
    capfd.readouterr()
    for words in ("eval run", "watch run --video film.gif", "plot run", "inspect run"):
        if words.startswith("eval"):
            pressing.presses = (pressing.steps + 3,)
        if words.startswith("inspect"):
            monkeypatch.setattr("sbac.cli.inspect", _press)
        assert main(words.split()) == 130
        assert capfd.readouterr() == ("", f"sbac {words.split()[0]}: interrupted\n")


def rows(folder: Path) -> list[str]:
    """The rows of the log without the columns that tell the time."""
    with (folder / "progress.csv").open() as file:
        return [
            str({name: cell for name, cell in row.items() if name not in ("time/fps", "time/time_elapsed")})
            for row in csv.DictReader(file)
        ]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_is_resumed_as_if_it_had_never_stopped(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    words = "train a2c CartPole-v1 --steps 700 --n-envs 2 --eval-freq 100 --eval-episodes 1".split()
    assert main([*words, "--out", "whole"]) == 0
    steps = itertools.count(1)
    step = CartPoleEnv.step

    def stepping(env: CartPoleEnv, action: Any) -> Any:
        if next(steps) == 555:  # of training and evaluations together
            signal.raise_signal(number)
        return step(env, action)

    monkeypatch.setattr(CartPoleEnv, "step", stepping)
    assert main([*words, "--out", "stopped"]) == code
    stopped_at = load("stopped/model.zip").num_timesteps
    assert 0 < stopped_at < 700
    assert "go on: sbac train --resume stopped" in capfd.readouterr().out
    assert {path.name for path in Path("stopped/checkpoints").iterdir()} >= {f"model_{stopped_at}_steps.zip"}
    assert main("train --resume stopped".split()) == 0
    assert f"at step {stopped_at}" in capfd.readouterr().out

    whole, stopped = load("whole/model.zip"), load("stopped/model.zip")
    assert stopped.num_timesteps == 700
    assert torch.equal(whole.policy.flat, stopped.policy.flat)
    assert rows(Path("whole")) == rows(Path("stopped"))
    ours, theirs = dict(np.load("whole/evaluations.npz")), dict(np.load("stopped/evaluations.npz"))
    assert all(np.array_equal(ours[key], theirs[key]) for key in ours)
    assert json.loads(Path("whole/config.json").read_text()) == json.loads(Path("stopped/config.json").read_text())
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_finished_run_goes_on_with_more_steps(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main("train --resume run --steps 2400 --device cpu".split()) == 0
    assert "resumed from run/checkpoints/model_" in capsys.readouterr().out
    assert load("run/model.zip").num_timesteps == 2400
    assert json.loads((run / "config.json").read_text())["steps"] == 2400


def test_a_run_without_checkpoints_is_resumed_from_its_beginning(run: Path) -> None:
    before = rows(run), load("run/model.zip").policy.flat
    shutil.rmtree(run / "checkpoints")
    assert main("train --resume run".split()) == 0
    assert rows(run) == before[0], "what was there is not continued but replaced"
    assert torch.equal(load("run/model.zip").policy.flat, before[1])


def test_resume_takes_no_other_options_and_needs_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        ("--resume run --seed 3", "only --steps, --device and --verbose can be given beside it, not seed"),
        ("td3 Pendulum-v1 --resume run", "not algorithm, env"),
        ("--resume other", "no config.json in it: is it the folder of a run?"),
    ):
        assert main(["train", *words.split()]) == 2
        assert message in capsys.readouterr().err
    (run / "config.json").write_text("{}")
    assert main("train --resume run".split()) == 2
    assert "does not describe a run: KeyError('algorithm')" in capsys.readouterr().err


def _process(*words: str, **keywords: Any) -> subprocess.Popen[str]:
    return _python("-m", "sbac", *words, **keywords)


def _python(*words: str, **keywords: Any) -> subprocess.Popen[str]:
    own = {"PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, *words], env={**os.environ, **own}, text=True, **keywords)


def test_ctrl_c_in_a_process_leaves_no_traceback(folder: Path) -> None:
    words = "train --steps 10000000 --out run --eval-freq 0".split()
    process = _process(*words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    while not process.stdout.readline().startswith("folder"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 130, printed
    assert "Traceback" not in printed
    load("run/model.zip")


def test_a_second_sigterm_ends_the_process_at_once(folder: Path) -> None:
    frequencies = "--checkpoint-freq 1 --eval-freq 2 --eval-episodes 1000000"
    words = f"train ddpg Pendulum-v1 --steps 10000000 --out run {frequencies}".split()
    process = _process(*words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    while not Path("run/checkpoints/model_1_steps.zip").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)  # during an evaluation that takes for ever
    while "again: at once" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 143, printed
    assert "Traceback" not in printed
    load("run/model.zip")


def test_a_reader_who_leaves_does_not_end_a_training(folder: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = _process(
        *"train --steps 400 --out run --verbose --eval-episodes 1".split(), stdout=writing, stderr=writing
    )
    os.close(writing)
    assert process.wait(timeout=60) == 0
    assert load("run/model.zip").num_timesteps == 400

    reading, writing = os.pipe()
    os.close(reading)
    process = _process("inspect", "run", stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")


def test_python_m_sbac_is_the_command() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-m", "sbac", "--version"], env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("sbac ")


def test_the_manual_shows_the_help_that_there_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["--help"])
    page = (Path(__file__).parent.parent / "docs" / "guide" / "command-line.md").read_text(encoding="utf-8")
    assert f"$ sbac --help\n{capsys.readouterr().out}```" in page

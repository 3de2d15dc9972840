"""The command line: ``sbac train | eval | watch | plot | inspect | convert``, also as ``python -m sbac``."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shlex
import sys
import tomllib
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, TextIO

import gymnasium
import numpy as np

import sbac
from sbac.base import BaseAlgorithm
from sbac.callbacks import BaseCallback, CheckpointCallback, EvalCallback
from sbac.codec import decode, encode
from sbac.envs import make_environments
from sbac.evaluation import evaluate_policy
from sbac.guards import EnvironmentFault, NotFiniteError, WorkerFault, require_whole
from sbac.interruption import Interruption, interruption
from sbac.loading import ALGORITHMS, algorithm, convert, inspect, load
from sbac.logger import configure
from sbac.observations import MASK, carries_mask, n_choices
from sbac.plotting import plot_learning_curve
from sbac.recipes import read_recipe, read_value, registered_id
from sbac.resume import folders_held
from sbac.video import check_film, write_video
from sbac.window import is_window_closed, ready_window

DEFAULT_ALGORITHM, DEFAULT_ENV = "a2c", "CartPole-v1"
DEFAULT_STEPS = 100_000  # where neither --steps nor a recipe says how long
OPTIONS_OF_THEIR_OWN = {
    "env": "name the environment after the algorithm",
    "policy": "use --policy",
    "seed": "use --seed",
    "device": "use --device",
    "verbose": "use --verbose",
    "n_timesteps": "use --steps",
    "tensorboard_log": "the folder of the run holds event files as it is; use --out",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: As typed after ``sbac``; those of the process by default.

    Returns:
        The exit code: 0, 1 (training failed, its model is saved), 2 (bad input), 130 or 143 (interrupted by
        Ctrl-C or SIGTERM).
    """
    options = _parser().parse_args(arguments)
    with redirect_stdout(_Output(sys.stdout)), redirect_stderr(_Output(sys.stderr)):
        try:
            code: int = options.command(options)
        except (ValueError, TypeError, OSError, MemoryError, ImportError, gymnasium.error.Error) as error:
            print(f"sbac {options.name}: {str(error) or 'out of memory'}", file=sys.stderr)
            code = 2
        except (EnvironmentFault, NotFiniteError, WorkerFault) as error:
            print(f"sbac {options.name}: {error}", file=sys.stderr)
            code = 1
        except KeyboardInterrupt as error:
            print(f"sbac {options.name}: interrupted", file=sys.stderr)
            code = error.args[0] if error.args else 130
        sys.stdout.flush()
        return code


class _Output:
    """A stream that turns silent once nobody reads on, as in ``sbac train | head``: no reason to end a training."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._silence()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._silence()

    def _silence(self) -> None:
        """What is still in the stream's own buffer goes nowhere too, also when Python exits."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sbac", description="Actor-critic reinforcement learning: train, evaluate, watch, plot, inspect, convert."
    )
    parser.add_argument("--version", action="version", version=f"sbac {sbac.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a policy; without arguments, A2C on CartPole-v1")
    train.set_defaults(command=_train, name="train")
    train.add_argument("algorithm", nargs="?", default=DEFAULT_ALGORITHM, help=f"{', '.join(ALGORITHMS)}")
    train.add_argument("env", nargs="?", default=DEFAULT_ENV, help="id of a Gymnasium environment")
    train.add_argument("--steps", type=float, help="transitions to train for, over all environments")
    train.add_argument("--n-envs", type=int, help="environments stepped together")
    train.add_argument("--seed", type=int, default=0, help="fixes every random number (default 0)")
    train.add_argument("--policy", default="MlpPolicy", help="name of the policy (default MlpPolicy)")
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any argument of the algorithm: --set gamma=0.98 --set policy_kwargs.net_arch=[64,64]",
    )
    train.add_argument("--out", type=Path, help="folder of the run; must not exist (default runs/ALGO_ENV_1, _2, ...)")
    train.add_argument(
        "--eval-freq", type=int, help="transitions between evaluations; 0: none (default: a twentieth of the steps)"
    )
    train.add_argument("--eval-episodes", type=int, default=10, help="episodes of each evaluation (default 10)")
    train.add_argument(
        "--checkpoint-freq",
        type=int,
        help="transitions between checkpoints, the last two are kept; 0: none (default: a twentieth of the steps)",
    )
    train.add_argument(
        "--resume", type=Path, metavar="RUN", help="go on in the folder of a run, from its newest checkpoint"
    )
    train.add_argument("--device", default="auto", help="cpu, cuda, ... (default auto)")
    train.add_argument("--no-recipe", action="store_true", help="leave the tuned values aside")
    train.add_argument("--verbose", action="store_true", help="print the table of the log as it grows")

    evaluate = commands.add_parser("eval", help="measure a model's return over whole episodes")
    evaluate.set_defaults(command=_eval, name="eval")
    evaluate.add_argument("--episodes", type=int, default=100, help="how many (default 100)")
    evaluate.add_argument("--n-envs", type=int, default=1, help="environments stepped together (default 1)")

    watch = commands.add_parser("watch", help="see a model act, in a window or as a film")
    watch.set_defaults(command=_watch, name="watch")
    watch.add_argument("--episodes", type=int, default=3, help="how many (default 3)")
    watch.add_argument("--video", type=Path, metavar="FILE", help="write a .gif or .mp4 instead of opening a window")

    for command in (evaluate, watch):
        command.add_argument("model", type=Path, help="a model file, or the folder of a run")
        command.add_argument("--env", help="id of the environment (default: the one trained in)")
        command.add_argument("--seed", type=int, default=0, help="of the environment (default 0)")
        command.add_argument("--stochastic", action="store_true", help="draw actions instead of the most probable ones")
        command.add_argument("--device", default="auto", help="cpu, cuda, ... (default auto)")

    plot = commands.add_parser("plot", help="draw learning curves; runs that differ by seed become one with a band")
    plot.set_defaults(command=_plot, name="plot")
    plot.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, or a folder of such folders")
    plot.add_argument("--out", type=Path, help="the picture (default: learning_curve.png in the first folder)")
    plot.add_argument("--title", help="above the picture")

    describe = commands.add_parser("inspect", help="tell what is in a model file; executes nothing from it")
    describe.set_defaults(command=_inspect, name="inspect")
    describe.add_argument("model", type=Path, help="a model file, or the folder of a run")
    describe.add_argument("--json", action="store_true", help="as JSON, complete")

    change = commands.add_parser("convert", help="make a model file of one of Stable-Baselines3's; runs none of it")
    change.set_defaults(command=_convert, name="convert")
    change.add_argument("model", type=Path, help="the zip file of an A2C, DDPG or TD3 of Stable-Baselines3")
    change.add_argument("out", type=Path, help="the model file to write")
    change.add_argument("--vecnormalize", type=Path, metavar="FILE", help="what VecNormalize.save wrote beside it")
    return parser


# Train.


def _train(options: argparse.Namespace) -> int:
    # Everything is checked before the folder is made.
    begun = None if options.resume is None else _begun(options)
    cls = algorithm(options.algorithm)
    options.env = registered_id(options.env)
    arguments, remark = _hyperparameters(options) if begun is None else (begun, "")
    recommended = arguments.pop("n_timesteps", DEFAULT_STEPS)
    steps = require_whole("--steps", recommended if options.steps is None else options.steps, 1)
    twentieth = max(steps // 20, 1)
    eval_freq = require_whole("--eval-freq", twentieth if options.eval_freq is None else options.eval_freq, 0)
    n_eval_episodes = require_whole("--eval-episodes", options.eval_episodes, 1)
    save_freq = twentieth if options.checkpoint_freq is None else options.checkpoint_freq
    save_freq = require_whole("--checkpoint-freq", save_freq, 0)
    model = cls(options.policy, options.env, seed=options.seed, device=options.device, **arguments)

    with interruption() as stop:
        folder = options.resume or _new_folder(options.out, cls.__name__, options.env)
        told = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        print(f"{cls.__name__} on {options.env}: {steps:,} steps, seed {options.seed}")
        print("hyperparameters:", "; ".join(filter(None, (told, remark))) or "none but the defaults")
        print(f"folder: {folder}")
        stop.checkpoints = CheckpointCallback(
            max(save_freq // model.n_envs, 1) if save_freq else sys.maxsize,
            folder / "checkpoints",
            "model",
            keep_last=2,
        )
        with folders_held(stop.checkpoints):
            frequencies = {"eval_freq": eval_freq, "eval_episodes": n_eval_episodes, "checkpoint_freq": save_freq}
            _write_config(folder, model, options, {"steps": steps, **frequencies, "arguments": encode(arguments)[0]})
            # After each step: evaluate, checkpoint, stop.
            callbacks: list[BaseCallback] = [stop.checkpoints, stop]
            if eval_freq:
                evaluation = EvalCallback(
                    options.env,
                    n_eval_episodes=n_eval_episodes,
                    eval_freq=max(eval_freq // model.n_envs, 1),
                    log_path=str(folder),
                    best_model_save_path=str(folder),
                    verbose=0,
                )
                callbacks.insert(0, evaluation)
            if begun is not None and not stop.checkpoints.checkpoints():
                # The run begins at its beginning, and so does what it leaves.
                for pattern in ("progress.csv", "evaluations.npz", "events.out*"):
                    for left in folder.glob(pattern):
                        left.unlink()
            model.set_logger(configure(folder, ("csv", "tensorboard", *(("stdout",) if options.verbose else ()))))

            code = _learn(model, steps, callbacks, stop, folder, resume=begun is not None)
        model.logger.close()
        try:
            if not stop.at_once and (folder / "progress.csv").exists():
                try:
                    plot_learning_curve(folder, folder / "learning_curve.png")
                except (OSError, ValueError) as error:
                    print(f"sbac train: there is no learning curve: {error}", file=sys.stderr)
            if code == 0:
                mean, deviation = evaluate_policy(model, options.env, n_eval_episodes=20, seed=options.seed + 1)
                print(f"return over 20 episodes: {mean:.1f} +- {deviation:.1f}")
                print(f"see it: sbac watch {shlex.quote(str(folder))}    its curve: {folder / 'learning_curve.png'}")
        except KeyboardInterrupt:
            print(f"interrupted; the model is in {folder / 'model.zip'}")
            code = stop.code
    return code


def _begun(options: argparse.Namespace) -> dict[str, Any]:
    """Take over the options with which a run was begun; returns the arguments of its algorithm."""
    begun_with = vars(_parser().parse_args(["train"]))
    free = ("resume", "steps", "device", "verbose")
    given = [name for name, value in vars(options).items() if name not in free and value != begun_with[name]]
    if given:
        raise ValueError(
            f"--resume goes on with what the run was begun with; only --steps, --device and --verbose can be given "
            f"beside it, not {', '.join(given)}"
        )
    path = options.resume / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        for name in ("algorithm", "env", "seed"):
            setattr(options, name, config[name])
        options.steps = config["steps"] if options.steps is None else options.steps
        for name in ("policy", "eval_freq", "eval_episodes", "checkpoint_freq"):
            setattr(options, name, config.get(name, getattr(options, name)))
        return dict(decode(config["arguments"]))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"--resume {options.resume}: no {path.name} in it: is it the folder of a run?"
        ) from None
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"--resume {options.resume}: config.json does not describe a run: {error!r}") from error


def _learn(
    model: BaseAlgorithm, steps: int, callbacks: list[BaseCallback], stop: Interruption, folder: Path, resume: bool
) -> int:
    """Train and save the model, whatever ended the training; returns the exit code."""
    code = 0
    file = folder / "model.zip"
    try:
        try:
            model.learn(steps, callback=callbacks, progress_bar=True, resume=resume)
        except (EnvironmentFault, NotFiniteError, WorkerFault, OSError, MemoryError) as error:
            print(f"sbac train: {str(error) or 'out of memory'}", file=sys.stderr)
            code = 1
        stop.phase = "saving"  # here already, so that nothing can come between
    except KeyboardInterrupt:
        stop.at_once = True
    finally:
        stop.phase = "saving"  # after errors of other kinds too
        if stop.has_begun or not file.exists():  # a run that was not taken over keeps its model
            model.save(file, full=not stop.at_once)
        stop.phase = "saved"
    if stop.signal is not None:
        print(f"stopped at step {model.num_timesteps:,}; the model is in {file}")
        if stop.checkpoints is not None and stop.checkpoints.checkpoints():
            print(f"go on: sbac train --resume {shlex.quote(str(folder))}")
        return stop.code
    if code:
        print(f"the model of step {model.num_timesteps:,} is in {file}", file=sys.stderr)
    return code


def _hyperparameters(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """From the recipe, overridden by what the command line says; and what is to be said of the recipe."""
    recipe, remark = {} if options.no_recipe else read_recipe(options.algorithm, options.env), ""
    assignments = [_assignment(text) for text in options.set]
    if any(name == "preset" and value is not None for name, _, value in assignments):
        # The two are whole sets of values: mixed, they would be neither.
        remark = "the preset takes the place of the recipe" if recipe else ""
        recipe = {}
    elif not recipe and not options.no_recipe:
        remark = f"no recipe for {options.env}: the defaults"
    data = dict(recipe)
    if options.n_envs is not None:
        data["n_envs"] = options.n_envs
    for table, key, value in assignments:
        if not key:
            data[table] = value
        elif key == "kind" or not isinstance(data.get(table), dict):
            data[table] = {key: value}  # the entries of another kind would mean nothing
        else:
            data[table] = {**data[table], key: value}
    return {name: read_value(name, value) for name, value in data.items()}, remark


def _assignment(text: str) -> tuple[str, str, Any]:
    """NAME=VALUE or TABLE.KEY=VALUE as (name, "", value) or (table, key, value)."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set takes NAME=VALUE, not {text!r}")
    table, _, key = name.strip().partition(".")
    if table in OPTIONS_OF_THEIR_OWN:
        raise ValueError(f"--set {table}=...: {OPTIONS_OF_THEIR_OWN[table]}")
    if table.endswith("_class"):
        raise ValueError(f"--set {table}=...: a class can be given from Python only")
    return table, key, _value(value)


def _value(text: str) -> Any:
    """A value as TOML writes it; words without quotes are strings, and none is None."""
    if text.strip().lower() == "none":
        return None
    try:
        return tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        booleans = {"true": True, "false": False}
        return booleans.get(text.strip().lower(), text.strip())


def _new_folder(wanted: Path | None, name: str, env_id: str) -> Path:
    """Make the folder of a run, which is this run's alone, also where others start at the same time."""
    if wanted is not None:
        if wanted.is_dir() and not any(wanted.iterdir()):
            return wanted
        try:
            wanted.mkdir(parents=True)
        except FileExistsError:
            raise FileExistsError(
                f"--out {wanted} exists already and was left as it is: name another, or remove it"
            ) from None
        return wanted
    for number in itertools.count(1):
        folder = Path("runs") / f"{name}_{env_id.replace('/', '-').replace(':', '-')}_{number}"
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
    return folder


def _write_config(folder: Path, model: BaseAlgorithm, options: argparse.Namespace, more: dict[str, Any]) -> None:
    config = {
        "algorithm": type(model).__name__,
        "env": options.env,
        "policy": options.policy,
        "seed": model.seed,
        **more,
        "sbac": sbac.__version__,
    }
    # A run that is resumed replaces its own.
    with (folder / "config.json").open("x" if options.resume is None else "w", encoding="utf-8") as file:
        file.write(json.dumps(config, indent=2) + "\n")


# Eval, watch, plot, inspect, convert.


def _model_file(path: Path) -> Path:
    """The file itself, or the best model of a run's folder."""
    if not path.is_dir():
        return path
    for name in ("best_model.zip", "model.zip"):
        if (path / name).exists():
            return path / name
    raise FileNotFoundError(f"{path} holds neither best_model.zip nor model.zip: is it the folder of a run?")


def _env_of(options: argparse.Namespace, file: Path) -> str:
    env_id = options.env
    with suppress(OSError, ValueError, KeyError, TypeError):  # a file, or a folder that no command made
        # The run knows the module of an id such as "module:Id-v0"; a model's file names none to import.
        env_id = env_id or json.loads((options.model / "config.json").read_text(encoding="utf-8"))["env"]
    if not env_id:
        env_id = str(inspect(file)["config"].get("env_id") or "")
        if ":" in env_id:
            raise ValueError(
                f"{file} names the environment {env_id!r}, for which a module would be run, and a model's file runs no "
                f"code: if you trust it, add --env {shlex.quote(env_id)}"
            )
    if not env_id:
        raise ValueError(f"{file} does not name its environment: add --env ID")
    return str(env_id)


def _eval(options: argparse.Namespace) -> int:
    n_episodes = require_whole("--episodes", options.episodes, 1)
    require_whole("--n-envs", options.n_envs, 1)
    file = _model_file(options.model)
    env_id = _env_of(options, file)
    env = make_environments(env_id, options.n_envs)
    model = load(file, device=options.device)
    model.check_env(env)
    returns, lengths = evaluate_policy(
        model,
        env,
        n_eval_episodes=n_episodes,
        deterministic=not options.stochastic,
        return_episode_rewards=True,
        seed=options.seed,
    )
    env.close()
    print(f"{file} on {env_id}, {len(returns)} episodes, {'drawn' if options.stochastic else 'deterministic'} actions")
    print(f"return {np.mean(returns):.2f} +- {np.std(returns):.2f} (from {min(returns):.2f} to {max(returns):.2f})")
    print(f"length {np.mean(lengths):.1f}")
    return 0


def _watch(options: argparse.Namespace) -> int:
    n_episodes = require_whole("--episodes", options.episodes, 1)
    if options.video is not None:
        check_film(options.video)
    file = _model_file(options.model)
    env_id = _env_of(options, file)
    model = load(file, device=options.device)
    if options.video is None:
        ready_window()
    render_mode = "human" if options.video is None else "rgb_array"
    door = make_environments(lambda: gymnasium.make(env_id, render_mode=render_mode))
    model.check_env(door)
    env = door.env.envs[0]
    frames: list[Any] = []
    for episode in range(n_episodes):
        obs, _ = env.reset(seed=options.seed + episode)
        state, total, ended, length = None, 0.0, False, 0
        while not ended:
            if options.video is not None:
                frames.append(env.render())
            seen = _with_mask(obs, env.action_mask, model)
            action, state = model.predict(seen, state, deterministic=not options.stochastic)
            obs, reward, terminated, truncated, _ = env.step(action)
            total, ended, length = total + float(reward), terminated or truncated, length + 1
            if options.video is None and is_window_closed():
                env.close()
                return 0
        if options.video is not None:
            frames.append(env.render())
        print(f"episode {episode + 1}: return {total:.2f}, {length} steps")
    if options.video is not None:
        write_video(options.video, frames, fps=env.metadata.get("render_fps", 30))
        print(f"{options.video}: {len(frames)} frames")
    env.close()
    return 0


def _with_mask(obs: Any, mask: Any, model: BaseAlgorithm) -> Any:
    """What the policy acts on: the observation, and beside it a mask that came in the info, as the door puts it."""
    pair = {"observation": obs, MASK: np.ravel(mask) != 0}
    is_beside = mask is not None and n_choices(model.action_space) and carries_mask(pair, model.observation_space)
    return pair if is_beside else obs


def _plot(options: argparse.Namespace) -> int:
    path = options.out or options.runs[0] / "learning_curve.png"
    print(plot_learning_curve(options.runs, path, title=options.title))
    return 0


def _inspect(options: argparse.Namespace) -> int:
    file = _model_file(options.model)
    content = inspect(file)
    if options.json:
        print(json.dumps(content, indent=2))
        return 0
    meta, config = content["meta"], content["config"]
    print(f"{file}: {meta.get('class')}, format {meta['format_version']}")
    print("  written with " + ", ".join(f"{name} {version}" for name, version in meta["versions"].items()))
    print("  " + ", ".join(f"{name.strip('_')} {count:,}" for name, count in meta.get("counters", {}).items()))
    print(f"  environment {config.get('env_id')}")
    print(f"  observations {_shown(config.get('observation_space'))}")
    print(f"  actions {_shown(config.get('action_space'))}")
    print("  arguments")
    for name, value in config.get("arguments", {}).items():
        print(f"    {name} = {_shown(value)}")
    print(f"  {len(content['arrays'])} arrays, {sum(array['bytes'] for array in content['arrays']):,} bytes")
    for array in content["arrays"]:
        print(f"    {array['name']} {tuple(array['shape'])} {array['dtype']}")
    print(f"  full checkpoint: {'yes' if content['state'] else 'no'}")
    print(f"  Python objects of the user's own: {'yes' if content['objects'] else 'no'}")
    return 0


def _shown(data: Any) -> str:
    """A value of a file as Python writes it; as it lies there, where it holds objects of the user's own."""
    try:
        return repr(decode(data))
    except ValueError:
        return json.dumps(data)


def _convert(options: argparse.Namespace) -> int:
    for remark in convert(options.model, options.out, options.vecnormalize):
        print(f"note: {remark}")
    content = inspect(options.out)
    meta, n_numbers = content["meta"], sum(math.prod(array["shape"]) for array in content["arrays"])
    print(f"{options.out}: {meta['class']}, {meta['counters']['num_timesteps']:,} timesteps, {n_numbers:,} numbers")
    return 0

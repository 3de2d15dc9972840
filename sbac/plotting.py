"""Learning curves, as pictures, from the folders that runs leave behind.

A run folder holds progress.csv (from the logger), evaluations.npz (from `EvalCallback`) or both, and
config.json, which says what was run. Nothing here touches matplotlib's global state.
"""

from __future__ import annotations

import csv
import json
import math
import os
import warnings
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PathLike = str | os.PathLike[str]
FloatArray = NDArray[np.float64]

STEPS, SECONDS, RETURN = "time/total_timesteps", "time/time_elapsed", "rollout/ep_rew_mean"

# Okabe and Ito's colours, told apart by colour-blind eyes too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Results:
    """What one run left in its folder.

    Attributes:
        folder: The folder.
        label: Its name.
        timesteps: Environment steps at each row of progress.csv (k,), increasing.
        training: Mean return of the latest training episodes (k,); NaN where none was logged, as before the
            first episode ends.
        seconds: Wall-clock time of the run at `timesteps` (k,), without the pauses before it was resumed; NaN
            where it was not logged.
        evaluation_timesteps: Environment steps at each evaluation (m,), increasing.
        evaluation: Returns of its episodes (m, n_episodes).
        algorithm: As config.json says, or None.
        env: As config.json says, or None.
        seed: As config.json says, or None.
    """

    folder: Path
    label: str
    timesteps: FloatArray
    training: FloatArray
    seconds: FloatArray
    evaluation_timesteps: FloatArray
    evaluation: FloatArray
    algorithm: str | None
    env: str | None
    seed: int | None


class _Curve(NamedTuple):
    x: FloatArray  # (k,)
    mean: FloatArray  # (k,)
    spread: FloatArray | None  # (k,): half the height of the band


def load_results(folder: PathLike) -> Results:
    """Read the folder of one run.

    A last line of progress.csv that a kill cut off is ignored. Where a run was resumed from an earlier step,
    the later rows replace those they repeat.

    Args:
        folder: A folder with progress.csv, evaluations.npz or both; config.json may be missing.

    Raises:
        FileNotFoundError: If the folder is missing or holds neither file.
        ValueError: If a file cannot be read or lacks what it should hold.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"plotting: there is no folder {folder}")
    if not _is_run(folder):
        raise FileNotFoundError(f"plotting: folder {folder} holds neither progress.csv nor evaluations.npz")
    timesteps, training, seconds = _read_progress(folder / "progress.csv")
    evaluation_timesteps, evaluation = _read_evaluations(folder / "evaluations.npz")
    config = _read_config(folder / "config.json")
    algorithm, env, seed = (config.get(key) for key in ("algorithm", "env", "seed"))
    return Results(
        folder=folder,
        label=folder.resolve().name,
        timesteps=timesteps,
        training=training,
        seconds=seconds,
        evaluation_timesteps=evaluation_timesteps,
        evaluation=evaluation,
        algorithm=None if algorithm is None else str(algorithm),
        env=None if env is None else str(env),
        seed=seed if isinstance(seed, int) else None,
    )


def plot_learning_curve(
    folder_or_folders: PathLike | Iterable[PathLike],
    path: PathLike,
    title: str | None = None,
    x: Literal["timesteps", "walltime_hrs"] = "timesteps",
    smooth: int = 1,
) -> Path:
    """Draw the learning curves of one run or of many, and write them as a picture.

    One run: its training return as a thin line, and the mean of its evaluations with a band of one standard
    deviation over the episodes of each evaluation.

    Several runs: one curve for each algorithm and environment, the mean over runs with a band of one sample
    standard deviation over runs, at the steps that all of its runs cover (linearly interpolated); one panel
    for each environment. Each run counts with its mean evaluation return or, unless all were evaluated, with
    its training return. Runs without config.json stay apart, each under its folder's name.

    Args:
        folder_or_folders: Run folders, or folders with run folders at any depth.
        path: The picture, replaced atomically if it exists; PNG, unless it ends as another format (".svg").
        title: Title of the picture. By default the algorithms and the environment.
        x: "timesteps" (environment steps) or "walltime_hrs" (hours since the run began).
        smooth: Window, in logged points, of a centred running mean over training returns; 1 is none.
            Evaluations, far fewer, stay as they are.

    Returns:
        The path written to.

    Raises:
        FileNotFoundError: If a folder is missing or holds no run.
        ValueError: If a file cannot be read, an argument is out of range, or wall-clock time was not logged.
    """
    from matplotlib.figure import Figure

    if x not in ("timesteps", "walltime_hrs"):
        raise ValueError(f"plotting: x must be 'timesteps' or 'walltime_hrs', got {x!r}")
    if smooth < 1:
        raise ValueError(f"plotting: smooth must be at least 1 point, got {smooth}")
    if isinstance(folder_or_folders, (str, os.PathLike)):
        folder_or_folders = [folder_or_folders]
    runs = [load_results(folder) for folder in _find_runs(folder_or_folders)]

    environments = sorted({run.env or "" for run in runs})
    groups = sorted({_group(run) for run in runs})
    n_columns = min(3, math.ceil(math.sqrt(len(environments))))
    n_rows = math.ceil(len(environments) / n_columns)
    size = (max(6.8, 5.0 * n_columns), max(4.2, 3.8 * n_rows))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    panels = figure.subplots(n_rows, n_columns, squeeze=False).ravel()

    evaluated = all(len(run.evaluation_timesteps) for run in runs)
    for panel, environment in zip(panels, environments, strict=False):
        if len(runs) == 1:
            _draw_run(panel, runs[0], x, smooth)
        for number, group in enumerate(groups if len(runs) > 1 else []):
            members = [run for run in runs if (run.env or "", _group(run)) == (environment, group)]
            _draw_group(panel, members, group[0], number, evaluated, x, smooth)
        kind = "" if len(runs) == 1 else "evaluation " if evaluated else "training "
        _finish(panel, x, f"{kind}return per episode")
        if len(environments) > 1:
            panel.set_title(environment or "unknown environment", fontsize="medium")
    for panel in panels[len(environments) :]:
        panel.set_axis_off()

    where = f" on {environments[0]}" if len(environments) == 1 and environments[0] else ""
    figure.suptitle(title if title is not None else ", ".join(name for name, _ in groups) + where)
    return _save(figure, Path(path))


def _group(run: Results) -> tuple[str, str]:
    """What the runs of one curve share: the algorithm, or without config.json the folder: no other."""
    return (run.algorithm, "") if run.algorithm else (run.label, str(run.folder))


def _training(run: Results, x: str, smooth: int) -> _Curve:
    known = np.isfinite(run.training)
    return _Curve(_axis(run, run.timesteps[known], x), _running_mean(run.training[known], smooth), None)


def _evaluation(run: Results, x: str) -> _Curve:
    at = _axis(run, run.evaluation_timesteps, x)
    return _Curve(at, run.evaluation.mean(axis=1), run.evaluation.std(axis=1))


def _axis(run: Results, timesteps: FloatArray, x: str) -> FloatArray:
    if x == "timesteps" or not len(timesteps):
        return timesteps
    known = np.isfinite(run.seconds)
    if not known.any():
        raise ValueError(f"plotting: x={x!r} needs column {SECONDS} in {run.folder / 'progress.csv'}")
    return np.interp(timesteps, run.timesteps[known], run.seconds[known]) / 3600


def _average(curves: Sequence[_Curve], name: str) -> _Curve | None:
    """The mean over runs, where all of them have values."""
    low, high = max(curve.x[0] for curve in curves), min(curve.x[-1] for curve in curves)
    if low > high:
        text = f"plotting: {name} is left out: one run begins at {low:g}, where another has ended at {high:g}"
        warnings.warn(text, RuntimeWarning, stacklevel=4)
        return None
    x = np.unique(np.concatenate([curve.x for curve in curves]))
    x = x[(low <= x) & (x <= high)]
    values = np.stack([np.interp(x, curve.x, curve.mean) for curve in curves])  # (n_runs, k)
    return _Curve(x, values.mean(axis=0), values.std(axis=0, ddof=1) if len(curves) > 1 else None)


def _running_mean(values: FloatArray, window: int) -> FloatArray:
    """Centred running mean, over fewer points where the curve begins and ends."""
    at = np.arange(len(values))
    first = np.maximum(at - (window - 1) // 2, 0)
    end = np.minimum(at + window // 2 + 1, len(values))
    total = np.concatenate([[0.0], np.cumsum(values)])
    return (total[end] - total[first]) / (end - first) if window > 1 else values


def _draw_run(panel: Axes, run: Results, x: str, smooth: int) -> None:
    _draw(panel, _training(run, x, smooth), "training: mean of recent episodes", 0, width=1.0)
    if len(run.evaluation_timesteps):
        n_episodes = run.evaluation.shape[1]
        episodes = f"mean ± std over {n_episodes} episodes" if n_episodes > 1 else "1 episode"
        _draw(panel, _evaluation(run, x), f"evaluation: {episodes}", 1)


def _draw_group(
    panel: Axes, runs: Sequence[Results], name: str, number: int, evaluated: bool, x: str, smooth: int
) -> None:
    curves = []
    for run in runs:
        curve = _evaluation(run, x) if evaluated else _training(run, x, smooth)
        if len(curve.x):
            curves.append(curve)
        else:
            text = f"plotting: {run.folder} is left out: it has no finished training episode yet"
            warnings.warn(text, RuntimeWarning, stacklevel=3)
    average = _average(curves, name) if curves else None
    if average is None:
        return
    seeds = "seed" if len({run.seed for run in runs if run.seed is not None}) == len(runs) else "run"
    count = f"mean ± std over {len(curves)} {seeds}s" if len(curves) > 1 else f"1 {seeds}"
    _draw(panel, average, f"{name}: {count}", number)


def _draw(panel: Axes, curve: _Curve, label: str, number: int, width: float = 1.8) -> None:
    colour = COLOURS[number % len(COLOURS)]
    line = LINES[number // len(COLOURS) % len(LINES)]
    if len(curve.x) == 1:
        panel.errorbar(*curve[:2], yerr=curve.spread, fmt="o", color=colour, capsize=4, label=label)
    elif len(curve.x) > 1:
        panel.plot(*curve[:2], line, color=colour, linewidth=width, label=label)
        if curve.spread is not None:
            low, high = curve.mean - curve.spread, curve.mean + curve.spread
            panel.fill_between(curve.x, low, high, color=colour, alpha=0.2, linewidth=0)


def _finish(panel: Axes, x: str, y_label: str) -> None:
    panel.set_xlabel("environment steps" if x == "timesteps" else "wall-clock time (hours)")
    panel.set_ylabel(y_label)
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    if panel.has_data():
        panel.legend(frameon=False, fontsize="small")
    else:
        panel.text(0.5, 0.5, "no finished episode yet", transform=panel.transAxes, ha="center", color="0.4")
        panel.set(xticks=[], yticks=[])
    panel.xaxis.set_major_formatter(_thousands)
    panel.yaxis.set_major_formatter(_thousands)


def _thousands(value: float, position: float | None = None) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format=path.suffix[1:].lower() or "png")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _is_run(folder: Path) -> bool:
    return (folder / "progress.csv").is_file() or (folder / "evaluations.npz").is_file()


def _find_runs(folders: Iterable[PathLike]) -> list[Path]:
    runs: dict[Path, Path] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise FileNotFoundError(f"plotting: there is no folder {folder}")
        found = False
        for at, below, _ in os.walk(folder):
            below.sort()
            if _is_run(Path(at)):
                found = True
                runs.setdefault(Path(at).resolve(), Path(at))
                below.clear()
        if not found:
            raise FileNotFoundError(f"plotting: no run in {folder}: no progress.csv or evaluations.npz there or below")
    if not runs:
        raise ValueError("plotting: folder_or_folders is empty; give at least one folder")
    return list(runs.values())


def _read_progress(path: Path) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Steps, training return and seconds (k,) of progress.csv; empty if there are none yet."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    rows = csv.DictReader(text[: text.rfind("\n") + 1].splitlines(keepends=True))
    columns = rows.fieldnames or []
    if columns and STEPS not in columns:
        raise ValueError(f"plotting: {path} has no column {STEPS}; it has {', '.join(columns)}")
    table = np.array([[_number(row.get(key)) for key in (STEPS, RETURN, SECONDS)] for row in rows])
    steps, training, seconds = table.reshape(-1, 3).T

    kept = _not_repeated(steps)
    timesteps = np.unique(steps[kept])
    place = np.searchsorted(timesteps, steps)

    # Of rows at the same step, which may each hold some of the keys, the last number counts.
    merged = np.full((2, len(timesteps)), np.nan)
    for column, values in enumerate((training, seconds)):
        known = kept & np.isfinite(values)
        merged[column, place[known]] = values[known]
    return timesteps, merged[0], _without_restarts(merged[1])


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def _not_repeated(steps: FloatArray) -> NDArray[np.bool_]:
    """Which rows count: not those at a later step than a row below them, which a resumed run wrote anew."""
    steps_or_never = np.where(np.isnan(steps), np.inf, steps)
    return steps <= np.minimum.accumulate(steps_or_never[::-1])[::-1]


def _without_restarts(seconds: FloatArray) -> FloatArray:
    """Seconds that begin again at nought with each resumption, as seconds of the whole run."""
    known = np.isfinite(seconds)
    passed = np.diff(seconds[known], prepend=0)
    total = np.full_like(seconds, np.nan)
    total[known] = np.cumsum(np.where(passed < 0, seconds[known], passed))
    return total


def _read_evaluations(path: Path) -> tuple[FloatArray, FloatArray]:
    """Steps (m,) and returns (m, n_episodes) of evaluations.npz; empty if there is none."""
    if not path.is_file():
        return np.empty(0), np.empty((0, 0))
    try:
        with np.load(path, allow_pickle=False) as file:
            steps, results = file["timesteps"].astype(float), file["results"].astype(float)
        results = results.reshape(len(steps), -1)
    except KeyError as error:
        raise ValueError(f"plotting: {path} lacks an array: {error}") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"plotting: {path} cannot be read: {error}") from error
    kept = _not_repeated(steps) & np.isfinite(results).all(axis=1)
    steps, first = np.unique(steps[kept][::-1], return_index=True)
    return steps, results[kept][::-1][first]


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"plotting: {path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"plotting: {path} should hold a JSON object, got {type(config).__name__}")
    return config

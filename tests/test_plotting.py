"""Learning curves: what is read from run folders, what becomes one curve, and that pictures are whole."""

import json
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from sbac import plotting
from sbac.logger import configure
from sbac.plotting import load_results, plot_learning_curve


def write_run(
    folder: Path,
    rows: Sequence[tuple[Any, Any]] = (),
    evaluations: dict[int, list[float]] | None = None,
    **config: Any,
) -> Path:
    """A run folder as a run leaves it: rows are (steps, return)."""
    folder.mkdir(parents=True)
    if rows:
        lines = [f"{steps},{steps},{value}\n" for steps, value in rows]
        header = "time/total_timesteps,time/time_elapsed,rollout/ep_rew_mean\n"
        (folder / "progress.csv").write_text(header + "".join(lines))
    if evaluations:
        results = np.array(list(evaluations.values()))
        np.savez(
            folder / "evaluations.npz",
            timesteps=np.array(list(evaluations)),
            results=results,
            ep_lengths=np.full(results.shape, 200),
        )
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, so that a test can look at their curves."""
    figures: list[Figure] = []
    save = plotting._save

    def keep(figure: Figure, path: Path) -> Path:
        figures.append(figure)
        return save(figure, path)

    monkeypatch.setattr(plotting, "_save", keep)
    return figures


def curves_of(figure: Figure, panel: int = 0) -> dict[str, list[tuple[float, float]]]:
    lines = figure.axes[panel].get_lines()
    return {str(line.get_label()): list(map(tuple, np.asarray(line.get_xydata()))) for line in lines}


def band_of(figure: Figure) -> set[tuple[float, float]]:
    (band,) = figure.axes[0].collections
    return {(round(x, 6), round(y, 6)) for x, y in np.asarray(band.get_paths()[0].vertices)}


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.read_bytes().rstrip().endswith(b"IEND\xaeB`\x82")


def test_load_results_reads_all_that_a_run_leaves(tmp_path: Path) -> None:
    config: dict[str, Any] = {"algorithm": "TD3", "env": "P-v1", "seed": 3}
    run = write_run(tmp_path / "TD3_1", [(10, ""), (20, -5.0)], {20: [1, 3]}, **config)
    results = load_results(run)
    assert (results.folder, results.label) == (run, "TD3_1")
    assert (results.algorithm, results.env, results.seed) == ("TD3", "P-v1", 3)
    np.testing.assert_array_equal(results.timesteps, [10, 20])
    np.testing.assert_array_equal(results.training, [np.nan, -5])
    np.testing.assert_array_equal(results.seconds, [10, 20])
    np.testing.assert_array_equal(results.evaluation_timesteps, [20])
    np.testing.assert_array_equal(results.evaluation, [[1, 3]])


def test_load_results_reads_what_the_logger_writes(tmp_path: Path) -> None:
    logger = configure(tmp_path, ["csv"])
    for step in (100, 200):
        logger.record("time/total_timesteps", step)
        if step == 200:  # a column that appears late
            logger.record("rollout/ep_rew_mean", np.float32(-7.5))
        logger.dump(step)
    # An evaluation dumps a row of its own at the same step.
    logger.record("time/total_timesteps", 200)
    logger.record("eval/mean_reward", 1.0)
    logger.dump(200)
    results = load_results(tmp_path)
    np.testing.assert_array_equal(results.timesteps, [100, 200])
    np.testing.assert_array_equal(results.training, [np.nan, -7.5])
    assert (results.algorithm, results.env, results.seed) == (None, None, None)


@pytest.mark.parametrize("rest", ["3", "300,300,-", "300,300,-12"])
def test_a_last_line_cut_off_by_a_kill_is_ignored(tmp_path: Path, rest: str) -> None:
    run = write_run(tmp_path / "run", [(100, 1), (200, 2)])
    with (run / "progress.csv").open("a") as file:
        file.write(rest)
    np.testing.assert_array_equal(load_results(run).training, [1, 2])


def test_rows_of_a_resumed_run_replace_those_they_repeat(tmp_path: Path) -> None:
    # Killed at 40, resumed from 20; the clock began again.
    run = write_run(tmp_path / "run", evaluations={10: [1], 20: [2]})
    (run / "progress.csv").write_text(
        "time/total_timesteps,time/time_elapsed,rollout/ep_rew_mean\n"
        "10,100,1\n20,200,2\n30,300,-3\n40,400,-4\n30,50,3\n50,150,5\n"
    )
    results = load_results(run)
    np.testing.assert_array_equal(results.timesteps, [10, 20, 30, 50])
    np.testing.assert_array_equal(results.training, [1, 2, 3, 5])
    np.testing.assert_array_equal(results.seconds, [100, 200, 250, 350])


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        load_results(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty holds neither progress.csv nor evaluations.npz"):
        load_results(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"no run in .*empty"):
        plot_learning_curve(tmp_path / "empty", tmp_path / "a.png")
    with pytest.raises(ValueError, match="empty; give at least one"):
        plot_learning_curve([], tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("progress.csv", b"a,b\n1,2\n", "progress.csv has no column time/total_timesteps; it has a, b"),
        ("evaluations.npz", b"PK\x03\x04 cut off", "evaluations.npz cannot be read"),
        ("evaluations.npz", b"", "evaluations.npz cannot be read"),
        ("config.json", b'{"algorithm": ', "config.json is not JSON"),
        ("config.json", b"[1]", "config.json should hold a JSON object, got list"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    run = write_run(tmp_path / "run", [(1, 1)])
    (run / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_results(run)


def test_evaluations_without_results_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "evaluations.npz", timesteps=np.arange(3))
    with pytest.raises(ValueError, match=r"lacks an array.*results"):
        load_results(tmp_path)


def test_one_run_shows_training_and_evaluation(tmp_path: Path, drawn: list[Figure]) -> None:
    run = write_run(
        tmp_path / "run",
        [(0, ""), (100, 1), (200, 2)],
        {100: [0, 2], 200: [4, 8]},
        algorithm="TD3",
        env="Pendulum-v1",
        seed=0,
    )
    path = plot_learning_curve(run, tmp_path / "new" / "curve.png")
    assert path == tmp_path / "new" / "curve.png"
    assert is_png(path)
    (figure,) = drawn
    assert curves_of(figure) == {
        "training: mean of recent episodes": [(100, 1), (200, 2)],
        "evaluation: mean ± std over 2 episodes": [(100, 1), (200, 6)],
    }
    assert {(100, 0), (100, 2), (200, 4), (200, 8)} <= band_of(figure)
    assert figure.get_suptitle() == "TD3 on Pendulum-v1"
    assert figure.axes[0].get_xlabel() == "environment steps"
    assert figure.axes[0].get_ylabel() == "return per episode"


def test_seeds_become_one_curve_where_all_have_values(tmp_path: Path, drawn: list[Figure]) -> None:
    common: dict[str, Any] = {"algorithm": "A2C", "env": "C-v1"}
    write_run(tmp_path / "runs" / "a", [(0, 0), (100, 10), (200, 20)], **common, seed=0)
    write_run(tmp_path / "runs" / "b", [(50, 9), (150, 19), (250, 29)], **common, seed=1)
    plot_learning_curve(tmp_path / "runs", tmp_path / "curve.png")
    (figure,) = drawn
    # a is x/10 and b is x/10 + 4 at each x: the mean is x/10 + 2 and the sample deviation 2 sqrt(2).
    expected = [(50, 7), (100, 12), (150, 17), (200, 22)]
    (curve,) = curves_of(figure).values()
    np.testing.assert_allclose(curve, expected)
    assert list(curves_of(figure)) == ["A2C: mean ± std over 2 seeds"]
    assert (50, round(7 + 8**0.5, 6)) in band_of(figure)
    assert (200, round(22 - 8**0.5, 6)) in band_of(figure)
    assert figure.axes[0].get_ylabel() == "training return per episode"


def test_runs_are_compared_by_evaluation_if_all_have_one(tmp_path: Path, drawn: list[Figure]) -> None:
    rows = [(100, 1), (200, 2)]
    runs = [
        write_run(tmp_path / name, rows, {100: [5, 7], 200: [8, 8]}, algorithm=name, env="C-v1", seed=0)
        for name in ("A2C", "TD3")
    ]
    plot_learning_curve(runs, tmp_path / "curve.png")
    (runs[1] / "evaluations.npz").unlink()
    plot_learning_curve(runs, tmp_path / "curve.png")
    evaluated, trained = drawn
    assert curves_of(evaluated)["A2C: 1 seed"] == [(100, 6), (200, 8)]
    assert evaluated.axes[0].get_ylabel() == "evaluation return per episode"
    assert curves_of(trained)["A2C: 1 seed"] == curves_of(trained)["TD3: 1 seed"] == [(100, 1), (200, 2)]
    colours = [line.get_color() for line in trained.axes[0].get_lines()]
    assert len(set(colours)) == 2


def test_environments_get_panels_and_algorithms_keep_colours(tmp_path: Path, drawn: list[Figure]) -> None:
    for algorithm, env in (("A2C", "A-v1"), ("TD3", "A-v1"), ("TD3", "B-v1")):
        for seed in range(2):
            folder = tmp_path / "runs" / env / f"{algorithm}_{seed}"
            write_run(folder, [(1, seed), (2, seed)], algorithm=algorithm, env=env, seed=seed)
    plot_learning_curve(tmp_path / "runs", tmp_path / "curve.png")
    (figure,) = drawn
    assert [axes.get_title() for axes in figure.axes] == ["A-v1", "B-v1"]
    assert figure.get_suptitle() == "A2C, TD3"
    first = {str(line.get_label())[:3]: line.get_color() for line in figure.axes[0].get_lines()}
    second = {str(line.get_label())[:3]: line.get_color() for line in figure.axes[1].get_lines()}
    assert set(first) == {"A2C", "TD3"}
    assert second == {"TD3": first["TD3"]}


def test_runs_without_config_stay_apart(tmp_path: Path, drawn: list[Figure]) -> None:
    for parent in ("x", "y"):
        write_run(tmp_path / "runs" / parent / "seed0", [(1, 1), (2, 2)])
    plot_learning_curve(tmp_path / "runs", tmp_path / "curve.png")
    assert [line.get_label() for line in drawn[0].axes[0].get_lines()] == ["seed0: 1 run"] * 2


def test_a_run_given_twice_counts_once(tmp_path: Path, drawn: list[Figure]) -> None:
    run = write_run(tmp_path / "runs" / "a", [(1, 1), (2, 2)], algorithm="A2C", env="C-v1", seed=0)
    plot_learning_curve([tmp_path / "runs", run], tmp_path / "curve.png")
    assert list(curves_of(drawn[0])) == ["training: mean of recent episodes"]


def test_smoothing_is_a_centred_mean_and_leaves_evaluations(tmp_path: Path, drawn: list[Figure]) -> None:
    rows = [(1, 0), (2, 3), (3, 6), (4, 0)]
    run = write_run(tmp_path / "run", rows, {1: [0, 0], 2: [4, 4], 3: [0, 0]})
    plot_learning_curve(run, tmp_path / "curve.png", smooth=3)
    training, evaluation = curves_of(drawn[0]).values()
    np.testing.assert_allclose(training, [(1, 1.5), (2, 3), (3, 3), (4, 3)])
    np.testing.assert_allclose(evaluation, [(1, 0), (2, 4), (3, 0)])
    plot_learning_curve(run, tmp_path / "curve.png", smooth=100)
    np.testing.assert_allclose(next(iter(curves_of(drawn[1]).values()))[0], (1, 9 / 4))


def test_wall_clock_time_on_the_x_axis(tmp_path: Path, drawn: list[Figure]) -> None:
    # Written with one second a step, so that 3600 steps are an hour; an evaluation lies between two rows.
    run = write_run(tmp_path / "run", [(3600, 1), (7200, 2)], {5400: [1], 7200: [2]})
    plot_learning_curve(run, tmp_path / "curve.png", x="walltime_hrs")
    training, evaluation = curves_of(drawn[0]).values()
    assert training == [(1, 1), (2, 2)]
    assert evaluation == [(1.5, 1), (2, 2)]
    assert drawn[0].axes[0].get_xlabel() == "wall-clock time (hours)"

    (run / "progress.csv").write_text("time/total_timesteps,rollout/ep_rew_mean\n1,1\n")
    with pytest.raises(ValueError, match=r"time/time_elapsed in .*progress.csv"):
        plot_learning_curve(run, tmp_path / "curve.png", x="walltime_hrs")


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [(1, 1)])
    wrong: Any = "hours"
    with pytest.raises(ValueError, match="'walltime_hrs', got 'hours'"):
        plot_learning_curve(run, tmp_path / "curve.png", x=wrong)
    with pytest.raises(ValueError, match="at least 1 point, got 0"):
        plot_learning_curve(run, tmp_path / "curve.png", smooth=0)


def test_a_run_of_one_point_shows_it(tmp_path: Path, drawn: list[Figure]) -> None:
    run = write_run(tmp_path / "run", [(500, -3)], {500: [-4, -2]})
    assert is_png(plot_learning_curve(run, tmp_path / "curve.png"))
    (axes,) = drawn[0].axes
    assert [container.get_label() for container in axes.containers] == [
        "training: mean of recent episodes",
        "evaluation: mean ± std over 2 episodes",
    ]


def test_runs_without_a_finished_episode(tmp_path: Path, drawn: list[Figure]) -> None:
    common: dict[str, Any] = {"algorithm": "A2C", "env": "C-v1"}
    fresh = write_run(tmp_path / "runs" / "fresh", [(1, ""), (2, "nan")], **common, seed=0)
    plot_learning_curve(fresh, tmp_path / "curve.png")
    assert [text.get_text() for text in drawn[0].axes[0].texts] == ["no finished episode yet"]

    write_run(tmp_path / "runs" / "going", [(1, 1), (2, 2)], **common, seed=1)
    with pytest.warns(RuntimeWarning, match="fresh is left out") as caught:
        plot_learning_curve(tmp_path / "runs", tmp_path / "curve.png")
    assert caught[0].filename == __file__
    assert curves_of(drawn[1]) == {"A2C: 1 seed": [(1, 1), (2, 2)]}


def test_an_empty_progress_file_is_a_run_that_has_just_begun(tmp_path: Path) -> None:
    (tmp_path / "progress.csv").write_text("")
    assert len(load_results(tmp_path).timesteps) == 0
    assert is_png(plot_learning_curve(tmp_path, tmp_path / "curve.png"))


def test_seeds_that_share_no_steps_are_left_out(tmp_path: Path) -> None:
    common: dict[str, Any] = {"algorithm": "A2C", "env": "C-v1"}
    write_run(tmp_path / "runs" / "a", [(1, 1), (2, 2)], **common, seed=0)
    write_run(tmp_path / "runs" / "b", [(3, 1), (4, 2)], **common, seed=1)
    with pytest.warns(RuntimeWarning, match="A2C is left out: one run begins at 3, where .* at 2"):
        plot_learning_curve(tmp_path / "runs", tmp_path / "curve.png")


def test_a_picture_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", [(1, 1), (2, 2)])
    path = tmp_path / "out" / "curve.png"
    path.parent.mkdir()
    path.write_text("old")

    def fail(self: Figure, file: Path, **options: Any) -> None:
        Path(file).write_text("half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", fail)
        with pytest.raises(OSError, match="No space"):
            plot_learning_curve(run, path)
    assert path.read_text() == "old"

    # Whoever has the old picture open goes on reading the old picture.
    with path.open() as reader:
        plot_learning_curve(run, path)
        assert reader.read() == "old"
    assert is_png(path)
    assert [file.name for file in path.parent.iterdir()] == ["curve.png"]


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0"), (500, "500"), (-1200, "-1.2k"), (100_000, "100k"), (2_500_000, "2.5M")]
)
def test_thousands(value: float, shown: str) -> None:
    assert plotting._thousands(value) == shown


def test_drawing_leaves_pyplot_alone_and_warns_of_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [(1, 1), (2, 2)], {1: [1, 2], 2: [2, 3]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_learning_curve(run, tmp_path / "curve.png")
    source = (
        "import sys\n"
        "from sbac.plotting import plot_learning_curve\n"
        "lazy = 'matplotlib' not in sys.modules\n"
        f"plot_learning_curve({str(run)!r}, {str(tmp_path / 'other.png')!r})\n"
        "print(lazy, 'matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]

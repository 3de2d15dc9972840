"""The runner of the table of results: what it trains, skips, resumes and writes."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

import sbac
from docs.results import run
from sbac import cli

ROWS = """
[[row]]
algorithm = "a2c"
environment = "CartPole-v1"
steps = 320
seeds = [0, 1]
reference = "500.0 ± 0.0"
source = "elsewhere"
remark = "A short one."

[[row]]
algorithm = "ddpg"
environment = "Pendulum-v1"

[sources.elsewhere]
title = "Somebody's table"
url = "https://example.org/table"
note = "As it stands there."
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.toml").write_text(ROWS, encoding="utf-8")
    return tmp_path


def measured(model: Path, seed: int) -> tuple[str, str]:
    mean, deviation = sbac.evaluate_policy(sbac.load(model), "CartPole-v1", n_eval_episodes=100, seed=seed)
    return f"{mean:.2f}", f"{deviation:.2f}"


def test_it_trains_resumes_and_skips(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Seed 1 has been begun before, and was killed between its last two checkpoints.
    folder = here / "runs/results/a2c_CartPole-v1_1"
    train = ["train", "a2c", "CartPole-v1", "--seed", "1", "--steps", "320", "--out", str(folder)]
    assert cli.main(train) == 0
    whole = measured(folder / "model.zip", 1001)
    (folder / "model.zip").unlink()
    (folder / "checkpoints/model_320_steps.zip").unlink()

    arguments = ["a2c/CartPole-v1", "--jobs", "1", "--rows", "rows.toml", "--out", "manual/results"]
    assert run.main(arguments) == 0
    with Path("manual/results/a2c_CartPole-v1.csv").open(encoding="utf-8", newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["seed"], second["seed"]) == ("0", "1")
    assert (first["mean"], first["deviation"]) == measured(here / "runs/results/a2c_CartPole-v1_0/model.zip", 1000)
    assert (second["mean"], second["deviation"]) == whole
    assert first["command"] == "sbac train a2c CartPole-v1 --seed 0 --steps 320"
    assert first["sbac"] == sbac.__version__
    log = Path("runs/results/a2c_CartPole-v1_1.log").read_text(encoding="utf-8")
    assert "resumed from" in log and "at step 304" in log

    page = Path("manual/results.md").read_text(encoding="utf-8")
    shown = f"0: {float(first['mean']):.1f} ± {float(first['deviation']):.1f}<br>1: {float(whole[0]):.1f} "
    assert shown.replace(" ", "&nbsp;") in page
    assert "\n- A2C on CartPole-v1: A short one.\n" in page
    assert f"| {(float(first['mean']) + float(second['mean'])) / 2:.1f} | 500.0 ± 0.0 [[elsewhere](#sources)]" in page
    command = "`sbac train ddpg Pendulum-v1 --seed S`"
    assert f"| DDPG on Pendulum-v1<br>{command} | 20,000 | not run | - | - |" in page
    assert "(results/a2c_CartPole-v1.png)" in page
    assert Path("manual/results/a2c_CartPole-v1.png").read_bytes().startswith(b"\x89PNG")

    # Once more: nothing is left to do.
    monkeypatch.setattr(run.subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    assert run.main(arguments) == 0
    assert Path("manual/results.md").read_text(encoding="utf-8") == page


def test_a_folder_of_another_recipe_is_not_gone_on_with(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = here / "runs/results/a2c_CartPole-v1_1"
    folder.mkdir(parents=True)
    folder.with_name("a2c_CartPole-v1_1.arguments").write_text('{"n_envs": 3}', encoding="utf-8")
    assert run.main(["a2c/CartPole-v1", "--jobs", "1", "--rows", "rows.toml", "--out", "manual/results"]) == 1
    assert "a2c_CartPole-v1_1 was begun with other arguments; remove it to train anew" in capsys.readouterr().out
    with Path("manual/results/a2c_CartPole-v1.csv").open(encoding="utf-8", newline="") as file:
        assert [line["seed"] for line in csv.DictReader(file)] == ["0"]


def test_two_runners_do_not_work_in_one_folder(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "runs/results").mkdir(parents=True)
    code = (
        "import sys; from pathlib import Path; from sbac.hold import Hold\n"
        "with Hold(Path('runs/results/runner.lock'), ''): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(SystemExit):
            run.main(["a2c/CartPole-v1", "--rows", "rows.toml", "--out", "manual/results"])
        assert "--runs runs/results: another runner works there; wait for it" in capsys.readouterr().err


def test_a_run_that_fails_is_told_and_the_others_go_on(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = '[[row]]\nalgorithm = "a2c"\nenvironment = "NoSuchEnvironment-v0"\nsteps = 5\nseeds = [0]\n'
    Path("rows.toml").write_text(broken, encoding="utf-8")
    assert run.main(["--jobs", "1", "--rows", "rows.toml", "--out", "manual/results"]) == 1
    assert "the training did not end well; see runs/results/a2c_NoSuchEnvironment-v0_0.log" in capsys.readouterr().out
    page = Path("manual/results.md").read_text(encoding="utf-8")
    assert (
        "| A2C on NoSuchEnvironment-v0<br>`sbac train a2c NoSuchEnvironment-v0 --seed S --steps 5` | 5 | not run |"
        in page
    )


def test_results_of_another_recipe_do_not_count(here: Path) -> None:
    row = run.read_rows(here / "rows.toml")[0][0]
    with (here / f"{row.file}.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, run.COLUMNS)
        writer.writeheader()
        writer.writerow({"seed": 0, "steps": 320, "mean": "9.00", "arguments": row.arguments})
        writer.writerow({"seed": 1, "steps": 320, "mean": "9.00", "arguments": '{"n_envs": 2}'})
        writer.writerow({"seed": 2, "steps": 100, "mean": "9.00", "arguments": row.arguments})
    assert set(run.finished(row, here)) == {0}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ('environment = "Acrobot-v1"', "no recipe"),
        ('environment = "CartPole-v1"\nsource = "hearsay"', "names the source 'hearsay'"),
    ],
)
def test_rows_that_cannot_be_run_are_refused(tmp_path: Path, entry: str, message: str) -> None:
    file = tmp_path / "rows.toml"
    file.write_text(f'[[row]]\nalgorithm = "a2c"\n{entry}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        run.read_rows(file)


@pytest.mark.parametrize("algorithm", ["a2c", "a3c", "ddpg", "td3"])
def test_the_pages_of_the_methods_have_the_same_figures(algorithm: str) -> None:
    page = (run.HERE.parent / "methods" / f"{algorithm}.md").read_text(encoding="utf-8")
    expected = []
    for row in run.read_rows(run.HERE / "rows.toml")[0]:
        if row.algorithm == algorithm:
            mean = fmean(float(line["mean"]) for line in run.finished(row, run.HERE).values())
            expected.append(f"| {row.environment} | {row.steps:,} | {mean:.1f} | {row.reference} |")
    section = page.split("\n## Results\n")[1].split("\n## ")[0]
    assert [line for line in section.splitlines() if line.startswith("|")][2:] == expected


def test_the_page_is_what_the_runner_writes() -> None:
    rows, sources = run.read_rows(run.HERE / "rows.toml")
    page = (run.HERE.parent / "results.md").read_text(encoding="utf-8")
    assert page == run.page(rows, sources, run.HERE), "write it anew: python docs/results/run.py --table"


def test_every_recipe_has_a_row() -> None:
    names = {row.name for row in run.read_rows(run.HERE / "rows.toml")[0]}
    recipes = {
        f"{file.stem}/{environment}"
        for file in (Path(sbac.__file__).parent / "recipes").glob("*.toml")
        for environment in run.tomllib.loads(file.read_text(encoding="utf-8"))
    }
    assert recipes <= names

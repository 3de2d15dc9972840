"""The benchmarks run, and their page says what was measured. How fast anything is, no test says."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from statistics import median

import pytest

from tests.benchmarks import table
from tests.benchmarks.__main__ import main, page, ratios_of
from tests.benchmarks.scaling import PLOTS
from tests.benchmarks.scaling import main as scaling
from tests.benchmarks.work import WORKS


def test_a_work_is_measured_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "not" / "there"
    main(["predict/64", "--repeats", "1", "--share", "0.01", "--out", str(folder)])
    with (folder / "benchmarks.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["work"], row["side"]) for row in rows] == [
        ("predict/64", "sbac"),
        ("predict/64", "stable-baselines3"),
    ]
    assert all(float(row["rate"]) > 0 for row in rows)
    assert WORKS["predict/64"].title in (folder / "benchmarks.md").read_text(encoding="utf-8")
    assert "of stable-baselines3" in capsys.readouterr().out


def test_a_later_measurement_replaces_its_own_lines_only(tmp_path: Path) -> None:
    path, columns = tmp_path / "table.csv", ("work", "rate")
    first = [{"work": "a", "rate": "1"}, {"work": "b", "rate": "2"}]
    assert table.renew(path, columns, ["a", "b"], lambda: first) == first
    rows = table.renew(path, columns, ["a"], lambda: [{"work": "a", "rate": "3"}])
    assert rows == table.read(path) == [{"work": "b", "rate": "2"}, {"work": "a", "rate": "3"}]
    assert table.read(tmp_path / "none.csv") == []


def test_ratios_are_those_of_neighbours() -> None:
    def row(side: str, repeat: int, rate: float) -> dict[str, str]:
        return {
            "work": "predict/64",
            "side": side,
            "repeat": str(repeat),
            "rate": str(rate),
            "machine": "m",
            "versions": "v",
        }

    rows = [
        *(row("sbac", repeat, rate) for repeat, rate in enumerate((10, 30, 80))),
        *(row("stable-baselines3", repeat, rate) for repeat, rate in enumerate((5, 10, 20))),
    ]
    ratios, own, other = ratios_of("predict/64", WORKS["predict/64"], rows)["stable-baselines3"]
    assert (ratios, own, other) == ([2, 3, 4], 30, 10)
    assert "| stable-baselines3 | **3.00** (2.00 to 4.00) | 6 | 30 calls/s | 10 calls/s |" in page(rows)


def test_the_page_and_the_readme_say_what_was_measured() -> None:
    root = Path(__file__).parents[1]
    rows = table.read(root / "docs/benchmarks.csv")
    assert page(rows) == (root / "docs/benchmarks.md").read_text(encoding="utf-8")
    section = (root / "README.md").read_text(encoding="utf-8").split("## Speed")[1].split("## Results")[0]
    named = {work.title: name for name, work in WORKS.items()}
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(lines) > 5
    for title, side, said in lines:
        found = ratios_of(named[title], WORKS[named[title]], rows)
        ratios, *_ = next(found[other] for other in found if other.lower() == side.lower())
        assert said == f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})", title


@pytest.mark.parametrize("name", [name for name in WORKS if name not in ("import", "replay/sample")])  # which take long
def test_each_work_of_ours_runs(name: str) -> None:
    first = next(iter(WORKS[name].sides))
    assert WORKS[name].sides[first](0.02) > 0


def test_an_unknown_work_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["a2c/Cartpole"])
    assert "there is no work a2c/Cartpole; known: a2c/CartPole-8" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "index"), [*((name, 0) for name in PLOTS), ("batch", -1)])
def test_each_plot_of_ours_has_its_points(name: str, index: int, capsys: pytest.CaptureFixture[str]) -> None:
    first, x = next(iter(PLOTS[name].sides)), PLOTS[name].xs[index]
    scaling(["--point", name, first, str(x)])
    value = float(capsys.readouterr().out.split()[-1])
    # Of how fast this machine is, nothing is said; and beside other tests, memory may be had that was in use before.
    assert 0 < value < math.inf or (name == "memory" and value == 0)


def test_plots_are_drawn_from_what_was_measured(tmp_path: Path) -> None:
    with (tmp_path / "scaling.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("plot", "side", "x", "repeat", "value"))
        writer.writerows(
            (name, side, x, repeat, x + repeat)
            for name, plot in PLOTS.items()
            for side in plot.sides
            for x in plot.xs
            for repeat in range(2)
        )
    scaling(["--plot", "--out", str(tmp_path)])
    picture = tmp_path / "scaling.svg"
    first = picture.read_bytes()
    scaling(["--plot", "--out", str(tmp_path)])
    assert picture.read_bytes() == first  # the same numbers, the same picture
    assert first.count(b'<g id="axes_') == len(PLOTS)

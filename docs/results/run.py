"""Train and evaluate the rows of the table of results, and write the table.

    python docs/results/run.py                          # all that is missing, one process a core
    python docs/results/run.py td3/Pendulum-v1 --jobs 1
    python docs/results/run.py --table                  # only write the table and the curves anew

Each seed of a row is one run: `sbac train ALGORITHM ENVIRONMENT --seed S`, then `sbac eval` of its last model over 100
episodes with the seed 1000 + S. What is finished is skipped; what was interrupted goes on from its newest checkpoint.
A longer table needs only more rows in rows.toml.

Written are, in the folder of this file, ALGORITHM_ENVIRONMENT.csv with one line for each seed and
ALGORITHM_ENVIRONMENT.png with the learning curve, and beside the folder the page results.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import sbac
from sbac.hold import Hold
from sbac.plotting import plot_learning_curve
from sbac.recipes import read_recipe

HERE = Path(__file__).parent
EPISODES, EVALUATION_SEED = 100, 1000
COLUMNS = (
    *("algorithm", "environment", "seed", "steps", "episodes", "mean", "deviation"),
    *("command", "evaluation", "arguments", "python", "sbac", "torch", "numpy", "gymnasium"),
)
RETURN = re.compile(r"^return (\S+) \+- (\S+) ", re.MULTILINE)

# The page's text. Its table comes after the first part.
HEAD = f"""\
<!-- Written by docs/results/run.py, from docs/results/rows.toml and the CSV files beside it. -->

# Results

Each seed S is one training with the [recipe](guide/hyperparameters.md#recipes), and then {EPISODES} episodes of its
last model with deterministic actions: their mean return, and the deviation over these episodes. The environments of the
evaluation begin with the seed {EVALUATION_SEED} + S. Every seed that was run is in the table, whatever came of it.
A3C's workers run freely, so that its runs do not repeat bit for bit; the others do, on one machine.

| run | steps | seed: mean ± deviation | mean over seeds | others report |
|---|---|---|---|---|"""
REPEAT = """
The rows are in `docs/results/rows.toml`. This trains what is missing, evaluates it, and writes this page anew; what was
interrupted goes on where it was:

```console
$ python docs/results/run.py
```

Beside the script lies one CSV file for each row that was run, with the versions and the arguments of each seed.

## Sources

What others report is given as they give it: other implementations, other random numbers, often fewer seeds.
"""
CURVES = """## Learning curves

The mean over seeds of the evaluations during training, with a band of one standard deviation over seeds."""


@dataclass(frozen=True)
class Row:
    """An algorithm on an environment."""

    algorithm: str
    environment: str
    steps: int
    is_recipe: bool  # whether the number of steps is the recipe's own
    seeds: tuple[int, ...]
    arguments: str  # of the recipe, as JSON: other arguments make other results
    n_workers: int  # processes that a run keeps busy
    reference: str
    source: str
    remark: str

    @property
    def name(self) -> str:
        """As on the command line."""
        return f"{self.algorithm}/{self.environment}"

    @property
    def file(self) -> str:
        """The name of its files, without their ending."""
        return f"{self.algorithm}_{self.environment}".replace("/", "-")

    def command(self, seed: int | str) -> str:
        """What a person types to repeat a run."""
        steps = "" if self.is_recipe else f" --steps {self.steps}"
        return f"sbac train {self.algorithm} {self.environment} --seed {seed}{steps}"


def read_rows(file: Path) -> tuple[list[Row], dict[str, dict[str, str]]]:
    """The rows, and the sources of the figures beside them.

    Raises:
        ValueError: A row has no recipe and says no steps, or names a source that is not there.
    """
    content = tomllib.loads(file.read_text(encoding="utf-8"))
    rows = []
    for entry in content["row"]:
        recipe = read_recipe(entry["algorithm"], entry["environment"])
        recommended = recipe.pop("n_timesteps", None)
        steps = entry.get("steps", recommended)
        where = f"{file.name}: {entry['algorithm']}/{entry['environment']}"
        if steps is None:
            raise ValueError(f"{where} has no recipe: add one to sbac/recipes, or say steps")
        source = entry.get("source", "")
        if source and source not in content.get("sources", {}):
            raise ValueError(f"{where} names the source {source!r}, which [sources.{source}] should describe")
        rows.append(
            Row(
                entry["algorithm"],
                entry["environment"],
                steps,
                steps == recommended,
                tuple(entry.get("seeds", (0, 1, 2))),
                json.dumps(recipe, sort_keys=True),
                int(recipe.get("n_workers", 1)),
                entry.get("reference", ""),
                source,
                entry.get("remark", ""),
            )
        )
    return rows, content.get("sources", {})


def finished(row: Row, folder: Path) -> dict[int, dict[str, str]]:
    """The lines of a row's CSV, by seed: those of the present recipe only."""
    path = folder / f"{row.file}.csv"
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        lines = {int(line["seed"]): line for line in csv.DictReader(file)}
    return {
        seed: line
        for seed, line in lines.items()
        if int(line["steps"]) == row.steps and line["arguments"] == row.arguments
    }


class Runner:
    """Trains and evaluates what is missing, several runs at a time."""

    def __init__(self, runs: Path, out: Path, jobs: int) -> None:
        self.runs, self.out, self.jobs = runs, out, jobs
        self._is_stopped = False
        self._busy = 0
        self._change = threading.Condition()
        self._children: set[subprocess.Popen[str]] = set()

    def run(self, rows: Sequence[Row]) -> int:
        """Work until all is done; returns the number of runs that failed. Ctrl-C lets each save and go on later."""
        tasks = [(row, seed) for row in rows for seed in row.seeds if seed not in finished(row, self.out)]
        with ThreadPoolExecutor(self.jobs) as pool:
            done = [pool.submit(self._one, row, seed) for row, seed in tasks]
            try:
                return sum(not future.result() for future in done)
            except KeyboardInterrupt:
                print("stopping: each run saves its state; the same command goes on", flush=True)
                with self._change:
                    self._is_stopped = True
                    for child in self._children:
                        child.send_signal(signal.SIGTERM)
                    self._change.notify_all()
                raise

    def _one(self, row: Row, seed: int) -> bool:
        with self._processors(row.n_workers) as may_run:
            if not may_run:
                return False
            folder = self.runs / f"{row.file}_{seed}"
            log = folder.with_name(f"{folder.name}.log")
            log.parent.mkdir(parents=True, exist_ok=True)
            say = f"{row.name}, seed {seed}"
            # A folder goes on with the arguments that it was begun with.
            recipe = folder.with_name(f"{folder.name}.arguments")
            if folder.exists() and recipe.exists() and recipe.read_text(encoding="utf-8") != row.arguments:
                print(f"{say}: {folder} was begun with other arguments; remove it to train anew", flush=True)
                return False
            recipe.write_text(row.arguments, encoding="utf-8")
            if trained_steps(folder) < row.steps:
                begun = (folder / "config.json").exists()
                print(f"{say}: {'goes on' if begun else 'begins'}; its output: {log}", flush=True)
                more = ["--resume", str(folder)] if begun else [*row.command(seed).split()[2:], "--out", str(folder)]
                if self._sbac(["train", *more], log) is None:
                    print(f"{say}: the training did not end well; see {log}", flush=True)
                    return False
            evaluation = ["eval", str(folder / "model.zip"), "--seed", str(EVALUATION_SEED + seed)]
            printed = self._sbac([*evaluation, "--episodes", str(EPISODES)], log)
            found = RETURN.search(printed or "")
            if found is None:
                print(f"{say}: no evaluation; see {log}", flush=True)
                return False
            self._write(row, seed, found[1], found[2])
            print(f"{say}: {found[1]} +- {found[2]} over {EPISODES} episodes", flush=True)
        return True

    @contextmanager
    def _processors(self, wanted: int) -> Iterator[bool]:
        """Wait until as many processes may run as a run keeps busy; False if all is to end."""
        wanted = min(wanted, self.jobs)
        with self._change:
            self._change.wait_for(lambda: self._is_stopped or self._busy + wanted <= self.jobs)
            self._busy += wanted
        try:
            yield not self._is_stopped
        finally:
            with self._change:
                self._busy -= wanted
                self._change.notify_all()

    def _sbac(self, arguments: Sequence[str], log: Path) -> str | None:
        """Run a command of sbac; returns what it printed, or None if it failed."""
        with log.open("a", encoding="utf-8") as file:
            start = file.tell()
            with self._change:
                if self._is_stopped:
                    return None
                # In a session of its own, so that Ctrl-C reaches it once: from here.
                child = subprocess.Popen(
                    [sys.executable, "-m", "sbac", *arguments],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    text=True,
                    start_new_session=True,
                )
                self._children.add(child)
            code = child.wait()
            with self._change:
                self._children.discard(child)
        with log.open(encoding="utf-8") as file:
            file.seek(start)
            return file.read() if code == 0 else None

    def _write(self, row: Row, seed: int, mean: str, deviation: str) -> None:
        """Add a line to the row's CSV, replacing the file as a whole."""
        line: dict[str, Any] = {
            "algorithm": row.algorithm,
            "environment": row.environment,
            "seed": seed,
            "steps": row.steps,
            "episodes": EPISODES,
            "mean": mean,
            "deviation": deviation,
            "command": row.command(seed),
            "evaluation": f"sbac eval RUN/model.zip --seed {EVALUATION_SEED + seed}",
            "arguments": row.arguments,
            "python": platform.python_version(),
            "sbac": sbac.__version__,
        }
        line |= {name: metadata.version(name) for name in ("torch", "numpy", "gymnasium")}
        with self._change:
            lines = {**finished(row, self.out), seed: line}
            path = self.out / f"{row.file}.csv"
            temporary = path.with_suffix(".tmp")
            with temporary.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(lines[seed] for seed in sorted(lines))
            temporary.replace(path)


def trained_steps(folder: Path) -> int:
    """How far the model in a run's folder has come."""
    with suppress(FileNotFoundError, sbac.ArchiveError):
        return int(sbac.inspect(folder / "model.zip")["meta"]["counters"]["num_timesteps"])
    return 0


def draw_curve(row: Row, runs: Path, out: Path) -> None:
    """The mean and the band of a row's learning curves, where the folders of all its seeds are at hand."""
    folders = [runs / f"{row.file}_{seed}" for seed in row.seeds]
    if set(row.seeds) <= finished(row, out).keys() and all(trained_steps(folder) >= row.steps for folder in folders):
        plot_learning_curve(folders, out / f"{row.file}.png")


def page(rows: Sequence[Row], sources: dict[str, dict[str, str]], out: Path) -> str:
    """The page results.md: the table, where its figures are from, and the curves."""
    results = {row.name: finished(row, out) for row in rows}
    lines = [HEAD]
    for row in rows:
        known = results[row.name]
        seeds = [
            f"{seed}:&nbsp;{float(known[seed]['mean']):.1f}&nbsp;±&nbsp;{float(known[seed]['deviation']):.1f}"
            if seed in known
            else f"{seed}:&nbsp;not&nbsp;run"
            for seed in row.seeds
        ]
        means = [float(known[seed]["mean"]) for seed in row.seeds if seed in known]
        whole = f"{statistics.fmean(means):.1f}" if len(means) == len(row.seeds) else "-"
        reference = f"{row.reference} [[{row.source}](#sources)]" if row.source else row.reference or "-"
        each = "<br>".join(seeds) if means else "not run"
        run = f"{row.algorithm.upper()} on {row.environment}<br>`{row.command('S')}`"
        lines.append(f"| {' | '.join((run, f'{row.steps:,}', each, whole, reference))} |")
    remarks = [(row, row.remark) for row in rows if row.remark]
    lines += ["", *(f"- {row.algorithm.upper()} on {row.environment}: {remark}" for row, remark in remarks)]
    lines.append(REPEAT)
    lines += [f"- **{name}**: [{about['title']}]({about['url']}). {about['note']}" for name, about in sources.items()]
    drawn = [row for row in rows if (out / f"{row.file}.png").exists() and len(results[row.name]) >= len(row.seeds)]
    lines += ["", CURVES] if drawn else []
    for row in drawn:
        title = f"{row.algorithm.upper()} on {row.environment}"
        lines += ["", f"![Learning curve of {title}]({out.name}/{row.file}.png)"]
    return "\n".join(lines) + "\n"


def write(rows: list[Row], chosen: list[Row], sources: dict[str, dict[str, str]], runs: Path, out: Path) -> None:
    """Write the page, and the curves of the chosen rows."""
    for row in chosen:
        draw_curve(row, runs, out)
    (out.parent / "results.md").write_text(page(rows, sources, out), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="ALGORITHM/ENVIRONMENT", help="the rows to run (default: all)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time (default: the cores)"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/results"), help="folder of the trainings")
    parser.add_argument("--rows", type=Path, default=HERE / "rows.toml", help="the rows (default: those of the manual)")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of CSV and PNG; results.md lies beside it")
    parser.add_argument("--table", action="store_true", help="train nothing, and write the table anew")
    options = parser.parse_args(arguments)
    rows, sources = read_rows(options.rows)
    unknown = set(options.names) - {row.name for row in rows}
    if unknown or options.jobs < 1:
        parser.error(f"no such row: {', '.join(sorted(unknown))}" if unknown else "--jobs must be at least 1")
    chosen = [row for row in rows if not options.names or row.name in options.names]

    options.out.mkdir(parents=True, exist_ok=True)
    if options.table:
        write(rows, chosen, sources, options.runs, options.out)
        return 0
    options.runs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(Hold(options.runs / "runner.lock", "another runner works there"))
        except ValueError as error:
            parser.error(f"--runs {options.runs}: {error}; wait for it, or name another folder")
        before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
        try:
            failures = Runner(options.runs, options.out, options.jobs).run(chosen)
        except KeyboardInterrupt:
            failures = 1
        finally:
            signal.signal(signal.SIGTERM, before)
            write(rows, chosen, sources, options.runs, options.out)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

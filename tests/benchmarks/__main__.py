"""How fast sbac is, against its peers and against what cannot be avoided. Run on idle cores.

    python -m tests.benchmarks                     # everything, five times, in turn
    python -m tests.benchmarks a2c/CartPole-8 --repeats 9
    python -m tests.benchmarks --table             # only write the page anew

Each side of a work runs in a process of its own, one after the other, again and again; what counts is the ratio of
neighbours, since machines are not equally fast all day. A side whose library is not installed is skipped, by name.
Written are docs/benchmarks.csv, with a line for each measurement, and the page docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from statistics import median

from tests.benchmarks import table
from tests.benchmarks.work import WORKS, Work

DOCS = Path(__file__).parents[2] / "docs"
COLUMNS = ("work", "side", "repeat", "rate", "unit", "machine", "versions")

HEAD = """\
<!-- Written by python -m tests.benchmarks, from docs/benchmarks.csv. -->

# Benchmarks

Speeds are ratios: how often the speed of the other side sbac reaches, both measured in turn in one run, each in a
process of its own with the same networks, batches, seeds and number of threads. Given is the median over the repeats,
and from where to where they went; on a machine shared with others, as this one, that may be far. The absolute speeds
beside them hold for it only:

> {machine}<br>{versions}

| work | against | ratio | aimed at | sbac | other |
|---|---|---|---|---|---|"""

TAIL = """
What is aimed at is what a prototype suggested before the library was built; where the ratio is below it, that is still
to be done. Repeat it, with the extra `peers`, on a machine that has nothing else to do:

```console
$ python -m tests.benchmarks
```

## How cost grows

Each point is the median of some repeats, and the band goes from the least to the largest. Both axes are logarithmic,
so that cost that grows as the work does is a straight line. On the same machine:

![Steps a second over environments and workers, time of an update over batch and width, memory over the size of a
buffer](scaling.svg)

```console
$ python -m tests.benchmarks.scaling
```
"""


@contextmanager
def disturbance(wanted: bool) -> Iterator[None]:
    """Another process that keeps one core busy."""
    if not wanted:
        yield
        return
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        busy.kill()
        busy.wait()


def measure(name: str, side: str, share: float) -> float | None:
    """The rate of one side, alone in a process; None where its library is missing."""
    work = WORKS[name]
    variables = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in variables}
    if work.threads is not None:
        environment |= dict.fromkeys(variables, str(work.threads))
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.work", name, side, "--share", str(share)]
    with disturbance(work.is_disturbed):
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode == 0:
        return float(done.stdout.split()[-1])
    if "ModuleNotFoundError" in done.stderr:
        return None
    raise RuntimeError(f"{name}, {side}: {done.stderr.strip()[-2000:]}")


def run(names: Sequence[str], repeats: int, share: float) -> list[dict[str, str]]:
    """Measure all sides of these works in turn, and print what comes out."""
    machine = f"{_processor()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"
    packages = ("sbac", "torch", "numpy", "gymnasium", "stable-baselines3", "sbx-rl")
    versions = ", ".join(f"{package} {version}" for package in packages if (version := _version(package)))
    print(f"{machine}\n{versions}")
    rows = []
    for name in names:
        work = WORKS[name]
        missing: set[str] = set()
        print(f"\n{work.title}")
        for repeat in range(repeats):
            for side in work.sides:
                rate = None if side in missing else measure(name, side, share)
                if rate is None:
                    if side not in missing:
                        print(f"  {side}: not installed, skipped")
                    missing.add(side)
                    continue
                row = (name, side, str(repeat), f"{rate:.6g}", work.unit, machine, versions)
                rows.append(dict(zip(COLUMNS, row, strict=True)))
        for line in _lines(name, work, rows):
            print(f"  {line}")
    return rows


def _lines(name: str, work: Work, rows: Sequence[dict[str, str]]) -> list[str]:
    lines = []
    for side, (ratios, own, other) in ratios_of(name, work, rows).items():
        spread = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"{spread} of {side}: {_rate(own)} to {_rate(other)} {work.unit} a second")
    return lines


def ratios_of(name: str, work: Work, rows: Sequence[dict[str, str]]) -> dict[str, tuple[list[float], float, float]]:
    """For each other side: the ratios of neighbours, and the medians of both rates."""
    rates: dict[str, dict[str, float]] = {side: {} for side in work.sides}
    for row in rows:
        if row["work"] == name:
            rates[row["side"]][row["repeat"]] = float(row["rate"])
    first, *others = work.sides
    found = {}
    for side in others:
        pairs = [(rates[first][repeat], rate) for repeat, rate in rates[side].items() if repeat in rates[first]]
        if pairs:
            found[side] = [a / b for a, b in pairs], median(a for a, _ in pairs), median(b for _, b in pairs)
    return found


def page(rows: Sequence[dict[str, str]]) -> str:
    """The page benchmarks.md."""
    lines = [HEAD.format(machine=rows[0]["machine"], versions=rows[0]["versions"])]
    for name, work in WORKS.items():
        for side, (ratios, own, other) in ratios_of(name, work, rows).items():
            spread = f"**{median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})"
            speeds = f"{_rate(own)} {work.unit}/s | {_rate(other)} {work.unit}/s"
            lines.append(f"| {work.title} | {side} | {spread} | {work.wanted or '-'} | {speeds} |")
    return "\n".join(lines) + "\n" + TAIL


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write table and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="WORK", help=f"what to measure (default: all): {', '.join(WORKS)}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--share", type=float, default=1.0, help="how much of each work to do; 1 for figures")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of benchmarks.csv and benchmarks.md")
    parser.add_argument("--table", action="store_true", help="measure nothing, and write the page anew")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - set(WORKS)
    if unknown:
        parser.error(f"there is no work {', '.join(sorted(unknown))}; known: {', '.join(WORKS)}")
    path = options.out / "benchmarks.csv"
    if options.table:
        rows = table.read(path)
    else:
        names = options.names or list(WORKS)
        rows = table.renew(path, COLUMNS, names, lambda: run(names, options.repeats, options.share))
    if rows:
        (options.out / "benchmarks.md").write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()

"""How cost grows with the work: environments, batches, widths, buffers, workers. Run on idle cores.

    python -m tests.benchmarks.scaling               # measures; writes docs/scaling.csv and docs/scaling.svg
    python -m tests.benchmarks.scaling workers       # one of the plots; keeps the rest
    python -m tests.benchmarks.scaling --plot        # only draws them anew

Every point is measured in a process of its own, the sides in turn; drawn are median and range of the repeats.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces

from tests.benchmarks import table
from tests.benchmarks.a3c import workers_speed
from tests.benchmarks.work import a2c, floor

DOCS = Path(__file__).parents[2] / "docs"
COLUMNS = ("plot", "side", "x", "repeat", "value")
MIB = 2**20


class Plot(NamedTuple):
    """One quantity over another."""

    title: str
    x_label: str
    y_label: str
    xs: Sequence[int]
    sides: Mapping[str, Callable[[int], float]]


def _speed(side: str, is_native: bool) -> Callable[[int], float]:
    """Environment steps a second, of some environments."""
    return lambda n: a2c(n, is_native, steps=max(4_000, 100 * n))[side](1.0)


def _update(side: str, of_batch: bool) -> Callable[[int], float]:
    """Milliseconds that an update of TD3 takes, by the size of a batch, or of a hidden layer."""

    def milliseconds(x: int) -> float:
        batch, width = (x, 256) if of_batch else (256, x)
        return 1_000 / floor(batch, (width, width), 17, 6)[side](0.5)

    return milliseconds


def _resident() -> int:
    """Bytes of memory that this process has in use."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


OBS, ACTION = spaces.Box(-np.inf, np.inf, (17,), np.float64), spaces.Box(-1, 1, (6,), np.float32)
AT_ONCE = 1_000  # environments that fill a buffer


def _memory_of_ours(size: int) -> float:
    from sbac.adapters import Step
    from sbac.buffers import ReplayBuffer

    rng = np.random.default_rng(0)
    before = _resident()
    buffer = ReplayBuffer(size, OBS, ACTION, n_envs=AT_ONCE)
    never, valid = np.zeros(AT_ONCE, bool), np.ones(AT_ONCE, bool)
    obs = rng.normal(size=(AT_ONCE, 17))
    for _ in range(size // AT_ONCE):
        after, action = rng.normal(size=(AT_ONCE, 17)), rng.uniform(-1, 1, (AT_ONCE, 6)).astype(np.float32)
        buffer.add(obs, action, Step(after, np.ones(AT_ONCE), never, never, after, valid, [{}] * AT_ONCE))
        obs = after
    return (_resident() - before) / MIB


def _memory_of_theirs(size: int) -> float:
    from stable_baselines3.common.buffers import ReplayBuffer

    rng = np.random.default_rng(0)
    before = _resident()
    buffer = ReplayBuffer(size, OBS, ACTION, device="cpu", n_envs=AT_ONCE)
    obs = rng.normal(size=(AT_ONCE, 17))
    infos: list[dict[str, Any]] = [{} for _ in range(AT_ONCE)]
    for _ in range(size // AT_ONCE):
        after, action = rng.normal(size=(AT_ONCE, 17)), rng.uniform(-1, 1, (AT_ONCE, 6)).astype(np.float32)
        buffer.add(obs, after, action, np.ones(AT_ONCE), np.zeros(AT_ONCE), infos)
        obs = after
    return (_resident() - before) / MIB


SB3, PRODUCTS = "stable-baselines3", "the matrix products alone"
PLOTS: dict[str, Plot] = {
    "environments": Plot(
        "A2C, CartPole-v1",
        "environments",
        "steps a second",
        (1, 8, 64, 512),
        {
            "sbac, natively vectorised": _speed("sbac", is_native=True),
            "sbac": _speed("sbac", is_native=False),
            SB3: _speed(SB3, is_native=False),
        },
    ),
    "batch": Plot(
        "TD3, update, 256-256",
        "batch",
        "milliseconds",
        (32, 64, 128, 256, 512, 1024),
        {side: _update(side, of_batch=True) for side in ("sbac", PRODUCTS)},
    ),
    "width": Plot(
        "TD3, update, batch 256",
        "width of both hidden layers",
        "milliseconds",
        (32, 64, 128, 256, 512),
        {side: _update(side, of_batch=False) for side in ("sbac", PRODUCTS)},
    ),
    "memory": Plot(
        "Full replay buffer, HalfCheetah-v5",
        "transitions",
        "MiB",
        (10_000, 30_000, 100_000, 300_000, 1_000_000),
        {"sbac": _memory_of_ours, SB3: _memory_of_theirs},
    ),
    "workers": Plot(
        "A3C, CartPole-v1",
        "workers",
        "steps a second",
        (1, 2, 4),
        {
            "8 environments each": lambda n: workers_speed(n, 8, 20, 40_000),
            "1 environment each": lambda n: workers_speed(n, 1, 20, 10_000),
        },
    ),
}


def measure(names: Sequence[str], repeats: int) -> list[dict[str, str]]:
    """Measure all points in turn, each in a process of its own, and print them."""
    this = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.scaling", "--point"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    rows = []
    for name in names:
        plot = PLOTS[name]
        print(f"\n{plot.title}: {plot.y_label}")
        for x in plot.xs:
            for repeat in range(repeats):
                for side in plot.sides:
                    done = subprocess.run([*this, name, side, str(x)], capture_output=True, text=True, env=environment)
                    if "ModuleNotFoundError" in done.stderr:
                        continue
                    if done.returncode:
                        raise RuntimeError(f"{name}, {side}, {x}: {done.stderr.strip()[-2000:]}")
                    values = (name, side, str(x), str(repeat), f"{float(done.stdout.split()[-1]):.5g}")
                    rows.append(dict(zip(COLUMNS, values, strict=True)))
            for side in plot.sides:
                found = _values(rows, name, side, x)
                if found:
                    print(f"  {plot.x_label} {x:>8,}, {side}: {median(found):,.5g}", flush=True)
    return rows


def _values(rows: Sequence[dict[str, str]], name: str, side: str, x: int) -> list[float]:
    key = {"plot": name, "side": side, "x": str(x)}
    return [float(row["value"]) for row in rows if all(row[column] == value for column, value in key.items())]


def draw(rows: Sequence[dict[str, str]], path: Path) -> None:
    """Draw a plot for each quantity: both axes logarithmic, so that what grows as the work does is a straight line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "scaling"  # the same file from the same numbers
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.4))
    for axis, (name, plot) in zip(axes.flat, PLOTS.items(), strict=False):
        own = iter(("#0072b2", "#d55e00"))
        for side in plot.sides:
            colour = "#7f7f7f" if side in (SB3, PRODUCTS) else next(own)
            points = [(x, found) for x in plot.xs if (found := _values(rows, name, side, x))]
            xs = [x for x, _ in points]
            axis.plot(xs, [median(found) for _, found in points], "o-", color=colour, label=side, markersize=4)
            bounds = [min(found) for _, found in points], [max(found) for _, found in points]
            axis.fill_between(xs, *bounds, color=colour, alpha=0.2, linewidth=0)
        axis.set(title=plot.title, xlabel=plot.x_label, ylabel=plot.y_label, xscale="log", yscale="log")
        axis.set_xticks(plot.xs, [f"{x:,}" if x < 10_000 else f"{x // 1_000:,}k" for x in plot.xs], minor=False)
        axis.set_xticks([], minor=True)
        axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axis.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda y, _: f"{y:,.6g}"))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize="small")
    for axis in axes.flat[len(PLOTS) :]:
        axis.remove()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="PLOT", help=f"which (default: all): {', '.join(PLOTS)}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of scaling.csv and scaling.svg")
    parser.add_argument("--plot", action="store_true", help="measure nothing, and only draw")
    parser.add_argument("--point", nargs=3, metavar=("PLOT", "SIDE", "X"), help="measure this point here, and print it")
    options = parser.parse_args(arguments)
    if options.point:
        name, side, x = options.point
        print(PLOTS[name].sides[side](int(x)))
        return
    unknown = set(options.names) - set(PLOTS)
    if unknown:
        parser.error(f"there is no plot {', '.join(sorted(unknown))}; known: {', '.join(PLOTS)}")
    path = options.out / "scaling.csv"
    if options.plot:
        rows = table.read(path)
    else:
        names = options.names or list(PLOTS)
        rows = table.renew(path, COLUMNS, names, lambda: measure(names, options.repeats))
    draw(rows, options.out / "scaling.svg")


if __name__ == "__main__":
    main()

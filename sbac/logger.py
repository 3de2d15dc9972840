"""Where the numbers of a run go: terminal table, text, CSV, JSON and TensorBoard, any of them at once.

Values are gathered with `Logger.record` and written with `Logger.dump`, one row a dump. Outputs are additive:
adding one never replaces another. Files are appended to, so that a resumed run keeps one curve.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import itertools
import json
import math
import os
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TextIO

import numpy as np

PathLike = str | os.PathLike[str]

FORMATS = ("stdout", "log", "csv", "json", "tensorboard")


@dataclass(frozen=True)
class Video:
    """Moving pictures for TensorBoard, several of them side by side, `fps` frames a second.

    Frames are (n_videos, time, 1 or 3 channels, height, width): uint8 in [0, 255] or float in [0, 1].
    """

    frames: Any
    fps: float


@dataclass(frozen=True)
class Image:
    """A picture for TensorBoard.

    Attributes:
        image: uint8 in [0, 255] or float in [0, 1].
        dataformats: What its axes are: "CHW", "HWC" or "HW".
    """

    image: Any
    dataformats: str


@dataclass(frozen=True)
class Figure:
    """A `matplotlib.figure.Figure` for TensorBoard, and whether to close it once it is written."""

    figure: Any
    close: bool


@dataclass(frozen=True)
class HParam:
    """Hyperparameters for TensorBoard.

    Attributes:
        hparam_dict: The hyperparameters, by name.
        metric_dict: The logged keys to show beside them; their values are ignored.
    """

    hparam_dict: Mapping[str, Any]
    metric_dict: Mapping[str, float]


class KVWriter:
    """A place that rows are written to. Subclass it to write elsewhere, and add it with `Logger.add_output`.

    Attributes:
        name: What `exclude` calls this output.
        destination: What a warning calls it: usually the file.
    """

    name: str = ""
    destination: str = ""

    def write(self, row: Mapping[str, Any], step: int = 0) -> None:
        """Write one row; an OSError is turned into one warning by the logger, and the run goes on.

        Args:
            row: Key to Python number, text or picture. A kind that can't be shown here is skipped.
            step: Number of environment steps so far.
        """
        raise NotImplementedError(f"{type(self).__name__} must define write(row, step)")

    def write_sequence(self, sequence: list[str]) -> None:
        """Write a line of text made of `sequence`, where lines of text have a place."""

    def close(self) -> None:
        """Let go of what is open. A later write opens it again."""

    def get_state(self) -> dict[str, int]:
        """How far this output has come, as plain data, for a full checkpoint."""
        return {}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Take back what was written since `get_state`, in a run that is resumed: it is about to be written again."""


class HumanOutputFormat(KVWriter):
    """A table for people: drawn in a terminal, plain aligned text in a pipe, a file or a narrow window.

    Args:
        filename_or_file: A path to append to (output "log"), or a text stream (output "stdout").
            None is whatever `sys.stdout` is at the time: progress bars and notebooks redirect it.
    """

    def __init__(self, filename_or_file: PathLike | TextIO | None = None) -> None:
        self._path: Path | None = None
        self._stream: TextIO | None = None
        if isinstance(filename_or_file, (str, os.PathLike)):
            self._path = Path(filename_or_file)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self.name, self.destination = "log", str(self._path)
        else:
            self._stream = filename_or_file
            self.name, self.destination = "stdout", "standard output"

    def write(self, row: Mapping[str, Any], step: int = 0) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for key, value in _plain(row).items():
            section, name = key.split("/", 1) if "/" in key else ("", key)
            sections.setdefault(section, []).append(("  " + name if section else name, _readable(value)))
        if not sections:
            return

        sections = {section: sorted(sections[section]) for section in sorted(sections)}
        name_width = max(len(text) for section, rows in sections.items() for text in (section, *dict(rows)))
        value_width = max(len(value) for rows in sections.values() for _, value in rows)
        columns, borders = shutil.get_terminal_size().columns, 7
        if self._is_terminal() and name_width + value_width + borders <= columns:
            self._put(_table(sections, columns))
            return
        lines: list[str] = []
        for section, rows in sections.items():
            lines += [section] if section else []
            lines += [f"{name:<{name_width}}  {value:>{value_width}}" for name, value in rows]
        self._put("\n".join(lines) + "\n\n")

    def write_sequence(self, sequence: list[str]) -> None:
        self._put(" ".join(sequence) + "\n")

    def get_state(self) -> dict[str, int]:
        return {} if self._path is None or not self._path.exists() else {"bytes": self._path.stat().st_size}

    def set_state(self, state: Mapping[str, int]) -> None:
        if self._path is not None and self._path.exists() and state.get("bytes", math.inf) < self._path.stat().st_size:
            os.truncate(self._path, state["bytes"])

    def _is_terminal(self) -> bool:
        stream = self._stream or sys.stdout
        encoding = getattr(stream, "encoding", None) or ""
        return self._path is None and stream.isatty() and encoding.lower().startswith("utf")

    def _put(self, text: str) -> None:
        if self._path is not None:
            with self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
            return
        stream = self._stream or sys.stdout
        encoding = getattr(stream, "encoding", None) or "utf-8"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()


class _LinesOutputFormat(KVWriter):
    """A file of one line a dump. Existing lines stay, save a last one that a kill left unfinished."""

    def __init__(self, filename: PathLike) -> None:
        self._path = Path(filename)
        self.destination = str(self._path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a+b") as file:
            file.seek(0)
            file.truncate(sum(len(line) for line in file if line.endswith(b"\n")))

    def get_state(self) -> dict[str, int]:
        with self._path.open("rb") as file:
            return {"lines": sum(1 for _ in file)}

    def set_state(self, state: Mapping[str, int]) -> None:
        with self._path.open("r+b") as file:
            file.truncate(sum(len(line) for line in itertools.islice(file, state["lines"])))

    def _append(self, line: bytes) -> None:
        """Append the whole line in one write, or nothing."""
        with self._path.open("r+b", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(end)
                raise


class CSVOutputFormat(_LinesOutputFormat):
    """A table with one line a dump (`progress.csv`): cells of missing keys are empty, text is quoted.

    A key that appears late becomes a new last column, by an atomic rewrite. A kill loses at most the row then
    being written. Opening a file that exists appends to it.

    Args:
        filename: The file.
    """

    name = "csv"

    def __init__(self, filename: PathLike) -> None:
        super().__init__(filename)
        with self._path.open(encoding="utf-8", newline="") as file:
            self._columns: list[str] = next(csv.reader(file), [])

    def set_state(self, state: Mapping[str, int]) -> None:
        super().set_state(state)
        if not state["lines"]:
            self._columns = []  # the first line has gone too

    def write(self, row: Mapping[str, Any], step: int = 0) -> None:
        row = _plain(row)
        new_columns = [key for key in row if key not in self._columns]
        if new_columns:
            self._widen(new_columns)
        if row:
            self._append(_csv_line(row.get(key) for key in self._columns))

    def _widen(self, new_columns: list[str]) -> None:
        columns = self._columns + new_columns
        temporary = self._path.with_name(self._path.name + ".tmp")
        try:
            with self._path.open("rb") as old, temporary.open("wb") as new:
                old.readline()
                new.write(_csv_line(columns))
                new.writelines(line.rstrip(b"\r\n") + b"," * len(new_columns) + b"\n" for line in old)
                new.flush()
                os.fsync(new.fileno())
            temporary.replace(self._path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        self._columns = columns


class JSONOutputFormat(_LinesOutputFormat):
    """One JSON object a line and a dump (`progress.json`), for strict parsers.

    JSON has no NaN or infinity: NaN becomes null, infinities become "Infinity" and "-Infinity".

    Args:
        filename: The file; lines are appended to one that exists.
    """

    name = "json"

    def write(self, row: Mapping[str, Any], step: int = 0) -> None:
        if row := _plain(row):
            self._append(json.dumps(_strict(row), allow_nan=False, default=str).encode() + b"\n")


class TensorBoardOutputFormat(KVWriter):
    """TensorBoard event files: numbers, text, `Video`, `Image`, `Figure` and `HParam`.

    The event file is opened by the first write. If that is at a step above 0, later events of an earlier run
    in the folder are hidden, so that a run resumed from a checkpoint shows one curve.

    Args:
        folder: Where the event files go.
    """

    name = "tensorboard"

    def __init__(self, folder: PathLike) -> None:
        self._folder = Path(folder)
        self.destination = str(self._folder)
        self._writer: Any = None
        self._broken = False
        self._last_step: int | None = None
        self._purge_step: int | None = None

    def write(self, row: Mapping[str, Any], step: int = 0) -> None:
        # The writer's thread does not survive an error, and the next one would print its traceback again.
        if self._broken or not row:
            return
        try:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                purge_step = step + 1 if step > 0 and self._purge_step is None else self._purge_step
                self._writer = SummaryWriter(str(self._folder), purge_step=purge_step)
                self._purge_step = None
            for key, value in row.items():
                self._add(key, value, step)
            self._writer.flush()
            self._last_step = step
        except OSError:
            self._broken = True
            raise

    def _add(self, key: str, value: Any, step: int) -> None:
        match value:
            case bool() | int() | float():
                self._writer.add_scalar(key, float(value), step)
            case str():
                self._writer.add_text(key, value, step)
            case Image(image, dataformats):
                self._writer.add_image(key, image, step, dataformats=dataformats)
            case Figure(figure, close):
                self._writer.add_figure(key, figure, step, close=close)
            case Video():
                self._writer.file_writer.add_summary(_gif(key, value), step)
            case HParam(hparam_dict, metric_dict):
                from torch.utils.tensorboard.summary import hparams

                shown = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in hparam_dict.items()}
                for summary in hparams(shown, dict(metric_dict)):
                    self._writer.file_writer.add_summary(summary)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None

    def get_state(self) -> dict[str, int]:
        return {} if self._last_step is None else {"last_step": self._last_step}

    def set_state(self, state: Mapping[str, int]) -> None:
        # Events can't be cut off; the next event file says from which step on earlier ones do not count.
        self.close()
        self._last_step = state.get("last_step")
        self._purge_step = 0 if self._last_step is None else self._last_step + 1


class Logger:
    """Gathers named values and writes them to every output at `dump`. A context manager, which closes it.

    Args:
        folder: Where the files of this run go, or None.
        output_formats: The outputs to begin with.

    Attributes:
        dir: The folder, or None.
        output_formats: All outputs.
        name_to_value: What was recorded since the last dump.
    """

    def __init__(self, folder: PathLike | None, output_formats: Iterable[KVWriter]) -> None:
        self.dir: str | None = None if folder is None else os.fspath(folder)
        self.output_formats: list[KVWriter] = list(output_formats)
        self.name_to_value: dict[str, Any] = {}
        self._name_to_count: dict[str, int] = {}
        self._name_to_excluded: dict[str, tuple[str, ...]] = {}
        self._warned: list[KVWriter] = []

    def add_output(self, format: KVWriter | str) -> None:
        """Write to one more place, beside those there are.

        Args:
            format: An output, or the name of one as in `configure`, which writes to this folder.

        Raises:
            ValueError: If the name is unknown, or needs a folder and the logger has none.
        """
        self.output_formats.append(_make_output(format, self.dir) if isinstance(format, str) else format)

    def get_dir(self) -> str | None:
        """The folder that the files go to, or None."""
        return self.dir

    def record(self, key: str, value: Any, exclude: str | tuple[str, ...] | None = None) -> None:
        """Set a value of the next row. The last value of a key counts.

        Args:
            key: Its name; "section/name" groups it in tables and in TensorBoard.
            value: A number, a text, an array or tensor of one element (a tensor stays on its device until the
                dump), or one of `Video`, `Image`, `Figure`, `HParam`.
            exclude: Outputs that should leave it out: one name or a tuple of names.

        Raises:
            ValueError: If an array or tensor does not hold exactly one element.
        """
        self.name_to_value[key] = _settled(key, value)
        self._name_to_count.pop(key, None)
        self._name_to_excluded[key] = (exclude,) if isinstance(exclude, str) else exclude or ()

    def record_mean(self, key: str, value: Any, exclude: str | tuple[str, ...] | None = None) -> None:
        """Set a value of the next row to the mean of all numbers given here since the last dump.

        Arguments and errors are those of `record`; a value of None is ignored.
        """
        if value is None:
            return
        count = self._name_to_count.get(key, 0)
        mean = _settled(key, value)
        if count:
            mean = self.name_to_value[key] + (mean - self.name_to_value[key]) / (count + 1)
        self.record(key, mean, exclude)
        self._name_to_count[key] = count + 1

    def dump(self, step: int = 0) -> None:
        """Write what was recorded as one row to every output, and begin a new row.

        Args:
            step: Number of environment steps so far.

        Warns:
            RuntimeWarning: Once for each output that cannot write (a full disk, say). The others still do.
        """
        values = {key: v.item() if hasattr(v, "item") else v for key, v in self.name_to_value.items()}
        excluded = self._name_to_excluded
        self.name_to_value, self._name_to_count, self._name_to_excluded = {}, {}, {}
        for output in self.output_formats:
            with self._surviving(output):
                output.write({k: v for k, v in values.items() if output.name not in excluded[k]}, step)

    def log(self, *args: object) -> None:
        """Write `args`, joined by spaces, as a line of text now, where text has a place ("stdout", "log")."""
        for output in self.output_formats:
            with self._surviving(output):
                output.write_sequence([str(arg) for arg in args])

    def close(self) -> None:
        """Close every output. A later dump opens them again."""
        for output in self.output_formats:
            with self._surviving(output):
                output.close()

    def get_state(self) -> dict[str, Any]:
        """What was recorded since the last dump, and how far each output has come, as plain data."""
        values = {key: v.item() if hasattr(v, "item") else v for key, v in self.name_to_value.items()}
        plain = {key: value for key, value in values.items() if isinstance(value, (bool, int, float, str))}
        return {
            "values": {
                key: (v, self._name_to_count.get(key, 0), self._name_to_excluded[key]) for key, v in plain.items()
            },
            "outputs": [(output.name, output.get_state()) for output in self.output_formats],
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `get_state` returned: what the outputs were given since is taken back."""
        self.name_to_value = {key: value for key, (value, _, _) in state["values"].items()}
        self._name_to_count = {key: count for key, (_, count, _) in state["values"].items() if count}
        self._name_to_excluded = {key: excluded for key, (_, _, excluded) in state["values"].items()}
        saved = list(state["outputs"])
        for output in self.output_formats:
            index = next((i for i, (name, _) in enumerate(saved) if name == output.name), None)
            if index is not None:
                with self._surviving(output):
                    output.set_state(saved.pop(index)[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _surviving(self, output: KVWriter) -> Iterator[None]:
        """Let the run go on where an output cannot be written to."""
        try:
            yield
        except OSError as error:
            if output in self._warned:
                return
            self._warned.append(output)
            place = output.destination or type(output).__name__
            text = f"logger: cannot write to {place}: {error}. The run goes on without it; this is said once."
            warnings.warn(text, RuntimeWarning, stacklevel=4)


def configure(folder: PathLike | None = None, format_strings: Iterable[str] | None = None) -> Logger:
    """Make a logger.

    Args:
        folder: Where log.txt, progress.csv, progress.json and TensorBoard's event files go; made if missing.
        format_strings: Any of "stdout", "log", "csv", "json", "tensorboard". By default ("stdout", "csv",
            "tensorboard") with a folder and ("stdout",) without.

    Raises:
        ValueError: If a name is unknown, or needs a folder and there is none.
        OSError: If the folder cannot be made.
    """
    if format_strings is None:
        format_strings = ("stdout",) if folder is None else ("stdout", "csv", "tensorboard")
    elif isinstance(format_strings, str):
        format_strings = (format_strings,)
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
    return Logger(folder, [_make_output(name, folder) for name in format_strings])


def _make_output(name: str, folder: PathLike | None) -> KVWriter:
    if name not in FORMATS:
        raise ValueError(f"logger: unknown output format {name!r}; known are {', '.join(FORMATS)}")
    if name == "stdout":
        return HumanOutputFormat()
    if folder is None:
        raise ValueError(f"logger: output format {name!r} writes files, but folder is None; give a folder")
    if name == "log":
        return HumanOutputFormat(Path(folder, "log.txt"))
    if name == "csv":
        return CSVOutputFormat(Path(folder, "progress.csv"))
    if name == "json":
        return JSONOutputFormat(Path(folder, "progress.json"))
    return TensorBoardOutputFormat(folder)


def _settled(key: str, value: Any) -> Any:
    """The value as it is now, whatever happens later to the array that it came in."""
    shape = getattr(value, "shape", None)
    if shape is None:
        return value
    if math.prod(shape) != 1:
        raise ValueError(
            f"logger: the value of {key!r} has shape {tuple(shape)}; record one number (its mean, say), "
            "or a Video, Image or Figure"
        )
    # Copying a tensor does not wait for its device, as reading it would.
    return value.detach().clone() if hasattr(value, "detach") else value.item()


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """What of a row is a number or text."""
    return {k: v for k, v in row.items() if not isinstance(v, (Video, Image, Figure, HParam))}


def _readable(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def _table(sections: Mapping[str, list[tuple[str, str]]], columns: int) -> str:
    from rich.box import ROUNDED
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("", "", box=ROUNDED, show_header=False)
    table.columns[1].justify = "right"
    for section, rows in sections.items():
        if section:
            table.add_row(Text(section, style="bold"), "")
        for name, value in rows:
            table.add_row(Text(name), Text(value))
        table.add_section()
    text = io.StringIO()
    Console(file=text, width=columns, force_terminal=True).print(table)
    return text.getvalue()


def _csv_line(cells: Iterable[Any]) -> bytes:
    # No cell may break the line: that one row is one line is how a cut-off row is told from a whole one.
    line = io.StringIO()
    texts = ("" if cell is None else " ".join(str(cell).splitlines()) for cell in cells)
    csv.writer(line, lineterminator="\n").writerow(texts)
    return line.getvalue().encode("utf-8", "backslashreplace")


def _strict(value: Any) -> Any:
    """The value with nothing in it that JSON lacks."""
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if hasattr(value, "tolist"):
        return _strict(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _gif(key: str, video: Video) -> Any:
    """A video as an animated GIF, by Pillow: the writer's `add_video` drops it where moviepy is missing."""
    import PIL.Image
    import torch
    from tensorboard.compat.proto.summary_pb2 import Summary

    frames = torch.as_tensor(video.frames).cpu().numpy()
    if frames.ndim != 5 or frames.shape[2] not in (1, 3) or frames.size == 0:
        raise ValueError(
            f"logger: the frames of video {key!r} have shape {frames.shape}; "
            "expected (n_videos, time, 1 or 3 channels, height, width)"
        )
    if frames.dtype != np.uint8:
        frames = (frames * 255).clip(0, 255).round().astype(np.uint8)
    n_videos, time, channels, height, width = frames.shape
    pixels = frames.transpose(1, 3, 0, 4, 2).reshape(time, height, n_videos * width, channels)
    first, *rest = [PIL.Image.fromarray(frame) for frame in np.broadcast_to(pixels, (*pixels.shape[:3], 3))]
    gif = io.BytesIO()
    first.save(gif, format="GIF", save_all=True, append_images=rest, duration=1000 / video.fps, loop=0)
    image = Summary.Image(height=height, width=n_videos * width, colorspace=3, encoded_image_string=gif.getvalue())
    return Summary(value=[Summary.Value(tag=key, image=image)])

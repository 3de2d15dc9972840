"""The logger: what is recorded reaches every file, whole, and survives kills, late keys and full disks."""

import csv
import io
import json
import math
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure as MatplotlibFigure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sbac.logger
from sbac.logger import (
    CSVOutputFormat,
    Figure,
    HParam,
    HumanOutputFormat,
    Image,
    KVWriter,
    Logger,
    TensorBoardOutputFormat,
    Video,
    configure,
)
from sbac.statistics import EpisodeStatistics, TrainingLog


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def objects_of(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def events_of(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder)).Reload()


class Recorder(KVWriter):
    name = "recorder"

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, Any]]] = []

    def write(self, row: Mapping[str, Any], step: int = 0) -> None:
        self.rows.append((step, dict(row)))


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_importing_the_logger_loads_nothing_heavy() -> None:
    # In a file of its own: `import sbac` may load torch by other ways.
    source = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('logger', {sbac.logger.__file__!r})\n"
        "module = importlib.util.module_from_spec(spec); sys.modules['logger'] = module\n"
        "spec.loader.exec_module(module)\n"
        "print([m for m in ('torch', 'rich', 'tensorboard', 'matplotlib', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_one_dump_reaches_every_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with configure(tmp_path, ("stdout", "log", "csv", "json", "tensorboard")) as logger:
        logger.record("rollout/ep_rew_mean", -12.5)
        logger.record("time/total_timesteps", 400)
        logger.dump(400)

    assert "ep_rew_mean" in capsys.readouterr().out
    assert "-12.5" in (tmp_path / "log.txt").read_text()
    expected = {"rollout/ep_rew_mean": -12.5, "time/total_timesteps": 400}
    assert rows_of(tmp_path / "progress.csv") == [{key: str(value) for key, value in expected.items()}]
    assert objects_of(tmp_path / "progress.json") == [expected]
    (event,) = events_of(tmp_path).Scalars("rollout/ep_rew_mean")
    assert (event.step, event.value) == (400, -12.5)


def test_the_default_outputs(tmp_path: Path) -> None:
    assert [output.name for output in configure().output_formats] == ["stdout"]
    logger = configure(tmp_path / "new" / "run")
    assert [output.name for output in logger.output_formats] == ["stdout", "csv", "tensorboard"]
    assert logger.get_dir() == logger.dir == str(tmp_path / "new" / "run")


def test_wrong_formats_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'exel'.*stdout, log, csv, json, tensorboard"):
        configure(tmp_path, ["exel"])
    with pytest.raises(ValueError, match=r"'csv'.*folder is None"):
        configure(None, ["csv"])


def test_added_outputs_replace_none(tmp_path: Path) -> None:
    logger = configure(tmp_path, ["csv"])
    recorder = Recorder()
    logger.add_output(recorder)
    logger.add_output("json")
    logger.record("a", 1)
    logger.dump(7)
    assert recorder.rows == [(7, {"a": 1})]
    assert rows_of(tmp_path / "progress.csv") == [{"a": "1"}]
    assert objects_of(tmp_path / "progress.json") == [{"a": 1}]


def test_values_last_one_dump_and_the_last_value_counts() -> None:
    recorder = Recorder()
    logger = Logger(None, [recorder])
    logger.record("a", 1)
    logger.record("a", 2)
    assert logger.name_to_value == {"a": 2}
    logger.dump(1)
    logger.record("b", 3)
    logger.dump(2)
    assert recorder.rows == [(1, {"a": 2}), (2, {"b": 3})]
    assert logger.name_to_value == {}


def test_record_mean_is_the_mean_since_the_last_dump() -> None:
    recorder = Recorder()
    logger = Logger(None, [recorder])
    for value in (1.0, None, np.float32(2.0), torch.tensor(6.0)):
        logger.record_mean("a", value)
    logger.dump()
    logger.record_mean("a", 10)
    logger.record("a", 4)
    logger.record_mean("a", 8)
    logger.dump()
    assert recorder.rows == [(0, {"a": 3.0}), (0, {"a": 8})]


def test_exclude_takes_a_name_or_several(tmp_path: Path) -> None:
    logger = configure(tmp_path, ["csv", "json", "tensorboard"])
    logger.record("a", 1.0, exclude="csv")
    logger.record("b", 2.0, exclude=("json", "tensorboard"))
    logger.dump(1)
    logger.close()
    assert rows_of(tmp_path / "progress.csv") == [{"b": "2.0"}]
    assert objects_of(tmp_path / "progress.json") == [{"a": 1.0}]
    assert events_of(tmp_path).Tags()["scalars"] == ["a"]


def test_scalars_of_numpy_and_torch_become_python_numbers() -> None:
    recorder = Recorder()
    logger = Logger(None, [recorder])
    weight = torch.tensor([0.5], requires_grad=True)
    array = np.array([[2.0]])
    logger.record("torch", weight)
    logger.record("numpy", array)
    logger.record("int", np.int64(2**60))
    # What counts is the value at the time of recording.
    with torch.no_grad():
        weight += 1
    array += 1
    assert not logger.name_to_value["torch"].requires_grad
    logger.dump()
    ((_, row),) = recorder.rows
    assert row == {"torch": 0.5, "numpy": 2.0, "int": 2**60}
    assert [type(value) for value in row.values()] == [float, float, int]


@pytest.mark.parametrize("value", [np.zeros(3), torch.zeros(3), np.zeros(0)])
def test_arrays_of_other_sizes_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"'train/w' has shape \([03],\)"):
        Logger(None, []).record("train/w", value)


def test_csv_late_keys_neither_lose_nor_shift_rows(tmp_path: Path) -> None:
    logger = configure(tmp_path, ["csv"])
    rows: list[dict[str, Any]] = [{"a": 1, "b": "x,y"}, {"c": 3, "a": 4}, {"b": 5}, {"d": 6}]
    for step, row in enumerate(rows):
        for key, value in row.items():
            logger.record(key, value)
        logger.dump(step)
    assert rows_of(tmp_path / "progress.csv") == [
        {"a": "1", "b": "x,y", "c": "", "d": ""},
        {"a": "4", "b": "", "c": "3", "d": ""},
        {"a": "", "b": "5", "c": "", "d": ""},
        {"a": "", "b": "", "c": "", "d": "6"},
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["progress.csv"]


def test_csv_quotes_and_keeps_one_row_one_line(tmp_path: Path) -> None:
    logger = configure(tmp_path, ["csv"])
    logger.record("a,b", 'she said "1,2"')
    logger.record("text", "two\nlines")
    logger.record("none", None)
    logger.record("nan", math.nan)
    logger.dump()
    expected = {"a,b": 'she said "1,2"', "text": "two lines", "none": "", "nan": "nan"}
    assert rows_of(tmp_path / "progress.csv") == [expected]
    assert len((tmp_path / "progress.csv").read_text().splitlines()) == 2


def test_csv_of_a_resumed_run_is_one_file(tmp_path: Path) -> None:
    for start in (0, 2):
        with configure(tmp_path, ["csv"]) as logger:
            for step in (start, start + 1):
                logger.record("step", step)
                logger.dump(step)
    assert [row["step"] for row in rows_of(tmp_path / "progress.csv")] == ["0", "1", "2", "3"]


def test_csv_and_json_cut_off_the_row_of_a_killed_run(tmp_path: Path) -> None:
    (tmp_path / "progress.csv").write_text("a,b\n1,2\n3,")
    (tmp_path / "progress.json").write_text('{"a": 1}\n{"a": ')
    logger = configure(tmp_path, ["csv", "json"])
    logger.record("b", 6)
    logger.record("a", 5)
    logger.dump()
    assert rows_of(tmp_path / "progress.csv") == [{"a": "1", "b": "2"}, {"a": "5", "b": "6"}]
    assert objects_of(tmp_path / "progress.json") == [{"a": 1}, {"b": 6, "a": 5}]


def test_csv_whose_header_was_cut_off_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "progress.csv").write_text("a,b")
    CSVOutputFormat(tmp_path / "progress.csv").write({"c": 1})
    assert (tmp_path / "progress.csv").read_text() == "c\n1\n"


def test_csv_of_a_run_that_goes_on_before_its_first_row_begins_anew(tmp_path: Path) -> None:
    table = CSVOutputFormat(tmp_path / "progress.csv")
    before = table.get_state()
    table.write({"a": 1, "b": 2})
    table.set_state(before)
    table.write({"c": 3})
    assert (tmp_path / "progress.csv").read_text() == "c\n3\n"
    at_first = table.get_state()
    table.write({"c": 4, "d": 5})
    table.set_state(at_first)
    table.write({"d": 6})
    assert rows_of(tmp_path / "progress.csv") == [{"c": "3", "d": ""}, {"c": "", "d": "6"}]


def test_rows_are_on_disk_after_each_dump(tmp_path: Path) -> None:
    logger = configure(tmp_path, ["csv", "json", "log"])
    for count in (1, 2):
        logger.record("a", count)
        logger.dump()
        assert len(rows_of(tmp_path / "progress.csv")) == count
        assert len(objects_of(tmp_path / "progress.json")) == count
        assert (tmp_path / "log.txt").read_text().count("a") == count


def test_json_is_strict(tmp_path: Path) -> None:
    logger = configure(tmp_path, ["json"])
    logger.record("nan", math.nan)
    logger.record("inf", torch.tensor(math.inf))
    logger.record("minus", np.float32(-math.inf))
    logger.record("list", [1.0, math.nan, np.float64(2.0)])
    logger.record("text", 'a "quoted"\nline')
    logger.dump()
    expected = {"nan": None, "inf": "Infinity", "minus": "-Infinity", "list": [1.0, None, 2.0]}
    assert objects_of(tmp_path / "progress.json") == [{**expected, "text": 'a "quoted"\nline'}]


def test_tensorboard_shows_every_kind_and_the_others_skip_them(tmp_path: Path) -> None:
    figure = MatplotlibFigure()
    figure.subplots().plot([0, 1])
    with configure(tmp_path, ["log", "csv", "json", "tensorboard"]) as logger:
        logger.record("number", np.float64(0.25))
        logger.record("flag", True)
        logger.record("text", "hello")
        logger.record("image", Image(np.zeros((3, 4, 5), dtype=np.uint8), "CHW"))
        logger.record("figure", Figure(figure, close=True))
        logger.record("video", Video(torch.rand(2, 6, 3, 8, 10), fps=10))
        logger.record("grey", Video(np.zeros((1, 2, 1, 8, 10), dtype=np.uint8), fps=10))
        logger.record("hparam", HParam({"gamma": 0.9, "net": [64, 64], "none": None}, {"number": 0.0}))
        logger.dump(3)

    assert list(rows_of(tmp_path / "progress.csv")[0]) == ["number", "flag", "text"]
    assert list(objects_of(tmp_path / "progress.json")[0]) == ["number", "flag", "text"]
    assert "video" not in (tmp_path / "log.txt").read_text()

    events = events_of(tmp_path)
    assert [event.value for event in events.Scalars("number")] == [0.25]
    assert [event.value for event in events.Scalars("flag")] == [1.0]
    assert set(events.Tags()["images"]) == {"image", "figure", "video", "grey"}
    (video,) = events.Images("video")
    assert (video.step, video.height, video.width) == (3, 8, 20)
    assert video.encoded_image_string.startswith(b"GIF8")
    assert "text/text_summary" in events.Tags()["tensors"]
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_videos_of_a_wrong_shape_are_named(tmp_path: Path) -> None:
    logger = configure(tmp_path, ["tensorboard"])
    logger.record("eval/video", Video(np.zeros((6, 3, 8, 10)), fps=10))
    with pytest.raises(ValueError, match=r"'eval/video' have shape \(6, 3, 8, 10\)"):
        logger.dump()
    logger.close()


def test_tensorboard_of_a_run_resumed_from_a_checkpoint_is_one_curve(tmp_path: Path) -> None:
    for steps in ((10, 20, 30, 40), (30, 40, 50)):  # killed at 40, resumed from 20
        with configure(tmp_path, ["tensorboard"]) as logger:
            for step in steps:
                logger.record("a", float(step))
                logger.dump(step)
    # Events at the very step of the first write stay: they may be other values of the same step.
    assert [event.step for event in events_of(tmp_path).Scalars("a")] == [10, 20, 30, 30, 40, 50]


def test_a_closed_logger_can_go_on(tmp_path: Path) -> None:
    logger = configure(tmp_path, ["csv", "tensorboard"])
    for step in (1, 2):
        logger.record("a", step)
        logger.dump(step)
        logger.close()
    logger.close()
    assert len(rows_of(tmp_path / "progress.csv")) == 2
    assert [event.step for event in events_of(tmp_path).Scalars("a")] == [1, 2]


def test_log_writes_text_where_text_has_a_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = configure(tmp_path, ["stdout", "log", "csv", "tensorboard"])
    logger.log("saved", 3, "files")
    assert capsys.readouterr().out == (tmp_path / "log.txt").read_text() == "saved 3 files\n"
    assert (tmp_path / "progress.csv").read_text() == ""


ROW = {
    "rollout/ep_rew_mean": -1234.567,
    "rollout/ep_len_mean": 200.0,
    "time/total_timesteps": 123456,
    "note": "x",
}


def test_the_table_in_a_pipe_is_plain() -> None:
    stream = io.StringIO()
    HumanOutputFormat(stream).write(ROW)
    assert stream.getvalue() == (
        "note                    x\n"
        "rollout\n"
        "  ep_len_mean         200\n"
        "  ep_rew_mean       -1235\n"
        "time\n"
        "  total_timesteps  123456\n"
        "\n"
    )


def test_the_table_in_a_terminal_is_drawn_and_in_a_narrow_one_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    wide = Terminal()
    HumanOutputFormat(wide).write(ROW)
    assert "│   ep_rew_mean     │  -1235 │" in wide.getvalue()

    monkeypatch.setenv("COLUMNS", "20")
    narrow = Terminal()
    HumanOutputFormat(narrow).write(ROW)
    assert "│" not in narrow.getvalue()
    assert "  ep_rew_mean       -1235\n" in narrow.getvalue()


def test_the_table_keeps_keys_whole_and_survives_any_text() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    long_keys = {"train/" + "k" * 50 + end: 1.0 for end in "ab"}
    HumanOutputFormat(stream).write({**long_keys, "text": "[bold]é\n" + "y" * 100})
    stream.seek(0)
    text = stream.read()
    assert all(key.removeprefix("train/") in text for key in long_keys)
    assert "[bold]\\xe9 yyy" in text
    assert "y..." in text


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0"), (1e-5, "1e-05"), (123.456, "123.5"), (98765.4, "98765"), (1e12, "1e+12"), (math.nan, "nan")],
)
def test_numbers_of_the_table(value: float, shown: str) -> None:
    stream = io.StringIO()
    HumanOutputFormat(stream).write({"a": value})
    assert stream.getvalue().split() == ["a", shown]


class Broken(KVWriter):
    destination = "/mnt/full/progress.xyz"

    def write(self, row: Mapping[str, Any], step: int = 0) -> None:
        raise OSError(28, "No space left on device")


def test_an_output_that_fails_warns_once_and_harms_no_other() -> None:
    recorder = Recorder()
    logger = Logger(None, [Broken(), recorder])
    logger.record("a", 1)
    with pytest.warns(RuntimeWarning, match="/mnt/full/progress.xyz.*No space left") as caught:
        logger.dump(1)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    logger.record("a", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logger.dump(2)
    assert [step for step, _ in recorder.rows] == [1, 2]


def test_a_tensorboard_folder_that_cannot_be_made_warns_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    logger = Logger(None, [TensorBoardOutputFormat(tmp_path / "file" / "run")])
    logger.record("a", 1)
    with pytest.warns(RuntimeWarning, match="cannot write to .*run"):
        logger.dump(1)
    logger.close()


@contextmanager
def files_no_longer_than(size: int) -> Iterator[None]:
    """As on a disk that is full: a write stops in the middle."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("key", ["a", "b", "a_key_longer_than_the_disk"])
def test_a_full_disk_leaves_whole_rows(tmp_path: Path, key: str) -> None:
    logger = configure(tmp_path, ["csv"])
    path = tmp_path / "progress.csv"
    logger.record("a", 1)
    logger.dump()
    before = path.read_text()

    logger.record(key, 123456789)
    with pytest.warns(RuntimeWarning, match="progress.csv"), files_no_longer_than(len(before) + 3):
        logger.dump()
    # The row that did not fit is gone; a new column that did fit may stay.
    assert path.read_text() == ("a,b\n1,\n" if key == "b" else before)
    assert [file.name for file in tmp_path.iterdir()] == ["progress.csv"]

    logger.record(key, 2)
    logger.dump()
    first, last = rows_of(path)
    assert first["a"] == "1"
    assert last[key] == "2"


def test_a_row_shows_means_over_updates_of_means_over_batches(tmp_path: Path) -> None:
    gathered = TrainingLog(interval=1, num_timesteps=0)
    gathered.add({"loss": torch.tensor(1.0), "error": torch.tensor([[1.0, 2.0], [3.0, 6.0]], requires_grad=True)})
    gathered.add({"loss": torch.tensor(2.0), "error": torch.full((70_000,), 2.0, dtype=torch.float16)})
    gathered.add({"loss": torch.tensor(6.0)})  # the actor learns in some updates only
    logger = Logger(None, [])
    gathered.record(logger, 1, 3, EpisodeStatistics(1, 100))
    assert logger.name_to_value["train/loss"] == 3
    assert logger.name_to_value["train/error"] == 2.5

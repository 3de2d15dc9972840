"""The documentation is true: its Python runs, its commands parse, and its links lead somewhere."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import shlex
import tomllib
import warnings
import xml.etree.ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import sbac
from docs import draw
from sbac import cli
from sbac.callbacks import EvalCallback
from sbac.construction import argument_names
from sbac.loading import ALGORITHMS, algorithm
from sbac.logger import KVWriter

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts), ROOT / "README.md"]
FENCE = re.compile(r"^```(\S+)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> Iterator[tuple[int, str]]:
    """The line and the text of each fenced block in one of the languages."""
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        if found[1] in languages:
            yield text.count("\n", 0, found.start(2)) + 1, found[2]


def commands(page: Path) -> Iterator[tuple[str, list[str], str]]:
    """The place and the words after ``sbac`` of each command in a console block, and the first line that it prints."""
    for start, text in blocks(page, "console", "bash"):
        lines = text.splitlines()
        has_prompts = any(line.startswith("$ ") for line in lines)
        for i, line in enumerate(lines):
            if has_prompts and not line.startswith("$ "):
                continue
            following = lines[i + 1] if has_prompts and i + 1 < len(lines) else ""
            printed = "" if following.startswith("$ ") else following
            for command in line.removeprefix("$ ").split(" && "):
                words = shlex.split(command, comments=True)
                if words[:1] == ["sbac"]:
                    yield f"{name(page)}:{start + i}: {command}", words[1:], printed


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page, "python"))], ids=name)
def test_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """From top to bottom, in one namespace, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for line, text in blocks(page, "python"):
        # Empty lines in front, so that a traceback shows the line of the page.
        exec(compile("\n" * (line - 1) + text, page, "exec"), namespace)


def masked(line: str) -> str:
    """A line without its numbers: those of a short training are others."""
    return re.sub(r"-?\d[\d,.]*", "#", line.strip())


def shortened(words: list[str]) -> list[str] | None:
    """A command that does the same in little time; None for one that opens a window or needs another library's file."""
    if words[0] == "convert":
        return None
    if words[0] == "train" and "--resume" not in words:
        return [*words, "--steps", "160", "--eval-freq", "80", "--eval-episodes", "1"]
    if words[0] in ("eval", "watch"):
        return None if words[0] == "watch" and "--video" not in words else [*words, "--episodes", "1"]
    return words


@pytest.mark.parametrize("page", [page for page in PAGES if any(commands(page))], ids=name)
def test_commands_of_a_page_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    """One after the other, in an empty folder, and each prints what the page says; trainings are cut short."""
    monkeypatch.chdir(tmp_path)
    for where, words, printed in commands(page):
        if printed.startswith("sbac "):
            # A mistake that the page shows is made, and answered as it says.
            assert cli.main(words) == 2, where
            assert capsys.readouterr().err.strip() == printed, where
            continue
        if words[0].startswith("--"):
            with pytest.raises(SystemExit) as end:
                cli.main(words)
            assert end.value.code == 0, where
        else:
            cli._parser().parse_args(words)
            short = shortened(words)
            if short is None:
                continue
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "nothing will be learned")
                assert cli.main(short) == 0, where
        lines = capsys.readouterr().out.splitlines()
        if printed and not printed.startswith("^C"):
            assert masked(printed) == masked(lines[0]), where


def test_no_block_hides_in_a_list() -> None:
    """Indented blocks are not found by the tests above."""
    hidden = [
        name(page) for page in PAGES if re.search(r"^[ \t]+```(python|console|bash)", page.read_text("utf-8"), re.M)
    ]
    assert not hidden


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    targets = [target for target in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in target]
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing, f"{name(page)}: no such files: {missing}"


def test_blocks_and_commands_are_found() -> None:
    """The tests above would pass if they found nothing to look at."""
    words = [words for page in PAGES for _, words, _ in commands(page)]
    assert len([page for page in PAGES if any(blocks(page, "python"))]) >= 8
    assert {first for first, *_ in words} >= {"train", "eval", "watch", "plot", "inspect"}


def test_pictures_are_what_the_script_draws() -> None:
    drawn = {name: picture().svg() for name, picture in draw.PICTURES.items()}
    there = {path.name: path.read_text(encoding="utf-8") for path in draw.IMAGES.glob("*.svg")}
    assert there == drawn, "draw them anew: python docs/draw.py"
    for name, svg in drawn.items():
        xml.etree.ElementTree.fromstring(svg)
        assert any(f"/{name})" in page.read_text(encoding="utf-8") for page in PAGES), f"no page shows {name}"


def test_every_room_is_in_the_reference() -> None:
    reference = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs/api").glob("*.md"))
    rooms = {path.stem for path in (ROOT / "sbac").glob("*.py")} - {"__init__", "__main__", "cli"}
    missing = {room for room in rooms if f"sbac.{room}" not in reference}
    assert not missing


def public_things() -> Iterator[tuple[str, object]]:
    """Each public module, class, function and method of sbac, by its full name."""
    for info in pkgutil.walk_packages(sbac.__path__, "sbac."):
        if info.name == "sbac.__main__":
            continue
        module = importlib.import_module(info.name)
        yield info.name, module
        for name, thing in vars(module).items():
            if name.startswith("_") or getattr(thing, "__module__", None) != info.name:
                continue
            if inspect.isclass(thing) or inspect.isfunction(thing):
                yield f"{info.name}.{name}", thing
            if inspect.isclass(thing):
                for attribute, value in vars(thing).items():
                    is_method = inspect.isroutine(getattr(value, "__func__", value)) or isinstance(value, property)
                    if is_method and not attribute.startswith("_"):
                        yield f"{info.name}.{name}.{attribute}", getattr(thing, attribute)


def test_every_public_name_has_a_docstring() -> None:
    """Its own or, for a method, that of what it overrides; and that of a class names each argument."""
    things = dict(public_things())
    assert len(things) > 500 and "sbac.td3.TD3.learn" in things
    missing = [name for name, thing in things.items() if not inspect.getdoc(thing)]
    for name, thing in things.items():
        if inspect.isclass(thing) and "__doc__" in vars(thing) and inspect.isfunction(vars(thing).get("__init__")):
            words = set(re.findall(r"\w+", inspect.getdoc(thing) or ""))
            arguments = inspect.signature(thing.__init__).parameters.values()
            named = [p.name for p in arguments if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
            is_enough = issubclass(thing, Exception) or set(named) - {"self"} <= words
            missing += [] if is_enough else [f"{name}: {sorted(set(named) - {'self'} - words)}"]
    assert not missing


class Keys(KVWriter):
    """The keys that were logged."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def write(self, key_values: dict[str, object], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        self.seen |= key_values.keys()


@pytest.mark.parametrize("learning_rate", [None, 1e-3], ids=["default", "1e-3"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_key_of_the_log_is_explained(name: str, learning_rate: float | None, one_thread: None) -> None:
    options = {"policy_kwargs": {"net_arch": [8]}, "learning_rate": learning_rate, "learning_starts": 100}
    known = argument_names(algorithm(name))
    given = {key: value for key, value in options.items() if key in known and value is not None}
    model = algorithm(name)("MlpPolicy", "Pendulum-v1", seed=0, **given)
    keys = Keys()
    model.logger.add_output(keys)
    evaluation = EvalCallback("Pendulum-v1", n_eval_episodes=1, eval_freq=150, verbose=0)
    model.learn(210, callback=evaluation)
    explained = set(re.findall(r"`(\w+/\w+)`", (ROOT / "docs/guide/callbacks-and-logging.md").read_text("utf-8")))
    assert len(keys.seen) > 10
    assert keys.seen <= explained


@pytest.mark.parametrize("name", ALGORITHMS)
def test_arguments_that_take_schedules_are_listed(name: str) -> None:
    text = (ROOT / "docs/guide/hyperparameters.md").read_text(encoding="utf-8")
    listed = {}
    for cls, line in re.findall(r"^- (\w+): (`.*)$", text, re.MULTILINE):
        listed[cls] = set(re.findall(r"`(\w+)`", line)) | (listed["DDPG"] if "those of DDPG" in line else set())
    cls = algorithm(name)
    parameters = inspect.signature(cls.__init__).parameters
    assert listed[cls.__name__] == {key for key, p in parameters.items() if "FloatOrSchedule" in str(p.annotation)}


def test_every_recipe_is_named() -> None:
    text = (ROOT / "docs/guide/hyperparameters.md").read_text(encoding="utf-8")
    for file in (ROOT / "sbac/recipes").glob("*.toml"):
        for env_id in tomllib.loads(file.read_text(encoding="utf-8")):
            row = re.search(rf"^\| {re.escape(env_id)}[^|]*\|(.*)\|$", text, re.MULTILINE)
            assert row is not None, env_id
            assert file.stem.upper() in row[1], (file.stem, env_id)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_preset_is_named(name: str) -> None:
    text = (ROOT / "docs/guide/hyperparameters.md").read_text(encoding="utf-8")
    cls = algorithm(name)
    missing = [preset for preset in cls.presets if f'| {cls.__name__} | `"{preset}"` |' not in text]
    assert not missing

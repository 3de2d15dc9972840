"""The documentation is true: its Python runs, its commands parse, and its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sbac import cli
from sbac.checkpoint import argument_names
from sbac.loading import algorithm

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
            printed = lines[i + 1] if has_prompts and i + 1 < len(lines) else ""
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


@pytest.mark.parametrize("page", [page for page in PAGES if any(commands(page))], ids=name)
def test_commands_of_a_page_are_understood(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for where, words, printed in commands(page):
        if printed.startswith("sbac "):
            # A mistake that the page shows is made, and answered as it says.
            assert cli.main(words) == 2, where
            assert capsys.readouterr().err.strip() == printed, where
            continue
        try:
            options = cli._parser().parse_args(words)
        except SystemExit as end:
            assert end.code == 0, where  # --help ends the parser too
            continue
        if options.name == "train":
            given = set(cli._hyperparameters(options)) - {"n_timesteps"}
            assert given <= set(argument_names(algorithm(options.algorithm))), where


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


def test_every_room_is_in_the_reference() -> None:
    reference = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs/api").glob("*.md"))
    rooms = {path.stem for path in (ROOT / "sbac").glob("*.py")} - {"__init__", "__main__", "cli"}
    missing = {room for room in rooms if f"sbac.{room}" not in reference}
    assert not missing

"""What the documentation points to is there: pages, headings, files, modules, commands and their options."""

from __future__ import annotations

import importlib.util
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from mlmesh_cli.app import app
from tests.support.contract import ROOT

PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md")],
    key=lambda path: path.as_posix(),
)
OURS = ("benchmarks", "docs", "manifests", "mesh", "protos", "services", "tests", "tools")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def headings(page: Path) -> set[str]:
    """Anchors of a page, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in found}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.S | re.M)
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        if re.match(r"\w+:", link):
            continue
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in headings(target)):
            dead.append(link)
    assert dead == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name_of)
def test_files_and_modules_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    files = re.findall(rf"`((?:{'|'.join(OURS)})/[\w./-]+)`", text)
    missing = [path for path in files if not (ROOT / path).exists()]
    modules = set(re.findall(r"python -m ((?:tests|benchmarks)[\w.]*)", text))
    missing += [name for name in sorted(modules) if importlib.util.find_spec(name) is None]
    assert missing == []


def commands(text: str) -> Iterator[list[str]]:
    """Calls of `mlmesh` in blocks of code, in words."""
    blocks = re.findall(r"^```(?:sh|console)\n(.*?)^```$", text, flags=re.S | re.M)
    blocks += re.findall(r"^    mlmesh .*$", text, flags=re.M)
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        bare = re.sub(r"'[^']*'|\"[^\"]*\"", "TEXT", line).partition("#")[0]
        for call in re.findall(r"(?:^|[|$(&]|--)\s*mlmesh ([^|&)>]*)", bare):
            yield call.split()


def problem(command: Any, words: list[str]) -> str:
    """What is wrong with the words of a call, or nothing. Commands come before their options."""
    for word in itertools.takewhile(lambda word: not word.startswith("-"), words):
        if hasattr(command, "commands"):
            if word not in command.commands:
                return f"there is no command {word!r}"
            command = command.commands[word]
    known = {"-h", "--help"}.union(*(option.opts + option.secondary_opts for option in command.params))
    return ", ".join(word for word in words if re.match(r"--?[a-z]", word) and word.partition("=")[0] not in known)


def test_commands_that_are_shown_exist() -> None:
    shown = [(page, words) for page in PAGES for words in commands(page.read_text())]
    assert len(shown) > 100
    root = typer.main.get_command(app)
    assert [(page.name, words, wrong) for page, words in shown if (wrong := problem(root, words))] == []

"""What pages say is there: their places in the site, their links, the command line, their code.

The site itself, with its tutorials, is built by ``make docs``.
"""

import argparse
import ast
import importlib
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tapct_fast import cli, recipes
from tapct_fast.parser import build_parser

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
WRITTEN = DOCS / "api"  # by the build, from docs/reference.py
PAGES = sorted(
    page
    for page in [*ROOT.glob("*.md"), ROOT / "kernels" / "README.md", *DOCS.rglob("*.md")]
    if WRITTEN not in page.parents and DOCS / "_build" not in page.parents
)
FENCE = re.compile(r"^```+ *([^\n]*)\n(.*?)^```+ *$", re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def test_every_page_has_a_place_in_the_site() -> None:
    text = (DOCS / "index.md").read_text()
    trees = [body for kind, body in FENCE.findall(text) if kind == "{toctree}"]
    entries = [line for tree in trees for line in tree.splitlines() if line[:1] not in ("", ":")]
    pages = [
        page.relative_to(DOCS).with_suffix("").as_posix() for page in PAGES if DOCS in page.parents
    ]
    missing = [page for page in pages if not any(fnmatch(page, entry) for entry in entries)]
    assert missing == ["index"]
    plain = [e for e in entries if "[" not in e and not e.startswith(f"{WRITTEN.name}/")]
    assert set(plain) <= set(pages)


def slug(heading: str) -> str:
    """Return the anchor that the forge and the site give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        if found.resolve().parent == WRITTEN:
            continue  # the build, for which a link without a target is an error, checks these
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", FENCE.sub("", found.read_text()), re.MULTILINE)
            assert anchor in map(slug, headings), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_in_pages_is_python(page: Path) -> None:
    for kind, body in FENCE.findall(page.read_text()):
        if kind in ("python", "{code-cell}"):
            ast.parse(re.sub(r"^%%.*\n", "", body))


def commands(text: str) -> Iterator[list[str]]:
    """Yield what is behind ``tapct-fast`` wherever a page shows it as code, as words."""
    text = text.replace("\\\n", " ")
    shown = [body for kind, body in FENCE.findall(text) if kind in ("", "bash", "text")]
    rest = FENCE.sub("", text)
    shown += re.findall(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)", rest)
    shown += re.findall(r"^(?: {4}|\t).+$", rest, re.MULTILINE)
    for code in shown:
        found = re.findall(r"(?:tapct-fast|-m tapct_fast\.cli) ([^\n|;&#'()\\]*)", code)
        yield from (words.split() for words in found)


def verbs(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (choices,) = (a.choices for a in parser._actions if isinstance(a.choices, dict))
    return choices


def test_every_verb_has_words_and_a_function() -> None:
    assert set(verbs(build_parser())) == set(cli._VERBS)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_pages_exist(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    benches = verbs(importlib.import_module("bench.__main__")._parser())
    parser = build_parser()
    settings = recipes.settings(recipes.recipe("vit-b"))
    for words in commands(page.read_text()):
        if not words or words[0].startswith("-") or words[0].isupper():
            continue  # --help, VERB
        verb, *rest = words
        assert verb in verbs(parser), f"tapct-fast {verb}"
        known = verbs(parser)[verb]
        if verb == "bench" and rest:
            assert rest[0] in benches, f"tapct-fast bench {rest[0]}"
            known = benches[rest[0]]
        for word in rest:
            flag = word.strip("[].,").partition("=")[0]
            if flag.startswith("--") and flag != "--group.name":
                in_recipe = verb in ("train", "views") and flag[2:] in settings
                assert flag in known._option_string_actions or in_recipe, f"{verb} {flag}"

"""Sphinx extension: the pages of ``docs/api``, and signatures as they stand in the source.

The pages are the command line from its parsers, one page per module, the table of ops and
CONTRIBUTING.md. They are written when Sphinx starts and lie in no repository.
"""

import ast
import builtins
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import ReferencesResolver, SphinxPostTransform

# Before kernels are imported: without a GPU their functions are those of Triton's interpreter.
os.environ.setdefault("TRITON_INTERPRET", "1")

import tapct_fast
import tapct_kernels
from bench.__main__ import _parser as bench_parser
from tapct_fast.parser import build_parser

REPOSITORY = Path(__file__).resolve().parent.parent
API = REPOSITORY / "docs" / "api"
_written: set[Path] = set()

# Packages in the order of the reference; of one that does not exist nothing is written.
PACKAGES = {
    "tapct_fast.io": "Reading and storing CT",
    "tapct_fast.backbone": "Backbones",
    "tapct_fast.downstream": "Features",
    "tapct_fast.evaluation": "Evaluation",
    "tapct_fast.view": "Pictures of a scan",
    "tapct_fast.adapters": "Other libraries",
    "tapct_fast.data": "Crops and views",
    "tapct_fast.model": "The network",
    "tapct_fast.ssl": "Losses and the method",
    "tapct_fast.train": "Training",
    "tapct_fast.monitor": "Watching a run",
    "tapct_kernels": "Operations",
}
TOP = ("config", "recipes", "errors", "report", "figures")


def _modules(package: str) -> list[str]:
    """Return the names of a package's public modules, none where it does not exist."""
    try:
        found = importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        return []
    infos = pkgutil.walk_packages(found.__path__, f"{package}.")
    return sorted(i.name for i in infos if not i.ispkg and "._" not in i.name)


def _write(name: str, text: str) -> None:
    """Write a page; one that has not changed keeps its time, so that Sphinx need not read it."""
    path = API / name
    _written.add(path)
    path.parent.mkdir(exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def _write_modules() -> None:
    groups = {package: (title, _modules(package)) for package, title in PACKAGES.items()}
    groups["tapct_fast"] = ("Settings, errors, pages", [f"tapct_fast.{name}" for name in TOP])
    groups = {name: group for name, group in groups.items() if group[1]}
    lines = [
        "# Python",
        "",
        "What `import tapct_fast` offers; what other pages name may change between releases.",
        "",
        "| name | does |",
        "|---|---|",
    ]
    for name in tapct_fast.__all__:
        value = getattr(tapct_fast, name)
        role = "class" if inspect.isclass(value) else "func"
        home = f"{value.__module__}.{value.__qualname__}"
        lines.append(f"| {{py:{role}}}`{name} <{home}>` | {_summary(inspect.getdoc(value))} |")
    _write("index.md", "\n".join([*lines, "", *_toctree([f"group-{g}" for g in groups])]))
    for package, (title, modules) in groups.items():
        lines = [f"# {title}", "", "| module | |", "|---|---|"]
        for module in modules:
            text = _summary(_docstring(module))
            lines.append(f"| [{module.partition('.')[2]}]({module}.md) | {text} |")
            directive = f".. automodule:: {module}\n   :members:"
            _write(f"{module}.md", f"# {module}\n\n```{{eval-rst}}\n{directive}\n```\n")
        entries = [f"{module.partition('.')[2]} <{module}>" for module in modules]
        _write(f"group-{package}.md", "\n".join([*lines, "", *_toctree(entries)]))


def _docstring(module: str) -> str | None:
    """Return the docstring of a module that is not imported: it may want what is not there."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return ast.get_docstring(ast.parse(Path(spec.origin).read_text()))


def _summary(docstring: str | None) -> str:
    return " ".join((docstring or "").partition("\n\n")[0].split()).replace("|", "\\|")


def _toctree(pages: Sequence[str]) -> list[str]:
    return ["```{toctree}", ":hidden:", ":titlesonly:", "", *pages, "```", ""]


def _write_command_line() -> None:
    os.environ["COLUMNS"] = "92"  # of the help
    lines = ["# The command line"]
    for name, parser in (("tapct-fast", build_parser()), ("tapct-fast bench", bench_parser())):
        lines += ["", f"## {name}", "", "```text", parser.format_help().rstrip(), "```"]
        (verbs,) = (a.choices for a in parser._actions if isinstance(a.choices, dict))
        for verb, own in verbs.items():
            if own.add_help:  # not bench, whose parser comes next
                text = own.format_help().rstrip()
                lines += ["", f"### {name} {verb}", "", "```text", text, "```"]
    _write("command-line.md", "\n".join(lines) + "\n")


def _write_copies() -> None:
    """Bring pages of other folders into the site, and their links with them."""
    ops = (REPOSITORY / "kernels" / "README.md").read_text()
    ops = re.sub(r"\]\(tapct_kernels/(\w+)\.py\)", r"](tapct_kernels.\1.md)", ops)
    ops = ops.replace("](../CONTRIBUTING.md)", "](contributing.md)")
    ops = ops.replace("](resources.jsonl)", "](../../kernels/resources.jsonl)")
    ops = ops.replace("](../bench/ema.py)", "](../../bench/ema.py)")
    ops = ops.replace("[bench/results](../bench/results)", "`bench/results`")  # a folder
    _write("kernels.md", ops)
    _write("contributing.md", (REPOSITORY / "CONTRIBUTING.md").read_text())


def _unwrap_ops() -> None:
    """Put the function that a registered op was made of in its place, for autodoc to see."""
    for name in _modules(tapct_kernels.__name__):
        module = importlib.import_module(name)
        for key, value in list(vars(module).items()):
            if hasattr(value, "_init_fn"):
                setattr(module, key, value._init_fn)


class _Definition(ast.NodeVisitor):
    """Functions and classes of a module by their qualified names."""

    def __init__(self) -> None:
        self.found: dict[str, ast.AST] = {}
        self._parents: list[str] = []

    def visit(self, node: ast.AST) -> None:
        """Remember what has a name, and look inside classes."""
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            self.found[".".join([*self._parents, node.name])] = node
        if isinstance(node, ast.ClassDef):
            self._parents.append(node.name)
            self.generic_visit(node)
            self._parents.pop()
        elif not isinstance(node, ast.FunctionDef):
            self.generic_visit(node)


@functools.cache
def _definitions(module: str) -> dict[str, ast.AST]:
    source = inspect.getsourcefile(sys.modules[module])
    visitor = _Definition()
    visitor.visit(ast.parse(Path(source or "").read_text()))
    return visitor.found


def _fields(node: ast.ClassDef) -> Iterator[ast.AnnAssign]:
    for child in node.body:
        if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
            yield child


def _is_record(value: Any) -> bool:
    return inspect.isclass(value) and (dataclasses.is_dataclass(value) or hasattr(value, "_fields"))


def _sign(
    _app: Sphinx, kind: str, _name: str, value: Any, _options: Any, _signature: str, returns: str
) -> tuple[str, str] | None:
    """Return the signature with annotations as they are written: ``Tensor``, ``Zyx``."""
    module = sys.modules.get(getattr(value, "__module__", None) or "")
    if kind not in ("class", "exception", "function", "method") or module is None:
        return None
    if not module.__name__.startswith("tapct_"):
        return None
    found = _definitions(module.__name__)
    node = found.get(value.__qualname__)
    if isinstance(node, ast.ClassDef):
        init = found.get(f"{value.__qualname__}.__init__")
        if init is None and _is_record(value):
            fields = [
                f"{ast.unparse(f.target)}: {ast.unparse(f.annotation)}"
                + (f" = {_default(f.value)}" if f.value else "")
                for f in _fields(node)
            ]
            return f"({', '.join(fields)})", returns
        node = init
    if not isinstance(node, ast.FunctionDef):
        return None
    args = node.args
    if kind != "function" and not any(
        isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list
    ):
        args = ast.arguments(
            args.posonlyargs, args.args[1:], args.vararg, args.kwonlyargs, args.kw_defaults,
            args.kwarg, args.defaults,
        )  # fmt: skip
    shown = ast.unparse(node.returns) if node.returns and node.name != "__init__" else ""
    return f"({ast.unparse(args)})", shown


def _default(value: ast.AST) -> str:
    text = ast.unparse(value)
    return "..." if text.startswith("field(") else text


def _describe(
    _app: Sphinx, kind: str, _name: str, value: Any, _options: Any, lines: list[str]
) -> None:
    """Turn a docstring into reStructuredText; runs before napoleon does."""
    lines[:] = [re.sub(r"(?<![\\`])\|(?!`)", r"\\|", line) for line in lines]
    if kind == "module":
        lines[:] = _set_apart(lines)
    # Napoleon takes for a type what stands before a colon here; our types are annotations.
    for number, line in enumerate(lines):
        is_returned = number and lines[number - 1].strip() in ("Returns:", "Yields:")
        if is_returned or (number == 0 and kind in ("attribute", "property")):
            lines[number] = line.replace(":", _COLON)
    is_told = any(line.strip() == "Attributes:" for line in lines)
    if kind == "class" and _is_record(value) and not is_told:
        comments = list(_comments(value))
        lines += ["", *(f":ivar {field}: {text}" for field, text in comments), ""]


_COLON = "\N{MODIFIER LETTER COLON}"


def _restore_colons(
    _app: Sphinx, _kind: str, _name: str, _value: Any, _options: Any, lines: list[str]
) -> None:
    lines[:] = [line.replace(_COLON, ":") for line in lines]


def _set_apart(lines: list[str]) -> list[str]:
    """Show what is indented as it is typed (formulas, commands, folders); end lists by a space."""
    shown: list[str] = []
    is_block = is_list = False
    for line in lines:
        before = shown[-1] if shown else ""
        if line.startswith("    ") and not is_block and not before:
            if not any(text.endswith("::") for text in shown[-2:]):
                shown += ["::", ""]
            is_block = True
        elif line and not line.startswith(" "):
            is_block = False
            if is_list and before and not line.startswith("- "):
                shown.append("")
            if before and line.startswith(("Shape suffixes", "Shape letters", "Source")):
                shown.append("")
            is_list = line.startswith("- ")
        shown.append(line)
    return shown


def _comments(value: type) -> Iterator[tuple[str, str]]:
    """Yield the fields of a record that a comment explains, behind them or above."""
    node = _definitions(value.__module__).get(value.__qualname__)
    source = inspect.getsourcefile(value)
    if not isinstance(node, ast.ClassDef) or source is None:
        return
    text = Path(source).read_text().splitlines()
    for field in _fields(node):
        last = text[field.end_lineno - 1][field.end_col_offset :] if field.end_lineno else ""
        words = [last.partition("# ")[2]] if "# " in last else []
        above = field.lineno - 2
        while text[above].strip().startswith("# "):
            words.insert(0, text[above].strip()[2:])
            above -= 1
        if words:
            yield ast.unparse(field.target), " ".join(words).replace("|", r"\|")


def _leave_out(
    _app: Sphinx, _kind: str, _name: str, value: Any, _skip: bool, _options: Any
) -> bool | None:
    """Leave out the fields of named tuples, which the signature shows."""
    text = getattr(value, "__doc__", None) or ""
    return True if text.startswith("Alias for field number") else None


class _Names(SphinxPostTransform):
    """Resolves the names of annotations as Python does: in the module that they stand in.

    What belongs to this project becomes a link, what Python finds elsewhere (torch, NumPy, the
    standard library, aliases) text. What it does not find stays, for a warning and so an error.
    """

    default_priority = ReferencesResolver.default_priority - 1

    def run(self, **_: Any) -> None:
        """Treat every reference of a page."""
        for node in list(self.document.findall(pending_xref)):
            is_type = node.get("refdomain") == "py" and node["reftype"] in ("class", "obj", "exc")
            value = _find(node["reftarget"].lstrip("~."), node.get("py:module"))
            if not is_type or value is _NOTHING:
                continue
            home, name = (getattr(value, key, "") for key in ("__module__", "__qualname__"))
            if f"{home}.{name}" in self.env.domains.python_domain.objects:
                node["reftarget"] = f"{home}.{name}"
            else:
                node.replace_self(node.children)


_NOTHING = object()


def _find(name: str, module: str | None) -> Any:
    """Return what a dotted name stands for in a module, among builtins, or by its full name."""
    parts = name.split(".")
    for space in (vars(sys.modules.get(module or "", builtins)), vars(builtins), vars(typing)):
        value = functools.reduce(_member, parts[1:], space.get(parts[0], _NOTHING))
        if value is not _NOTHING:
            return value
    for end in range(len(parts) - 1, 0, -1):
        with contextlib.suppress(ImportError):
            start = importlib.import_module(".".join(parts[:end]))
            return functools.reduce(_member, parts[end:], start)
    return _NOTHING


def _member(value: Any, name: str) -> Any:
    return getattr(value, name, _NOTHING)


def setup(app: Sphinx) -> dict[str, bool]:
    """Write the pages, and register the hooks."""
    before = set(API.glob("*.md"))
    _write_command_line()
    _write_modules()
    _write_copies()
    for page in before - _written:  # of a module that is gone
        page.unlink()
    _unwrap_ops()
    app.connect("autodoc-process-signature", _sign)
    app.connect("autodoc-process-docstring", _describe, priority=400)  # napoleon has 500
    app.connect("autodoc-process-docstring", _restore_colons, priority=600)
    app.connect("autodoc-skip-member", _leave_out)
    app.add_post_transform(_Names)
    return {"parallel_read_safe": True}

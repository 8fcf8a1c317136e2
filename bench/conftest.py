"""``pytest bench``: every case of every op, variant by variant, timed by pytest-benchmark.

Sizes are tiny unless ``--full``; ``--op NAME`` takes only some ops. ``--benchmark-json``,
``--benchmark-autosave`` and ``--benchmark-compare`` work as everywhere.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of this folder."""
    group = parser.getgroup("bench")
    group.addoption("--full", action="store_true", help="the sizes of the results, not tiny ones")
    group.addoption("--op", action="append", default=[], metavar="NAME", help="only this op")

"""A failed write leaves the old file or folder whole and nothing beside it."""

import contextlib
import hashlib
import json
from pathlib import Path

import pytest

from tapct_fast.errors import FormatError
from tapct_fast.io.atomic import (
    atomic_file,
    atomic_folder,
    read_json,
    sha256_file,
    write_atomic,
    write_json,
)


class PowerCut(Exception):
    """Ends a write half way."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_atomic(path, b"old")
    write_atomic(path, b"new and longer")
    assert path.read_bytes() == b"new and longer"
    assert names(tmp_path) == ["a"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with contextlib.suppress(PowerCut), atomic_file(path) as temporary:
        temporary.write_bytes(b"half")
        raise PowerCut
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "step"
    with atomic_folder(path) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "x").write_text("1")
        assert not path.exists()
    assert (path / "sub" / "x").read_text() == "1"
    with contextlib.suppress(PowerCut), atomic_folder(path) as temporary:
        (temporary / "y").write_text("2")
        raise PowerCut
    assert names(path) == ["sub"]
    with atomic_folder(path) as temporary:
        (temporary / "z").write_text("3")
    assert names(path) == ["z"]
    assert names(tmp_path) == ["step"]


def test_sha256_is_that_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc" * 1000)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(b"abc" * 1000).hexdigest()


def test_json_round_trips_and_refuses_what_is_not_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"b": [1, 2.5, None, "x"]})
    assert read_json(path, "thing") == {"b": [1, 2.5, None, "x"]}
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"b": float("nan")})
    assert json.loads(path.read_text()) == {"b": [1, 2.5, None, "x"]}
    for text in ("", '{"b": [1', "[NaN]", "[Infinity]", "\xff", "[" * 100000):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(FormatError, match=r"thing: a\.json is not JSON"):
            read_json(path, "thing")
    with pytest.raises(FormatError, match="thing: there is no"):
        read_json(tmp_path / "none.json", "thing")

"""Write files and folders so that a reader finds either the old one or the whole new one.

A write goes to a temporary name in the same folder, reaches the disk (fsync), then takes the name.
"""

import contextlib
import gc
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from tapct_fast.errors import FormatError

MAX_JSON_BYTES = 1 << 30  # an index of a million cases is a third of this
_PIECE_BYTES = 1 << 20


def _temporary(path: Path) -> Path:
    # A leading dot: folder searches skip what an interrupted write leaves behind.
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def fsync_path(path: Path) -> None:
    """Wait until a file's or folder's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, replacing an existing file in one step.

    Raises:
        OSError: The disk is full or the folder cannot be written; ``path`` is as before.
    """
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; what is written there becomes ``path`` on success."""
    temporary = _temporary(path)
    try:
        yield temporary
        fsync_path(temporary)
        temporary.replace(path)
        fsync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder beside ``path``; it becomes ``path`` on success and is removed on failure.

    An existing ``path`` is replaced; between two renames it is absent for a moment, never half
    written.
    """
    temporary, old = _temporary(path), _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                fsync_path(Path(folder, name))
            fsync_path(Path(folder))
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        fsync_path(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_hashed(path: Path, parts: Iterable[bytes | memoryview]) -> str:
    """Write ``parts`` to a new file, wait until they are on the disk, return their SHA-256.

    Raises:
        OSError: The disk is full or cannot be written.
    """
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in parts:
            view = memoryview(part)
            # In pieces that stay in the cache from the hash to the write.
            for start in range(0, len(view), _PIECE_BYTES):
                piece = view[start : start + _PIECE_BYTES]
                digest.update(piece)
                file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def remove_folder(path: Path) -> None:
    """Remove a folder so that it is there whole or, from the first moment on, not at all."""
    aside = _temporary(path)
    path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's content as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, obj: Any) -> None:
    """Write ``obj`` as JSON text, atomically.

    Raises:
        ValueError: ``obj`` holds NaN or infinity, which JSON does not have.
    """
    write_atomic(path, (json.dumps(obj, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path, kind: str) -> Any:
    """Parse a JSON file strictly; ``kind`` names it in errors, e.g. ``"store index"``.

    Raises:
        FormatError: The file is missing, too large or not JSON.
    """
    return parse_json(read_limited(path, kind), path, kind)


def read_limited(path: Path, kind: str, *, limit: int = MAX_JSON_BYTES) -> bytes:
    """Return the content of a file; ``kind`` names it in errors.

    Raises:
        FormatError: The file is missing or larger than ``limit`` bytes.
    """
    try:
        with path.open("rb") as file:
            data = file.read(min(path.stat().st_size, limit) + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise FormatError(kind, f"there is no {path.name}") from None
    if len(data) > limit:
        raise FormatError(kind, f"{path.name} is larger than {limit} bytes")
    return data


def parse_json(data: bytes, path: Path, kind: str) -> Any:
    """Parse what ``path`` holds strictly.

    Raises:
        FormatError: It is not JSON.
    """
    try:
        with without_collector():
            return json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise FormatError(kind, f"{path.name} is not JSON; it is damaged or cut short") from None


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """Make many objects that live on without collecting garbage in between.

    The collector looks at all of them again and again: 3.1 against 1.3 s for an index of 320 MB.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(text)  # NaN and Infinity are Python's, not JSON's

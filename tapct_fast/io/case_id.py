"""Case ids: keyed hashes of where a scan lies, so that no store, log or index holds a path.

Without the folder's ``.key`` an id says nothing; with it, a scan can be found again from its id.
"""

import hashlib
import os
import secrets
from pathlib import Path

from tapct_fast.errors import StoreError
from tapct_fast.io.atomic import atomic_file

KEY_BYTES = 32


def case_id(scan: Path, key: bytes, series: str | None = None) -> str:
    """Return the id of a scan, or of one series in its folder: ``case-`` and 16 hex digits."""
    # Not Path.resolve, which raises for a link to itself, with the path in its message.
    name = os.fsencode(os.path.realpath(scan))
    if series is not None:
        name += b"\0" + series.encode()  # no path holds a zero byte
    return "case-" + hashlib.blake2b(name, key=key, digest_size=8).hexdigest()


def read_key(directory: Path) -> bytes:
    """Read the key of a store or features folder.

    Raises:
        StoreError: There is none, or it is damaged.
    """
    try:
        key = (directory / ".key").read_bytes()
    except OSError as error:
        raise StoreError(f"the folder's .key cannot be read: {error.strerror}") from None
    if len(key) != KEY_BYTES:
        raise StoreError("the folder's .key is damaged; restore it, or start a new folder")
    return key


def ensure_key(directory: Path) -> bytes:
    """Return the folder's key; draw one, readable by its owner only, where there is none."""
    path = directory / ".key"
    if not path.exists():
        with atomic_file(path) as temporary:
            temporary.touch(mode=0o600)
            temporary.write_bytes(secrets.token_bytes(KEY_BYTES))
    return read_key(directory)

"""What a packed scan was made of: a digest of its files, and a stamp that tells whether to hash.

A digest never holds a name or a path. It does let whoever has the same file recognise it.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

_HEADERS = (".nhdr", ".mhd")  # text headers whose voxels lie in a file beside them


class SourceStamp(NamedTuple):
    """Cheap to take: a source with an equal stamp is taken to be unchanged, as rsync does.

    Attributes:
        num_bytes: Of all files of the scan.
        times: SHA-256, hexadecimal, over the sorted sizes and modification times of the files.
    """

    num_bytes: int
    times: str


def source_files(scan: Path) -> list[Path]:
    """List the files of a scan: itself, those in its folder, or those that share its name."""
    if scan.is_dir():
        return [path for path in scan.iterdir() if path.is_file()]
    if scan.suffix.lower() in _HEADERS:
        return [p for p in scan.parent.glob("*") if p.is_file() and p.stem == scan.stem]
    return [scan]


def stamp_source(scan: Path) -> SourceStamp:
    """Take the stamp of a scan from the sizes and times of its files.

    Raises:
        OSError: A file cannot be examined.
    """
    status = [path.stat() for path in source_files(scan)]
    rows = sorted((s.st_size, s.st_mtime_ns) for s in status)
    times = hashlib.sha256("".join(f"{size} {time}\n" for size, time in rows).encode())
    return SourceStamp(sum(size for size, _ in rows), times.hexdigest())


def sha256_source(scan: Path) -> bytes:
    """Hash a scan: SHA-256 of its one file, or of the sorted SHA-256 digests of its files.

    Raises:
        OSError: A file cannot be read.
    """
    digests = []
    for path in source_files(scan):
        with path.open("rb") as file:  # file_digest and its updates hold no GIL
            digests.append(hashlib.file_digest(file, "sha256").digest())
    if len(digests) == 1 and not scan.is_dir():
        return digests[0]
    return hashlib.sha256(b"".join(sorted(digests))).digest()

"""Features of many scans in a folder, each scan exactly once however often the work is cut short.

The folder::

    cases/<id>.safetensors, .json   features of a scan (or <id>.zarr), and their record
    refused/<id>.json               why a scan has no features
    manifest.parquet                the scans of the last finished call, in input order
    quarantine.jsonl                every refusal, with field, reason and code
    settings.json                   what the features depend on
    progress.json                   numbers of the running or last call
    .key, .lock                     the secret behind the ids; held while a process writes here

Nothing in it holds a path or a name. But for ``progress.json``, which holds times, the bytes of a
finished call are those of one that nothing interrupted.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tapct_fast.backbone.backbone import Backbone
from tapct_fast.downstream.archive import Done, Item, Job, embed_items
from tapct_fast.downstream.encode import free_host_bytes, steady_batch_size
from tapct_fast.downstream.features import SUFFIXES
from tapct_fast.downstream.manifest import require_pyarrow, write_lists
from tapct_fast.downstream.progress import Progress
from tapct_fast.downstream.ray_engine import RayCluster, embed_on_ray
from tapct_fast.downstream.records import CASES, REFUSED, FeatureFormat
from tapct_fast.downstream.windows import tile
from tapct_fast.errors import InputError
from tapct_fast.io.atomic import read_json, write_json
from tapct_fast.io.case_id import case_id, ensure_key
from tapct_fast.io.read import iter_scans

SETTINGS_FILE = "settings.json"
_MOST_READERS = 4  # of scans that are read at a time for a GPU


@dataclass(frozen=True, slots=True)
class EmbedReport:
    """Scans of one ``embed_scans`` call that were embedded, were there before, were refused.

    Attributes:
        embedded: In this call.
        skipped: Features of the same files were there.
        quarantined: Have no features, now or from an earlier call; see ``quarantine.jsonl``.
        progress: The content of ``progress.json``: scans per second, shares of time, versions.
    """

    embedded: int
    skipped: int
    quarantined: int
    progress: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


def embed_scans(
    backbone: Backbone,
    paths: Sequence[Path],
    out: Path,
    *,
    overlap: float = 0.5,
    batch_size: int | None = None,
    series: str | None = None,
    check_hu: bool = True,
    format: FeatureFormat = "safetensors",
    timeout_s: float = 600.0,
    readers: int | None = None,
    memory_bytes: int | None = None,
    ray: RayCluster | None = None,
    progress: bool = False,
    every_s: float = 10.0,
) -> EmbedReport:
    """Embed scans into a folder; run again, it embeds only what is missing or has changed.

    A scan that could not be read is passed over with field and reason, and tried again when its
    files have changed, or in the next run where the reason may have passed (storage, memory, a
    missing package). Ids are keyed hashes: without ``.key`` they say nothing about the scans.

    Args:
        backbone: From ``load_backbone``.
        paths: Scan files, DICOM series folders, or folders searched recursively.
        out: Made if it is missing. One process at a time may write it.
        overlap: See ``embed_volume``.
        batch_size: Windows per forward pass; does not change the features beyond rounding. None
            takes what the device's memory allows, and in later runs what the first one took, so
            that every bit repeats.
        series: See ``read_volume``; for paths that are all DICOM folders.
        check_hu: Refuse scans whose values cannot be HU.
        format: ``safetensors``, a file per scan, or ``zarr``, a Zarr v3 group per scan.
        timeout_s: For reading one scan; a read that does not end is left behind.
        readers: Scans read at a time beside the encoder; None takes 1 for a CPU, up to 4 for a GPU.
        memory_bytes: For scans read ahead, by their headers; None takes a quarter of what is free.
        ray: Do the work on a Ray cluster instead of in this process; the bytes are the same.
        progress: Show a progress bar on stderr, off a terminal a line now and then.
        every_s: Seconds between lines, and between writings of ``progress.json``.

    Raises:
        InputError: A path holds no scan, a package is missing, ``out`` cannot be written, is being
            written by another process or holds features of another backbone or overlap.
        StoppedError: The storage or the cluster does not answer; the same call goes on.
    """
    require_pyarrow()
    tile((1, 1, 1), (1, 1, 1), overlap)  # refuse a bad overlap before the first scan is read
    if format not in SUFFIXES:
        raise InputError(f"format={format!r} is not one of {', '.join(SUFFIXES)}")
    for name, number in (
        *(("batch_size", batch_size), ("readers", readers), ("memory_bytes", memory_bytes)),
        *(("timeout_s", timeout_s), ("every_s", every_s)),
    ):
        if number is not None and number <= 0:
            raise InputError(f"{name}={number} is not positive")
    places = [os.fsencode(scan) for scan in iter_scans(paths)]
    device = backbone.device if ray is None else ray.torch_device
    job = Job(
        out=out,
        backbone=backbone.fingerprint(),
        format=format,
        overlap=overlap,
        batch_size=batch_size or 0,
        series=series,
        check_hu=check_hu,
        timeout_s=timeout_s,
        readers=readers or (1 if device.type == "cpu" else min(_MOST_READERS, os.cpu_count() or 1)),
        memory_bytes=memory_bytes or free_host_bytes() // 4,
    )
    try:
        (out / CASES).mkdir(parents=True, exist_ok=True)
        (out / REFUSED).mkdir(exist_ok=True)
        with _locked(out):
            _sweep(out)
            size = _settle(job, batch_size, steady_batch_size(backbone, device))
            job = job._replace(batch_size=size)
            return _embed_scans(backbone, places, job, ray, progress, every_s)
    except OSError as error:
        raise InputError(f"the output folder cannot be written: {error.strerror}") from None


def _embed_scans(
    backbone: Backbone,
    places: Sequence[bytes],
    job: Job,
    ray: RayCluster | None,
    progress: bool,
    every_s: float,
) -> EmbedReport:
    key = ensure_key(job.out)
    # Paths as bytes: they and the ids are all that grows with the archive.
    ids = [case_id(Path(os.fsdecode(place)), key, job.series) for place in places]
    items = (Item(case, Path(os.fsdecode(place))) for case, place in zip(ids, places, strict=True))
    about = {
        "engine": "local" if ray is None else "ray",
        "workers": 1 if ray is None else ray.workers or None,  # None: one per GPU or core
        "device": (backbone.device if ray is None else ray.torch_device).type,
        "backbone": job.backbone,
        "settings": {
            name: getattr(job, name)
            for name in ("format", "overlap", "batch_size", "check_hu", "timeout_s", "readers")
        },
    }
    log = Progress(job.out, len(ids), is_shown=progress, every_s=every_s, about=about)
    with log:
        done: Iterator[Done]
        if ray is None:
            done = embed_items(backbone, job, items)
        else:
            done = embed_on_ray(backbone, job, items, len(ids), ray)
        with contextlib.closing(done):  # type: ignore[type-var]  # both are generators
            for scan in done:
                log.add(scan)
        write_lists(job.records, ids, job.backbone)
    sums = log.written
    return EmbedReport(sums["embedded"], sums["skipped"], sums["quarantined"], sums)


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the folder's lock; the system releases it when the process ends, however it ends."""
    with (out / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(20).strip()
            who = f"process {holder}" if holder.isdecimal() else "another process"
            raise InputError(
                f"OUT is being written by {who}; wait for its end, or name another folder"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _sweep(out: Path) -> None:
    """Remove what killed runs were writing: the lock says that nobody is."""
    for folder in (out, out / CASES, out / REFUSED):
        with os.scandir(folder) as entries:
            left_over = [e for e in entries if e.name.startswith(".") and e.name.endswith(".tmp")]
        for entry in left_over:
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                Path(entry.path).unlink()


def _settle(job: Job, asked: int | None, steady: int) -> int:
    """Refuse to mix features of other settings, and return the windows per forward pass."""
    path = job.out / SETTINGS_FILE
    settings = {"backbone": job.backbone, "overlap": job.overlap, "format": job.format}
    if not path.exists():
        write_json(path, {**settings, "batch_size": asked or steady})
        return asked or steady
    found = read_json(path, "embed settings")
    if not isinstance(found, dict):
        found = {}
    for name, value in settings.items():
        if found.get(name) != value:
            raise InputError(
                f"OUT holds features with another {name}; name a new folder, or embed as before"
            )
    size = found.get("batch_size")
    return asked or (size if isinstance(size, int) and size > 0 else steady)

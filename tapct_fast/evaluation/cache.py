"""Features of every scan by every encoder, computed once and found again by content.

A file is named by a keyed hash of the voxels and their place, below a folder per encoder: a scan
that has changed, or other weights, never meet old features. What is read is verified by its sha256;
what was damaged is computed again. Nothing here holds a path or a name of a scan.
"""

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from tapct_fast.downstream.features import Features, load_features, save_features
from tapct_fast.errors import FormatError, InputError, Policy, TapctError
from tapct_fast.evaluation.encoders import Encoder
from tapct_fast.io.atomic import read_json, write_json
from tapct_fast.io.quarantine import Refusal, read_or_refuse
from tapct_fast.io.source import stamp_source
from tapct_fast.io.volume import Volume

VERSION = 1  # of what an encoder's features depend on beside its fingerprint
_HEX = re.compile(r"[0-9a-f]{32}")


class Content(NamedTuple):
    """What a scan holds, by keyed hashes."""

    voxels: str  # equal for a copy, wherever it lies
    grid: str  # of the voxels and their place in the patient


class CachedScan(NamedTuple):
    """A scan that takes part."""

    position: int  # in the data set, from 0
    path: Path
    case: str  # its id
    content: Content


class Reading(NamedTuple):
    """How scans are read; see ``read_volume``."""

    check_hu: bool = True
    policy: Policy = "error"


class FeatureCache:
    """A folder of features; several processes may use it, each file appears whole.

    Args:
        folder: Made if it is missing.
        key: For the hashes.
        reading: How scans are read.
        notify: Gets a sentence about each file that is computed again.
    """

    def __init__(
        self, folder: Path, key: bytes, reading: Reading, notify: Callable[[str], None]
    ) -> None:
        self.folder = folder
        self.num_encoded = 0  # scans times encoders, by this object
        self.key = key
        self._reading = reading
        self._notify = notify
        self._fingerprints: dict[str, str] = {}
        self._once: Path | None = None  # for encoders without a fingerprint
        (folder / "scans").mkdir(parents=True, exist_ok=True)

    def content(self, scan: Path, case: str) -> Content | Refusal:
        """Return the hashes of a scan, read again only where its files have changed."""
        record = self.folder / "scans" / f"{case}.json"
        try:
            stamp = stamp_source(scan)
        except OSError as error:
            return Refusal(case, "file", f"it cannot be examined: {error.strerror}", "input")
        known = {"num_bytes": stamp.num_bytes, "times": stamp.times, **self._reading._asdict()}
        found = _known(record, known)
        if found is not None:
            return found
        volume = self._read(scan, case)
        if isinstance(volume, Refusal):
            return volume
        found = content_of(volume, self.key)
        write_json(record, {**known, **found._asdict()})
        return found

    def encode_missing(
        self,
        encoders: Sequence[Encoder],
        scans: Sequence[CachedScan],
        *,
        progress: bool,
    ) -> None:
        """Encode what is missing or damaged: each scan is read once for all encoders.

        Args:
            encoders: All that take part, with names of their own.
            scans: All that are scored.
            progress: Show a progress bar on stderr.

        Raises:
            InputError: A scan was replaced meanwhile, or an encoder cannot encode one; both are
                named, the scan by its position.
        """
        missing: list[tuple[CachedScan, list[Encoder]]] = []
        for scan in scans:
            lacking = [e for e in encoders if not self._is_intact(e, scan)]
            if lacking:
                missing.append((scan, lacking))
        for scan, lacking in tqdm(missing, desc="encode", unit="scan", disable=not progress):
            self._encode(lacking, scan)

    def features(self, encoder: Encoder, scan: CachedScan) -> Features:
        """Load and verify the features of a scan that ``encode_missing`` was given.

        Raises:
            FormatError: They were damaged since.
        """
        return load_features(self._place(encoder, scan.content))

    def fingerprint(self, encoder: Encoder) -> str:
        """Return the encoder's, which takes a second to compute for a large one, once."""
        if encoder.name not in self._fingerprints:
            self._fingerprints[encoder.name] = encoder.fingerprint()
        return self._fingerprints[encoder.name]

    def _place(self, encoder: Encoder, content: Content) -> Path:
        fingerprint = self.fingerprint(encoder)
        if fingerprint:
            name = hashlib.sha256(f"{VERSION} {fingerprint}".encode()).hexdigest()[:32]
            folder = self.folder / "features" / name
        else:
            assert self._once is not None
            folder = self._once / hashlib.sha256(encoder.name.encode()).hexdigest()[:32]
        return folder / f"{content.grid}.safetensors"

    @contextmanager
    def for_one_run(self) -> Iterator[None]:
        """Keep features of encoders without a fingerprint for as long as this lasts."""
        self._once = self.folder / f".once-{id(self):x}"
        shutil.rmtree(self._once, ignore_errors=True)
        try:
            yield
        finally:
            shutil.rmtree(self._once, ignore_errors=True)
            self._once = None

    def _read(self, scan: Path, case: str) -> Volume | Refusal:
        check_hu, policy = self._reading
        return read_or_refuse(scan, case, series=None, check_hu=check_hu, policy=policy)

    def _is_intact(self, encoder: Encoder, scan: CachedScan) -> bool:
        path = self._place(encoder, scan.content)
        if not (path.is_file() and path.with_suffix(".json").is_file()):
            return False
        try:
            load_features(path)
        except FormatError as error:
            self._notify(
                f"cached features of scan {scan.position + 1} by {encoder.name} are made again: "
                f"{error.reason}"
            )
            return False
        return True

    def _encode(self, encoders: Sequence[Encoder], scan: CachedScan) -> None:
        volume = self._read(scan.path, scan.case)
        if isinstance(volume, Refusal) or content_of(volume, self.key) != scan.content:
            raise InputError(f"scan {scan.position + 1} was changed during the run; run again")
        for encoder in encoders:
            path = self._place(encoder, scan.content)
            path.parent.mkdir(parents=True, exist_ok=True)
            where = f"{encoder.name} on scan {scan.position + 1}"
            try:
                features = encoder.encode(volume)
            except OSError as error:  # of a user's function, whose name of a file stays inside
                raise InputError(f"{where}: it could not read a file: {error.strerror}") from error
            except TapctError as error:
                # Left out for one encoder alone, it would not be scored on the same scans.
                raise InputError(f"{where}: {error}") from None
            try:
                save_features(features, path)
            except TapctError as error:
                raise InputError(f"{where}: {error}") from None
            self.num_encoded += 1


def content_of(volume: Volume, key: bytes) -> Content:
    """Return the keyed hashes of a scan."""
    shape = np.array(volume.hu_ZYX.shape, dtype="<i8")
    voxels = hashlib.blake2b(shape.tobytes(), key=key, digest_size=16)
    voxels.update(np.ascontiguousarray(volume.hu_ZYX, dtype="<i2").data)
    grid = hashlib.blake2b(voxels.digest(), key=key, digest_size=16)
    grid.update(np.ascontiguousarray(volume.affine, dtype="<f8").data)
    return Content(voxels.hexdigest(), grid.hexdigest())


def _known(record: Path, expected: dict[str, object]) -> Content | None:
    try:
        found = read_json(record, "scan record")
        if any(found[name] != value for name, value in expected.items()):
            return None
        content = Content(found["voxels"], found["grid"])
        return content if all(map(_HEX.fullmatch, content)) else None
    except (FormatError, KeyError, TypeError):
        return None  # not there yet, or damaged: the scan is read, and it is written again

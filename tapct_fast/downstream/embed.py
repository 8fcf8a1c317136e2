"""Features of many scans in a folder: only what is missing is encoded."""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from tapct_fast.backbone.backbone import Backbone
from tapct_fast.downstream.encode import embed_volume
from tapct_fast.downstream.features import FORMAT, VERSION, save_features
from tapct_fast.downstream.windows import tile
from tapct_fast.errors import InputError
from tapct_fast.io.atomic import read_json, write_json
from tapct_fast.io.case_id import case_id, ensure_key
from tapct_fast.io.quarantine import Refusal, read_or_refuse, write_quarantine
from tapct_fast.io.read import find_scans
from tapct_fast.io.volume import Volume

INDEX_FILE, SETTINGS_FILE = "index.json", "settings.json"


class EmbedReport(NamedTuple):
    """Scans of one ``embed_scans`` call that were embedded, were there before, were refused."""

    embedded: int
    skipped: int
    quarantined: int


def embed_scans(
    backbone: Backbone,
    paths: Sequence[Path],
    out: Path,
    *,
    overlap: float = 0.5,
    batch_size: int | None = None,
    series: str | None = None,
    check_hu: bool = True,
    progress: bool = False,
) -> EmbedReport:
    """Embed scans into a folder; run again, it embeds only what is missing.

    Files: ``cases/<id>.safetensors`` and ``.json`` per scan; ``index.json`` lists the scans of the
    last call in input order; ``quarantine.jsonl`` those that could not be read, with field and
    reason (they are tried again in the next run); ``settings.json`` what the features depend on.
    Ids are keyed hashes: without ``.key`` they say nothing about the scans.

    Args:
        backbone: From ``load_backbone``.
        paths: Scan files, DICOM series folders, or folders searched recursively.
        out: Made if it is missing.
        overlap: See ``embed_volume``.
        batch_size: See ``embed_volume``; does not change the features beyond rounding.
        series: See ``read_volume``; for paths that are all DICOM folders.
        check_hu: Refuse scans whose values cannot be HU.
        progress: Show a progress bar on stderr.

    Raises:
        InputError: A path holds no scan, ``out`` cannot be written or holds features of another
            backbone or overlap.
        BackboneError: The features are not finite.
    """
    scans = find_scans(paths)
    tile((1, 1, 1), (1, 1, 1), overlap)  # refuse a bad overlap before the first scan is read
    try:
        return _embed_scans(backbone, scans, out, overlap, batch_size, series, check_hu, progress)
    except OSError as error:
        raise InputError(f"the output folder cannot be written: {error.strerror}") from None


def _embed_scans(
    backbone: Backbone,
    scans: Sequence[Path],
    out: Path,
    overlap: float,
    batch_size: int | None,
    series: str | None,
    check_hu: bool,
    progress: bool,
) -> EmbedReport:
    (out / "cases").mkdir(parents=True, exist_ok=True)
    _require_same_settings(out, {"backbone": backbone.fingerprint(), "overlap": overlap})
    key = ensure_key(out)
    ids = [case_id(scan, key, series) for scan in scans]
    refused: list[Refusal] = []
    embedded = 0
    todo = dict(zip(ids, scans, strict=True))  # a scan named twice is embedded once
    missing = [case for case in todo if not _is_there(out, case)]
    skipped = len(todo) - len(missing)
    # The next scan is read while this one is encoded.
    with ThreadPoolExecutor(1, "embed-read") as reader:
        reads: deque[Future[Volume | Refusal]] = deque()
        for i, case in enumerate(tqdm(missing, desc="embed", unit="scan", disable=not progress)):
            for ahead in missing[i + len(reads) : i + 2]:
                reads.append(
                    reader.submit(
                        read_or_refuse, todo[ahead], ahead, series=series, check_hu=check_hu
                    )
                )
            volume = reads.popleft().result()
            if isinstance(volume, Refusal):
                refused.append(volume)
                continue
            features = embed_volume(backbone, volume, overlap=overlap, batch_size=batch_size)
            save_features(features, out / "cases" / f"{case}.safetensors")
            embedded += 1
    write_quarantine(out, ids, refused)
    bad = {refusal.case for refusal in refused}
    cases = [{"case": case, "is_quarantined": case in bad} for case in ids]
    write_json(out / INDEX_FILE, {"format": FORMAT, "version": VERSION, "cases": cases})
    return EmbedReport(embedded, skipped, len(refused))


def _is_there(out: Path, case: str) -> bool:
    path = out / "cases" / f"{case}.safetensors"
    return path.is_file() and path.with_suffix(".json").is_file()


def _require_same_settings(out: Path, settings: dict[str, Any]) -> None:
    path = out / SETTINGS_FILE
    if not path.exists():
        write_json(path, settings)
        return
    found = read_json(path, "embed settings")
    for name, value in settings.items():
        if not isinstance(found, dict) or found.get(name) != value:
            raise InputError(
                f"OUT holds features with another {name}; name a new folder, or embed as before"
            )

"""What a finished call writes about all its scans: manifest and list of refusals.

Both are functions of the records of the folder and the order of the scans: no time of day, no
order of finishing. A call that was killed any number of times ends with the same bytes. They are
written row by row: of the archive only ids are held.
"""

import json
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from tapct_fast.downstream.records import CASES, Records, refused_cases
from tapct_fast.errors import FormatError, InputError
from tapct_fast.io.atomic import atomic_file
from tapct_fast.io.quarantine import QUARANTINE_FILE

MANIFEST_FILE = "manifest.parquet"
ROW_GROUP = 8192  # rows that are held at a time


def require_pyarrow() -> ModuleType:
    """Return ``pyarrow.parquet``, before hours of work whose manifest could not be written.

    Raises:
        InputError: It is not installed.
    """
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError(
            "the manifest is Parquet, and pyarrow is not installed: pip install 'tapct-fast[embed]'"
        ) from None
    module: ModuleType = parquet
    return module


def write_lists(records: Records, cases: Sequence[str], backbone: str) -> None:
    """Write manifest and list of refusals of these scans, in this order.

    The list of refusals also keeps those of scans that earlier calls named, behind the others.

    Raises:
        FormatError: A scan has neither features nor a refusal: its record was removed meanwhile.
    """
    bad = set(refused_cases(records.out))
    first = [case for case in cases if case in bad]
    others = sorted(bad.difference(first))

    with (
        atomic_file(records.out / QUARANTINE_FILE) as temporary,
        temporary.open("w", encoding="ascii") as file,
    ):
        for case in (*first, *others):
            refusal = records.refusal(case)
            if refusal is not None:
                file.write(json.dumps(refusal._asdict()) + "\n")
    _write_manifest(records, cases, bad, backbone)


def _write_manifest(records: Records, cases: Sequence[str], bad: set[str], backbone: str) -> None:
    parquet = require_pyarrow()
    import pyarrow

    schema = _schema(pyarrow)
    # Every setting that shapes the bytes is said here: defaults change between releases.
    settings = {
        "version": "2.6",
        "data_page_version": "1.0",
        "compression": "zstd",
        "compression_level": 3,
        "use_dictionary": ["status", "code", "backbone"],
        "write_statistics": True,
        "store_schema": False,
    }
    path = records.out / MANIFEST_FILE
    with atomic_file(path) as temp, parquet.ParquetWriter(temp, schema, **settings) as writer:
        for first in range(0, len(cases), ROW_GROUP):
            rows = [
                _refused_row(records, case, backbone)
                if case in bad
                else _embedded_row(records, case)
                for case in cases[first : first + ROW_GROUP]
            ]
            table = pyarrow.Table.from_pylist(rows, schema=schema)
            writer.write_table(table, row_group_size=ROW_GROUP)


def _schema(pyarrow: Any) -> Any:
    text, number = pyarrow.string(), pyarrow.float64()
    return pyarrow.schema(
        [
            pyarrow.field("case", text, nullable=False),
            pyarrow.field("status", text, nullable=False),  # embedded or quarantined
            ("file", text),
            ("grid_zyx", pyarrow.list_(pyarrow.int32())),
            ("spacing_mm", pyarrow.list_(number)),  # z, y, x
            ("affine", pyarrow.list_(number)),  # 16 values, row by row
            ("num_windows", pyarrow.int32()),
            ("sha256", text),  # of the features
            ("bytes", pyarrow.int64()),  # of the features
            ("source_sha256", text),
            ("source_bytes", pyarrow.int64()),
            pyarrow.field("backbone", text, nullable=False),
            ("code", text),  # of the refusal, see io.findings
        ]
    )


def _embedded_row(records: Records, case: str) -> dict[str, Any]:
    record = records.read(case)
    if record is None:
        raise FormatError(
            f"{CASES}/{case}", "its features were removed or damaged meanwhile; embed again"
        )
    source = record["source"]
    return {
        "case": case,
        "status": "embedded",
        "file": f"{CASES}/{records.features(case).name}",
        **{
            name: record[name]
            for name in ("grid_zyx", "spacing_mm", "affine", "num_windows", "sha256", "bytes")
        },
        "source_sha256": source["sha256"],
        "source_bytes": source["bytes"],
        "backbone": record["backbone"],
    }


def _refused_row(records: Records, case: str, backbone: str) -> dict[str, Any]:
    refusal = records.refusal(case)
    code = "header" if refusal is None else refusal.code
    return {"case": case, "status": "quarantined", "backbone": backbone, "code": code}

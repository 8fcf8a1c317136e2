"""Why scans were refused, in words: the codes of ``io.findings`` and how often each came."""

from collections.abc import Mapping

from tapct_fast.report import bars_html

MEANINGS = {
    "input": "not there, out of reach, or its reader is not installed",
    "integrity": "truncated or damaged bytes",
    "header": "a header field is missing, impossible or undecodable",
    "unsupported": "a valid file that is not one CT volume",
    "dims": "sizes that no volume has",
    "dtype": "values of a type that holds no HU, or that were rounded",
    "rescale": "slope or intercept missing or ambiguous",
    "non_finite": "NaN or infinite voxels",
    "hu": "values that cannot be Hounsfield units",
    "spacing": "voxel spacing missing, impossible or stated twice",
    "units": "a unit of length that contradicts the spacing",
    "orientation": "no or impossible patient orientation",
    "form_conflict": "two statements of the geometry that disagree",
    "shear": "axes that are not at right angles",
    "tilt": "gantry tilt",
    "missing_slices": "slices are missing",
    "duplicate_slices": "several slices at one place",
    "foreign_slices": "slices that do not belong to the volume",
    "uneven_spacing": "slices at uneven distances",
    "lossy": "lossy compression",
    "padding": "padding values outside the scanned circle",
    "limit": "larger than the limits",
    "timeout": "the storage did not answer in time",
    "memory": "reading or encoding it takes more memory than there is",
}


def reasons_html(num_by_code: Mapping[str, int]) -> str:
    """Return the codes with their meanings and counts as HTML, the most frequent first."""
    ordered = sorted(num_by_code.items(), key=lambda item: (-item[1], item[0]))
    rows = [(_words(code), f"{num:,}", float(num)) for code, num in ordered]
    return f'<div class="reasons">{bars_html(rows)}</div>' if rows else ""


def _words(code: str) -> str:
    return f"{MEANINGS[code]} ({code})" if code in MEANINGS else code

"""What a reader finds in a scan, and the policy that decides what becomes of it.

A finding is one of four kinds:

========  ===========================================================  =======================
severity  meaning                                                      policies that go on
========  ===========================================================  =======================
note      nothing is wrong: something a user may want to know          error, warn, repair
doubt     the voxels are kept as they are; what they mean is doubtful  warn, repair
mend      a regular grid can be made of it, and how is certain         repair
refuse    the data is damaged, missing or contradicts itself           none
========  ===========================================================  =======================

Readers name the severity; nobody else decides. No finding holds a patient's name, id or path.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, NoReturn, get_args

from tapct_fast.errors import POLICIES, FormatError, InputError, Policy

Severity = Literal["note", "doubt", "mend", "refuse"]

# The reason codes of findings, reports and quarantines. Append only: archives are sorted by them.
Code = Literal[
    "input",  # nothing is there, or a reader is not installed
    "integrity",  # truncated, flipped, wrong checksum or length
    "header",  # a field is missing, impossible or undecodable
    "unsupported",  # a valid file that is not one CT volume: 4D, RGB, Analyze pair, other modality
    "dims",
    "dtype",
    "rescale",
    "non_finite",
    "hu",
    "spacing",
    "units",
    "orientation",
    "form_conflict",  # qform, sform and pixdim, or tags of a slice, disagree
    "shear",
    "tilt",
    "missing_slices",
    "duplicate_slices",
    "foreign_slices",
    "uneven_spacing",
    "lossy",
    "padding",
    "limit",  # larger than the limits: a bomb, or a scan beyond them
    "timeout",  # the storage did not answer in time
    "memory",  # reading or encoding it takes more memory than there is
]
CODES: tuple[str, ...] = get_args(Code)

_ALLOWED: dict[Policy, tuple[Severity, ...]] = {
    "error": ("note",),
    "warn": ("note", "doubt"),
    "repair": ("note", "doubt", "mend"),
}


class Finding(NamedTuple):
    """One thing found in a scan; ``field`` names where, ``reason`` says what and the way out."""

    severity: Severity
    code: Code
    field: str
    reason: str

    def __str__(self) -> str:
        return f"{self.severity} ({self.code}): {self.field}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Report:
    """What is known about one scan beyond its voxels.

    Attributes:
        findings: In the order of discovery.
        facts: JSON values by name: format, stored type, shape, spacing, orientation of the stored
            axes, HU range; those that were known when reading ended.
    """

    findings: tuple[Finding, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_error(cls, error: FormatError) -> "Report":
        """Return the report of a scan that could not be inspected any further."""
        return cls((Finding("refuse", code_of(error), error.field, error.reason),))

    def refusal(self, policy: Policy) -> Finding | None:
        """Return the finding with which ``read_volume`` refuses the scan, None if it accepts."""
        allowed = _ALLOWED[policy]
        return next((f for f in self.findings if f.severity not in allowed), None)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {"findings": [f._asdict() for f in self.findings], "facts": self.facts}


class Inspection:
    """Collects findings while one scan is read, and stops the reader where the policy says so.

    Args:
        policy: What to do about findings; see the table of this module.
    """

    def __init__(self, policy: Policy = "error") -> None:
        if policy not in POLICIES:
            raise InputError(f"policy={policy!r} is not one of {', '.join(POLICIES)}")
        self._policy: Policy = policy
        self._findings: list[Finding] = []
        self.facts: dict[str, Any] = {}

    def note(self, code: Code, field: str, reason: str) -> None:
        """Record what is worth knowing."""
        self._add("note", code, field, reason)

    def doubt(self, code: Code, field: str, reason: str) -> None:
        """Record a doubt; the caller keeps the data as they are.

        Raises:
            FormatError: The policy is ``error``.
        """
        self._add("doubt", code, field, reason)

    def mend(self, code: Code, field: str, reason: str) -> None:
        """Record damage that the caller repairs next.

        Raises:
            FormatError: The policy is not ``repair``.
        """
        self._add("mend", code, field, reason)

    def refuse(self, code: Code, field: str, reason: str) -> NoReturn:
        """Record what no policy accepts, and raise.

        Raises:
            FormatError: Always.
        """
        self._add("refuse", code, field, reason)
        raise AssertionError("no policy allows a refusal")

    def record(self, error: FormatError) -> None:
        """Record an error that a reader raised by itself, unless it was found before."""
        (found,) = Report.of_error(error).findings
        if all(known[1:] != found[1:] for known in self._findings):
            self._findings.append(found)

    def report(self) -> Report:
        """Return what was found so far."""
        return Report(tuple(self._findings), dict(self.facts))

    def _add(self, severity: Severity, code: Code, field: str, reason: str) -> None:
        self._findings.append(Finding(severity, code, field, reason))
        if severity not in _ALLOWED[self._policy]:
            raise FormatError(field, reason, code)


# Errors of the native core carry a field and no code: the first field that is a prefix decides.
_CODE_OF_FIELD: tuple[tuple[str, Code], ...] = (
    ("gzip", "integrity"),
    ("file", "integrity"),
    ("PixelData", "integrity"),
    ("data", "integrity"),
    ("dim", "dims"),
    ("datatype", "dtype"),
    ("bitpix", "dtype"),
    ("scl_", "rescale"),
    ("Rescale", "rescale"),
    ("HU", "hu"),
    ("pixdim", "spacing"),
    ("PixelSpacing", "spacing"),
    ("xyzt_units", "units"),
    ("sform, qform", "form_conflict"),
    ("sform", "orientation"),
    ("qform", "orientation"),
    ("ImageOrientationPatient", "orientation"),
    ("magic", "unsupported"),
    ("Modality", "unsupported"),
)


def code_of(error: FormatError) -> Code:
    """Return the reason code of an error: its own, or that of its field."""
    if error.code:
        return error.code  # type: ignore[return-value]  # errors.py lies below this module
    for prefix, code in _CODE_OF_FIELD:
        if error.field.startswith(prefix):
            return code
    return "header"

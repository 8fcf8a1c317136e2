"""Two sets of rows beside each other: what became faster, what slower, what is noise.

A change is outside the noise where the ranges from p20 to p80 of the two do not overlap.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from bench.rows import BenchError, Row, Times, latest, number, read

Verdict = Literal["faster", "slower", "noise"]


class Change(NamedTuple):
    """One variant of one case in both sets."""

    subject: str
    case: str
    variant: str
    before: Times
    after: Times

    @property
    def ratio(self) -> float:
        """Time now over time before."""
        return self.after.p50 / self.before.p50

    @property
    def verdict(self) -> Verdict:
        """Say whether the change is outside the noise."""
        if self.after.p80 < self.before.p20:
            return "faster"
        return "slower" if self.after.p20 > self.before.p80 else "noise"


class Comparison(NamedTuple):
    """What two sets of one device share, and what only one of them holds."""

    device: str
    changes: Sequence[Change]
    only_before: Sequence[str]
    only_after: Sequence[str]
    unlike: Sequence[str]  # what besides the code differs


def compare(before: str, after: str) -> list[Comparison]:
    """Compare two row files, folders or git revisions, device by device.

    Raises:
        BenchError: One holds no rows, or they share no device: times of two machines are no change.
    """
    sets = [latest(read(source)) for source in (before, after)]
    devices = [{device for device, _, _ in rows} for rows in sets]
    shared = sorted(devices[0] & devices[1])
    if not shared:
        names = " and ".join(", ".join(sorted(names)) for names in devices)
        raise BenchError(
            f"{before} and {after} were measured on different devices ({names}): "
            "their ratio would be that of the machines; measure both on one"
        )
    return [_compare_device(device, *sets) for device in shared]


def _compare_device(
    device: str,
    before: dict[tuple[str, str, str], Row],
    after: dict[tuple[str, str, str], Row],
) -> Comparison:
    keys = [key for key in before if key in after and key[0] == device]
    changes = [
        Change(row.subject, row.case, variant, times, after[key].times_ms[variant])
        for key in keys
        for row in [before[key]]
        for variant, times in row.times_ms.items()
        if variant in after[key].times_ms
    ]
    unlike = {
        f"{name} {old} -> {new}"
        for key in keys
        for name in ("torch", "triton", "cuda", "driver", "torch_threads", "tiny")
        for old, new in [(before[key].values.get(name), after[key].values.get(name))]
        if old != new
    }
    only_before, only_after = (
        [f"{subject}, {case}" for on, subject, case in one if on == device]
        for one in (before.keys() - after.keys(), after.keys() - before.keys())
    )
    return Comparison(device, changes, sorted(only_before), sorted(only_after), sorted(unlike))


def render(comparison: Comparison) -> str:
    """Return a comparison as text, the largest changes outside the noise marked."""
    lines = [comparison.device]
    lines += [f"  not the same on both sides: {what}" for what in comparison.unlike]
    width = max((len(c.variant) for c in comparison.changes), default=0)
    last = None
    for change in comparison.changes:
        if (change.subject, change.case) != last:
            last = (change.subject, change.case)
            lines.append(f"\n{change.subject}  {change.case}")
        sign = {"faster": "-  faster", "slower": "+  slower", "noise": ""}[change.verdict]
        lines.append(
            f"  {change.variant:<{width}}  {_range(change.before):<32} -> "
            f"{_range(change.after):<32} x {change.ratio:5.3f}  {sign}".rstrip()
        )
    for text, names in (
        ("only before", comparison.only_before),
        ("only after", comparison.only_after),
    ):
        lines += ["", f"{text}:", *(f"  {name}" for name in names)] if names else []
    counts = {
        verdict: sum(c.verdict == verdict for c in comparison.changes)
        for verdict in ("faster", "slower", "noise")
    }
    lines += ["", ", ".join(f"{count} {verdict}" for verdict, count in counts.items())]
    return "\n".join(lines)


def _range(times: Times) -> str:
    return f"{number(times.p50):>9} ms [{number(times.p20)}..{number(times.p80)}]"

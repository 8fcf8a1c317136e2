"""The verdict on a run: every check that can be made by now, the worst findings first."""

from collections.abc import Sequence

from tapct_fast.monitor.checks import CHECKS, Finding, Severity, count, judged_step
from tapct_fast.monitor.record import Record


def judge(record: Record) -> list[Finding]:
    """Return one finding for everything that can be judged by now, the worst ones first.

    Losses, targets and features are judged from ``judged_step`` on, by the median of recent rows.
    """
    found = [finding for check in CHECKS for finding in check(record)]
    order = ("bad", "warn", "ok")
    return sorted(found, key=lambda finding: order.index(finding.severity))


def worst(findings: Sequence[Finding]) -> Severity:
    """Return the severity of a run with these findings."""
    severities = {finding.severity for finding in findings}
    return "bad" if "bad" in severities else "warn" if "warn" in severities else "ok"


def headline(record: Record, findings: Sequence[Finding]) -> str:
    """Say in one sentence how the run is."""
    num_steps = record.config.train.num_steps
    where = f"step {record.step} of {num_steps}"
    if not record.rows:
        return "No step has been logged yet."
    num = {s: sum(f.severity == s for f in findings) for s in ("ok", "warn", "bad")}
    if num["bad"]:
        return f"Not healthy at {where}: {count(num['bad'], 'problem')}, see below."
    if num["warn"]:
        return f"Look at it, {where}: {count(num['warn'], 'warning')}, see below."
    if record.step < judged_step(record):
        return (
            f"Nothing wrong at {where}; losses and features are judged from step "
            f"{judged_step(record)} on, when learning rate and last layer are warm."
        )
    return f"Healthy at {where}: {count(num['ok'], 'check')} without a finding."

"""``python -m bench``, also ``tapct-fast bench``: list, run, compare, plot and tabulate."""

import argparse
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Timer
from typing import TYPE_CHECKING, NamedTuple

from bench.compare import compare, render
from bench.jobs import Jobs
from bench.rows import (
    REPOSITORY,
    RESULTS,
    BenchError,
    Row,
    flop_rate,
    history,
    latest,
    number,
    parse,
    read,
)

if TYPE_CHECKING:
    from bench.catalogue import Subject

INTERRUPTED = 130
MOST_LISTED = 12  # cases of one subject, unless it was named


class Outcome(NamedTuple):
    """What became of one bench."""

    num_rows: int
    skipped: Sequence[str]
    failed: str  # empty if it did not


def _list(args: argparse.Namespace) -> int:
    from bench.catalogue import chosen, states
    from bench.harness import device_name, this_device

    device = this_device()
    if args.names_only:
        print("\n".join(s.name for s in chosen(args.name) if device in s.devices))
        return 0
    print(f"rows of this machine: {device_name(device)}\n")
    for subject in chosen(args.name):
        print(f"{subject.name}  ({', '.join(subject.devices)})\n  {subject.text}")
        own = device if device in subject.devices else "cpu"
        try:
            cases = states(subject, own)
        except ImportError as error:
            print(f"  needs {error.name}, which is not installed\n")
            continue
        counts = Counter[str](case.state for case in cases)
        print("  " + (", ".join(f"{n} {state}" for state, n in counts.items()) or "no rows"))
        # Fifty lines that say the same help nobody who did not ask for them.
        for case in cases if args.name or len(cases) <= MOST_LISTED else ():
            when = f"  ({case.row.commit})" if case.row else ""
            print(f"    {case.state:<8} {case.name}{when}")
        print()
    return 0


def _run(args: argparse.Namespace) -> int:
    from bench.catalogue import chosen
    from bench.harness import this_device

    if args.jobs < 1:
        raise BenchError(f"--jobs {args.jobs}: one bench at a time is the least")
    device = this_device()
    options = [
        *(["--tiny"] if args.tiny else []),
        *(["--missing"] if args.missing else []),
        *(["--out", str(args.out)] if args.out else []),
    ]
    began = time.monotonic()

    def outcome_of(subject: "Subject") -> Outcome:
        left = args.total - (time.monotonic() - began) if args.total else None
        if device not in subject.devices and not args.name:
            return Outcome(0, ["reads files, which no GPU does"], "")
        if left is not None and left < 1:
            return Outcome(0, [f"the {args.total:g} s of --total were over"], "")
        print(f"\n{subject.name}: {subject.text}", flush=True)
        limit = min((s for s in (args.limit, left) if s), default=None)
        return _run_one(jobs, subject.name, options, limit)

    subjects = chosen(args.name)
    with TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        jobs = Jobs(Path(folder))
        # A bench left behind by `kill` or `timeout` would spoil what is timed after it.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            futures = {subject.name: pool.submit(outcome_of, subject) for subject in subjects}
            outcomes = {name: future.result() for name, future in futures.items()}
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            jobs.stop_all()
            print("interrupted; with --missing the same command goes on", file=sys.stderr)
            return INTERRUPTED
        finally:
            signal.signal(signal.SIGTERM, before)
    if device == "cpu":
        print("\nno CUDA device here: the rows are of the CPU")
    return _conclude(outcomes)


def _conclude(outcomes: dict[str, Outcome]) -> int:
    total = sum(outcome.num_rows for outcome in outcomes.values())
    print(f"\n{total} rows measured")
    for name, outcome in outcomes.items():
        for why in outcome.skipped:
            print(f"skipped  {name}: {why}")
    failed = {name: outcome.failed for name, outcome in outcomes.items() if outcome.failed}
    for name, why in failed.items():
        print(f"FAILED   {name}: {why}")
    return 1 if failed else 0


def _run_one(jobs: Jobs, name: str, options: Sequence[str], limit_s: float | None) -> Outcome:
    """Run one bench in a process of its own, and show its rows as they come."""
    num_rows, skipped, last = 0, [], ""
    command = [sys.executable, "-P", "-m", f"bench.{name}", *options]
    process = jobs.start(command, {**os.environ, "PYTHONPATH": _search_path()})
    assert process.stdout is not None
    is_over = Event()

    def end() -> None:
        is_over.set()
        jobs.stop(process)

    timer = Timer(limit_s or 0, end)
    if limit_s:
        timer.start()
    try:
        for line in map(str.rstrip, process.stdout):
            rows = parse(line) if line.startswith('{"subject"') else []
            for row in rows:
                num_rows += 1
                print(f"\n{_table(row)}", flush=True)
                absent = row.values.get("absent") or {}
                skipped += [f"{row.case}, {rival}: {why}" for rival, why in absent.items()]
            if rows:
                continue
            last = line or last
            if line.startswith("skipped: "):
                skipped.append(line.removeprefix("skipped: "))
            elif line.startswith(f"{name}, "):
                print(line, flush=True)
        process.wait()
    finally:
        timer.cancel()
        jobs.stop(process)
        if limit_s:
            timer.join()
    if is_over.is_set() and process.returncode:
        skipped.append(f"stopped after {limit_s:.0f} s; with --missing the next run goes on")
        return Outcome(num_rows, skipped, "")
    if process.returncode == 0:
        return Outcome(num_rows, skipped, "")
    kind, _, reason = last.partition(": ")
    if kind == "ModuleNotFoundError" and "tapct" not in reason:
        return Outcome(num_rows, [*skipped, f"{reason}; try pip install 'tapct-fast[bench]'"], "")
    if kind == "ImportError" and "_native is not built" in reason:
        return Outcome(num_rows, [*skipped, reason], "")
    return Outcome(num_rows, skipped, last or f"exit code {process.returncode}")


def _search_path() -> str:
    kernels = REPOSITORY / "kernels"  # the op library also without an installation
    paths = [str(REPOSITORY), str(kernels), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(path for path in paths if path)


def _table(row: Row) -> str:
    head = ("", "p50 ms", "p20..p80", "to ours", "GB/s", "FLOP/s", "of floor")
    lines = [head]
    for variant, times in row.times_ms.items():
        gb, share = row.gb_per_s(variant), row.share(variant)
        lines.append(
            (
                variant,
                number(times.p50),
                f"{number(times.p20)}..{number(times.p80)}",
                f"{row.ratio(variant):.2f}",
                number(gb) if gb else "-",
                flop_rate(row.tflop_per_s(variant)),
                f"{100 * share:.0f} %" if share else "-",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            [
                line[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)),
            ]
        )
        for line in lines
    ]
    floor = (
        f"; floor {number(row.floor_ms)} ms" if row.floor_ms else "; floor: no ceilings measured"
    )
    errors = row.values.get("relative_error")
    worst = f"; largest relative error {max(errors.values()):g}" if errors else ""
    note = "" if row.values.get("dtype") else f"; verified: {row.values.get('verified', 'no')}"
    return "\n".join(
        [f"{row.subject}, {row.case}{floor if 'dtype' in row.values else ''}{worst}{note}", *text]
    )


def _compare(args: argparse.Namespace) -> int:
    print("\n\n".join(render(comparison) for comparison in compare(args.before, args.after)))
    return 0


def _plot(args: argparse.Namespace) -> int:
    try:
        from bench.plot import write_plots
    except ModuleNotFoundError as error:
        if error.name != "PIL":
            raise
        raise BenchError("pictures need Pillow; pip install 'tapct-fast[bench]'") from None

    extra = [row for source in args.rows for row in read(source)]
    committed = sorted((REPOSITORY / RESULTS).glob("*.jsonl"))
    extra = [row for path in committed for row in latest(parse(path.read_text())).values()] + extra
    points = history(extra)
    if not points:
        raise BenchError("there are no rows yet; measure some with: tapct-fast bench run")
    for path in write_plots(args.out, points):
        print(path)
    return 0


def _tabulate(_: argparse.Namespace) -> int:
    from bench.table import README, write_table

    print(f"{README}: {write_table()} lines")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tapct-fast bench", description="Measure this library beside its rivals."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    listed = verbs.add_parser("list", help="what can be measured, and which rows exist")
    listed.add_argument("name", nargs="*", help="only these")
    listed.add_argument("--names-only", action="store_true", help="of what runs on this device")
    listed.set_defaults(run=_list)

    run = verbs.add_parser(
        "run",
        help="measure; tables on the screen, rows in bench/results",
        description="Measure the named benches, or all. Each verifies its results before it times "
        "them; what cannot run here is said at the end.",
    )
    run.add_argument("name", nargs="*", help="see list (default: all)")
    run.add_argument("--missing", action="store_true", help="skip cases whose row is current")
    run.add_argument("--tiny", action="store_true", help="a size for tests; needs --out")
    run.add_argument("--out", type=Path, help="folder of the rows (default: $OUT or bench/results)")
    run.add_argument("--limit", type=float, metavar="S", help="seconds for each bench")
    run.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="benches side by side: they compile together, each is timed alone (default: 1)",
    )
    run.add_argument("--total", type=float, metavar="S", help="seconds for all together")
    run.set_defaults(run=_run)

    compared = verbs.add_parser(
        "compare",
        help="what became faster or slower between two sets of rows",
        description="Each set is a row file, a folder of them, or a git revision (its "
        "bench/results). A change counts where the ranges from p20 to p80 do not overlap.",
    )
    compared.add_argument("before", metavar="A")
    compared.add_argument("after", metavar="B")
    compared.set_defaults(run=_compare)

    plotted = verbs.add_parser(
        "plot",
        help="rooflines as SVG and PNG, one HTML page with tables and history",
        description="Draw every row that bench/results ever held, and those of ROWS.",
    )
    plotted.add_argument("rows", nargs="*", metavar="ROWS", help="more files, folders, revisions")
    plotted.add_argument("--out", type=Path, default=Path("out/bench"), help="folder (out/bench)")
    plotted.set_defaults(run=_plot)

    table = verbs.add_parser(
        "table",
        help="write the table of measured ops in kernels/README.md",
        description="Write the current rows of bench/results into kernels/README.md.",
    )
    table.set_defaults(run=_tabulate)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code."""
    args = _parser().parse_args(argv)
    try:
        code: int = args.run(args)
    except BenchError as error:
        print(f"tapct-fast bench {args.verb}: {error}", file=sys.stderr)
        return 2
    return code


if __name__ == "__main__":
    sys.exit(main())

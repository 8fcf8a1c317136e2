"""The command line: one verb per stage of the path.

Exit codes: 0 done, 2 a wrong argument or setting, 65 data that cannot be used, 70 training stopped,
74 a checkpoint that cannot be written, 75 stopped behind a checkpoint and worth another try, 130
interrupted; of watch 0 healthy, 1 warnings, 70 a sick run. Errors are one line on stderr; inputs
are named by position, never by path.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tapct_fast import recipes
from tapct_fast.config import Config
from tapct_fast.errors import (
    BackboneError,
    ConfigError,
    FormatError,
    InputError,
    TapctError,
)
from tapct_fast.parser import build_parser


def _existing(paths: Sequence[Path], name: str) -> list[Path]:
    for number, path in enumerate(paths, start=1):
        if not path.exists():
            where = f"{name} {number} of {len(paths)}" if len(paths) > 1 else name
            raise InputError(f"{where} does not exist; check the path")
    return list(paths)


def _demo(args: argparse.Namespace) -> int:
    from tapct_fast.demo import run_demo

    report = run_demo(args.out, _existing(args.ct, "--ct"), seed=args.seed, print_line=print)
    print(f"report: {report}")
    return 0


def _pack(args: argparse.Namespace) -> int:
    from tapct_fast.io.pack import pack

    report = pack(
        _existing(args.src, "SRC"),
        args.dst,
        codec=args.codec,
        series=args.series,
        check_hu=args.check_hu,
        policy=args.policy,
        threads=args.threads,
        progress=True,
    )
    print(
        f"packed {report.packed}, already there {report.skipped}, quarantined {report.quarantined}"
    )
    _say_refused(report.quarantined, report.packed + report.skipped, args.dst)
    return 0


def _say_refused(
    num_refused: int, num_usable: int, folder: Path, *, is_quiet: bool = False
) -> None:
    from tapct_fast.io.quarantine import last_refusal

    if num_refused and not num_usable:
        raise last_refusal(folder)
    if num_refused and not is_quiet:
        print("reasons: quarantine.jsonl there; the input behind a case: tapct-fast locate --help")


def _verify(args: argparse.Namespace) -> int:
    from tapct_fast.io.verify import verify
    from tapct_fast.verify_report import write_verify_report

    outcome = verify(
        _existing(args.src, "SRC"),
        args.out,
        policy=args.policy,
        check_hu=args.check_hu,
        threads=args.threads,
        progress=True,
    )
    write_verify_report(args.out / "report.html", outcome)
    num_accepted = len(outcome.rows) - outcome.num_refused
    print(
        f"accepted {num_accepted}, refused {outcome.num_refused}; see report.html and report.json"
    )
    return FormatError.exit_code if outcome.num_refused else 0


def _locate(args: argparse.Namespace) -> int:
    from tapct_fast.io.pack import locate

    print(locate(args.store, args.case, _existing(args.src, "SRC"), series=args.series))
    return 0


def _overrides(rest: Sequence[str]) -> dict[str, str]:
    values: dict[str, str] = {}
    words = list(rest)
    while words:
        name, equals, value = words.pop(0).partition("=")
        if not name.startswith("--"):
            raise ConfigError(f"unexpected argument {name!r}; settings are --group.name VALUE")
        if not equals:
            if not words:
                raise ConfigError(f"{name} has no value; settings are --group.name VALUE")
            value = words.pop(0)
        values[name[2:].replace("-", "_")] = value
    return values


def _fit(args: argparse.Namespace) -> recipes.Fit | None:
    """Return what --preset fits the recipe to: the store's scans, GPUs counted or as stated."""
    if args.preset is None:
        return None
    num_gpus = os.environ.get("WORLD_SIZE", "1") if args.preset == "auto" else args.preset
    if not num_gpus.isdecimal():
        raise ConfigError(f"--preset {args.preset!r} is neither auto nor a number of GPUs")
    _existing([args.store], "STORE")
    import torch

    from tapct_fast.io.store import Store

    memory_gib = None
    if args.device != "cpu" and torch.cuda.is_available():
        memory_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    return recipes.Fit(int(num_gpus), len(Store.open(args.store).cases), memory_gib)


def _train(args: argparse.Namespace) -> int:
    recipe = recipes.recipe(args.recipe, fit=_fit(args))
    config = recipes.override(recipe, _overrides(args.settings))
    if args.dry_run:
        return _dry_run(config, args)
    if args.world is not None or args.json:
        raise InputError("--world and --json go with --dry-run; torchrun says how many ranks train")
    _existing([args.store], "STORE")
    probes = _existing(args.probe, "--probe"), _existing(args.probe_labels, "--probe-labels")
    from tapct_fast.monitor.probe import OnlineProbe
    from tapct_fast.monitor.run_report import RunReport
    from tapct_fast.train.loop import choose_backend, train
    from tapct_fast.train.observer import Observer
    from tapct_fast.train.processes import started

    device, _ = choose_backend(config, args.device)
    with started(os.environ, device) as processes:
        observers: list[Observer] = []
        if processes.is_first:
            observers.append(RunReport(args.out, config))
        if processes.is_first and any(probes):
            num_steps, seed = config.train.num_steps, config.train.seed
            probe = OnlineProbe(args.out, *probes, num_steps=num_steps, device=device, seed=seed)
            observers.insert(0, probe)  # closed first: the page's last writing has its last score
        train(
            config,
            args.store,
            args.out,
            start=args.start,
            distill=args.distill,
            resume=args.resume,
            device=args.device,
            progress=True,
            track=args.track,
            observers=observers,
            processes=processes,
        )
    return 0


def _dry_run(config: Config, args: argparse.Namespace) -> int:
    from tapct_fast.train import plan

    made = plan.plan(config, world=args.world or 1)
    if args.distill is not None:
        made.not_planned.append("--distill: its guide, in place of the teacher's part of a step")
    print(json.dumps(plan.to_json(made), indent=1) if args.json else plan.render(made))
    return 0


def _replay(args: argparse.Namespace) -> int:
    _existing([args.run_dir], "RUN")
    _existing([args.store], "STORE")
    from tapct_fast.train.log import notify
    from tapct_fast.train.replay import render, replay

    found = replay(
        args.run_dir,
        args.store,
        args.step,
        start=args.start,
        distill=args.distill,
        device=args.device,
        notify=notify,
    )
    print(render(found))
    return 0


def _watch(args: argparse.Namespace) -> int:
    from tapct_fast.monitor.watch import watch

    return watch(args.run_dir, every=args.every, once=args.once, as_json=args.json)


def _report(args: argparse.Namespace) -> int:
    _existing([args.directory], "DIR")
    from tapct_fast.embed_report import is_embedded, write_embed_report
    from tapct_fast.monitor.record import read_record
    from tapct_fast.monitor.run_report import write_run_report
    from tapct_fast.train.checkpoint import has_run

    if has_run(args.directory):
        try:
            write_run_report(args.directory, read_record(args.directory))
        except OSError as error:
            raise InputError(f"DIR cannot be written: {error.strerror}") from None
    elif is_embedded(args.directory):
        write_embed_report(args.directory)
    elif (args.directory / "probe.json").exists():
        raise InputError(
            "DIR holds an evaluation, whose report.html is written with its probe.json; give the "
            "same probe again, which encodes nothing anew"
        )
    else:
        raise InputError("DIR holds neither a run nor features; name the --out of train or embed")
    print("written: report.html in DIR")
    return 0


def _views(args: argparse.Namespace) -> int:
    config = recipes.override(recipes.recipe(args.recipe), _overrides(args.settings))
    _existing([args.store], "STORE")
    from tapct_fast.sheet import PAGE, write_sheets

    write_sheets(args.store, config, args.out, args.sample, recipe=args.recipe)
    print(f"written: {PAGE} and a PNG for each of {len(args.sample)} samples")
    return 0


def _export(args: argparse.Namespace) -> int:
    from tapct_fast.backbone.export import export_backbone

    _existing([args.run_dir], "RUN")
    if args.format == "folder":
        export_backbone(
            args.run_dir,
            args.out,
            which=args.which,
            license=args.license,
            base_model=args.base_model,
            probe=args.probe,
        )
        print("exported: model.safetensors, config.json, preprocessor.json and README.md in OUT")
        if args.license is None:
            print("the licence of the weights is unknown; state it in README.md before you share")
        return 0
    if args.license or args.base_model or args.probe:
        raise InputError("--license, --base-model and --probe are for the card of --format folder")
    from tapct_fast.backbone.load import load_backbone
    from tapct_fast.backbone.nnunet import export_nnunet
    from tapct_fast.backbone.portable import export_onnx, export_pt2

    with tempfile.TemporaryDirectory() as name:
        folder = export_backbone(args.run_dir, Path(name, "backbone"), which=args.which)
        backbone = load_backbone(folder)
        write = {"pt2": export_pt2, "onnx": export_onnx, "nnunet": export_nnunet}[args.format]
        write(backbone, args.out)
    print(f"exported: OUT, {args.format}")
    return 0


def _check(args: argparse.Namespace) -> int:
    if args.json is not None and not args.json.parent.is_dir():
        raise InputError("--json FILE lies in a folder that does not exist; make it first")
    from tapct_fast.backbone.check import check_backbone, render, write_report

    report = check_backbone(args.backbone, device=args.device, num_slices=args.slices)
    print(render(report))
    if args.json is not None:
        write_report(args.json, report)
    return 0 if report.holds else BackboneError.exit_code


def _embed(args: argparse.Namespace) -> int:
    scans = _existing(args.scan, "ARCHIVE")
    if args.engine == "local" and (args.workers or args.ray_address):
        raise InputError("--workers and --ray-address go with --engine ray")
    from tapct_fast.backbone.load import load_backbone
    from tapct_fast.downstream.embed import embed_scans
    from tapct_fast.downstream.ray_engine import RayCluster
    from tapct_fast.embed_report import write_embed_report

    cluster = None
    if args.engine == "ray":
        cluster = RayCluster(args.ray_address, args.workers or 0, args.device)
    # Workers of a cluster have the GPUs; this machine need not.
    backbone = load_backbone(
        args.backbone,
        device="cpu" if cluster else args.device,
        precision="bf16" if cluster and args.device == "cuda" else None,
    )
    report = embed_scans(
        backbone,
        scans,
        args.out,
        overlap=args.overlap,
        batch_size=args.batch_size,
        series=args.series,
        check_hu=args.check_hu,
        format=args.format,
        timeout_s=args.timeout,
        readers=args.readers,
        memory_bytes=None if args.memory is None else int(args.memory * 2**30),
        ray=cluster,
        progress=True,
        every_s=args.every,
    )
    write_embed_report(args.out)
    if args.json:
        print(json.dumps(report.progress))
    else:
        print(
            f"embedded {report.embedded}, already there {report.skipped}, "
            f"quarantined {report.quarantined}"
        )
    num_usable = report.embedded + report.skipped
    _say_refused(report.quarantined, num_usable, args.out, is_quiet=args.json)
    return 0


def _probe(args: argparse.Namespace) -> int:
    _existing([args.dataset], "DATASET")
    from tapct_fast.evaluation.cases import read_dataset
    from tapct_fast.evaluation.evaluate import evaluate

    # A user's module:function is found beside where the command is given, as by python -m.
    if "" not in sys.path:
        sys.path.insert(0, "")
    found = evaluate(
        read_dataset(args.dataset, splits=args.splits),
        args.backbone,
        out=args.out,
        task=args.task,
        decoder=args.decoder,
        pooling=args.pooling,
        head=args.head,
        folds=args.folds,
        shots=args.shots,
        seed=args.seed,
        device=args.device,
        cache=args.cache,
        check_hu=args.check_hu,
        policy=args.policy,
        progress=True,
        notify=lambda line: print(f"tapct-fast probe: {line}", file=sys.stderr),
    )
    print(found)
    print(f"\nencoded {found.num_encoded}; see report.html and probe.json in OUT")
    return 0


def _view(args: argparse.Namespace) -> int:
    _existing([args.scan], "SCAN")
    for name in ("head", "labels", "label_names"):
        given = getattr(args, name)
        _existing([given] if given else [], f"--{name.replace('_', '-')}")
    if args.label_names and not args.labels:
        raise InputError("--label-names goes with --labels")
    import dataclasses

    from tapct_fast.backbone.load import load_backbone
    from tapct_fast.evaluation.segmentation import load_head
    from tapct_fast.io.read import read_labels, read_volume
    from tapct_fast.view import label_map_of, read_label_names, write_view

    backbone = load_backbone(args.backbone, device=args.device)
    if args.plane is not None:
        backbone.preprocess = dataclasses.replace(
            backbone.preprocess, resize_yx=(args.plane, args.plane)
        )
    volume = read_volume(args.scan, series=args.series, check_hu=args.check_hu)
    label_maps = []
    if args.labels:
        names = read_label_names(args.label_names) if args.label_names else {}
        label_maps.append(label_map_of("labels", read_labels(args.labels), volume, names))
    written = write_view(
        backbone,
        volume,
        args.out,
        head=load_head(args.head) if args.head else None,
        label_maps=tuple(label_maps),
        overlap=args.overlap,
    )
    print(f"written: {', '.join(written)}")
    return 0


def _bench(args: argparse.Namespace) -> int:
    # bench/ is not installed: the rows belong to a repository and its commits.
    homes = (Path(__file__).parent.parent, Path.cwd())
    home = next((h for h in homes if (h / "bench" / "harness.py").exists()), None)
    if home is None:
        raise InputError(
            "the benchmarks are not part of the installed package; clone the repository, then "
            "'pip install -e .' there, or run this verb inside it"
        )
    paths = [str(home), str(home / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    # -P: the current folder may hold another bench
    command = [sys.executable, "-P", "-m", "bench", *args.words]
    return subprocess.run(command, env=environment, check=False).returncode


def _doctor(_: argparse.Namespace) -> int:
    from tapct_fast.doctor import examine, render

    print(render(examine()))
    return 0


_VERBS = {
    "demo": _demo,
    "pack": _pack,
    "verify": _verify,
    "locate": _locate,
    "train": _train,
    "replay": _replay,
    "watch": _watch,
    "report": _report,
    "views": _views,
    "export": _export,
    "check": _check,
    "embed": _embed,
    "probe": _probe,
    "view": _view,
    "bench": _bench,
    "doctor": _doctor,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if args.verb != "bench":  # measures what the caller set
        # Before torch starts its threads: threads that spin while they wait cost a loaded machine
        # six times its speed (2 cores, one of them busy: 2.5 instead of 15 samples/s in the debug
        # recipe).
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        # torch's C++ warns with a long trace where a process finds another one gone; its error is
        # told in one line.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if args.verb in ("train", "views"):
        args.settings = rest
    elif args.verb == "bench":
        args.words = [*rest, *args.words]
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        code = _VERBS[args.verb](args)
    except TapctError as error:
        print(f"tapct-fast {args.verb}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"tapct-fast {args.verb}: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())

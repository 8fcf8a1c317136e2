"""The command line: one verb per stage of the path.

Exit codes: 0 done, 2 a wrong argument or setting, 65 data that cannot be used, 70 training stopped,
74 a checkpoint that cannot be written, 75 stopped behind a checkpoint and worth another try, 130
interrupted. Errors are one line on stderr; inputs are named by position, never by path.

130 interrupted; of watch 0 healthy, 1 warnings, 70 a sick run. Errors are one line on stderr;
inputs are named by position, never by path.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tapct_fast import __version__, recipes
from tapct_fast.config import Config
from tapct_fast.errors import (
    POLICIES,
    BackboneError,
    ConfigError,
    FormatError,
    InputError,
    TapctError,
)


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line with the way out."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


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


def _say_refused(num_refused: int, num_usable: int, folder: Path) -> None:
    from tapct_fast.io.quarantine import last_refusal

    if num_refused and not num_usable:
        raise last_refusal(folder)
    if num_refused:
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
    from tapct_fast.monitor.dashboard import Dashboard
    from tapct_fast.monitor.probe import OnlineProbe
    from tapct_fast.train.loop import choose_backend, train
    from tapct_fast.train.observer import Observer
    from tapct_fast.train.processes import started

    device, _ = choose_backend(config, args.device)
    with started(os.environ, device) as processes:
        observers: list[Observer] = []
        if processes.is_first:
            observers.append(Dashboard(args.out, config))
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
        export_backbone(args.run_dir, args.out, which=args.which)
        print("exported: model.safetensors, config.json and preprocessor.json in OUT")
        return 0
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
    scans = _existing(args.scan, "SCAN")
    from tapct_fast.backbone.load import load_backbone
    from tapct_fast.downstream.embed import embed_scans

    backbone = load_backbone(args.backbone, device=args.device)
    report = embed_scans(
        backbone,
        scans,
        args.out,
        overlap=args.overlap,
        batch_size=args.batch_size,
        series=args.series,
        check_hu=args.check_hu,
        progress=True,
    )
    print(
        f"embedded {report.embedded}, already there {report.skipped}, "
        f"quarantined {report.quarantined}"
    )
    _say_refused(report.quarantined, report.embedded + report.skipped, args.out)
    return 0


def _probe(args: argparse.Namespace) -> int:
    _existing([args.dataset], "DATASET")
    from tapct_fast.evaluation.cases import read_dataset
    from tapct_fast.evaluation.evaluate import evaluate

    # A user's module:function is found beside where the command is given, as by python -m.
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


_TRAIN_EPILOG = """
Any setting of the recipe can be changed with --group.name VALUE, e.g. --vit.depth 6 --train.seed 1
--views.global_views.size_zyx 8,64,64 --heads.ibot none. Settings and their values in RECIPE vit-s:

"""


def _add_series(verb: _Parser) -> None:
    verb.add_argument(
        "--series", metavar="KEY", help="which series, where DICOM folders hold several: 1, 2, ..."
    )


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _train_settings() -> str:
    flat = recipes.settings(recipes.vit_s())
    width = max(map(len, flat))
    return "\n".join(f"  --{name:<{width}}  {value}" for name, value in flat.items())


def _parser() -> _Parser:
    parser = _Parser(
        prog="tapct-fast",
        allow_abbrev=False,
        description="Self-supervised 3D CT backbones: pack scans, train, export, embed, probe.",
        epilog="Start with: tapct-fast demo",
    )
    parser.add_argument("--version", action="version", version=f"tapct-fast {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)

    demo = verbs.add_parser(
        "demo",
        help="run the whole path on synthetic or real CT and write a report",
        description="Pack, train, export, embed and probe in under four minutes on two CPU cores; "
        "writes report.html. Without --ct the scans are synthetic phantoms.",
    )
    demo.add_argument(
        "--ct",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="scan files, DICOM series folders",
    )
    demo.add_argument(
        "--out", type=Path, default=Path(".demo"), help="output folder (default: .demo)"
    )
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(run=_demo)

    pack = verbs.add_parser(
        "pack",
        help="turn scans into a training store",
        description="Read scans (.nii, .nii.gz, .nrrd, .mha, .mhd, DICOM series folders, or "
        "folders of these), check them, and write them to the training store DST. Run it again to "
        "go on after a stop. Bad scans go to DST/quarantine.jsonl with a reason; the rest goes on.",
    )
    pack.add_argument("src", type=Path, nargs="+", metavar="SRC", help="scan file or folder")
    pack.add_argument("dst", type=Path, metavar="DST", help="store folder, made if absent")
    pack.add_argument(
        "--codec",
        choices=("lz4hc", "zstd"),
        default="lz4hc",
        help="lz4hc decodes faster, zstd is smaller",
    )
    pack.add_argument(
        "--no-check-hu",
        dest="check_hu",
        action="store_false",
        help="accept values that do not look like HU",
    )
    pack.add_argument(
        "--policy",
        choices=POLICIES,
        default="error",
        help="what to do about doubts and damage: refuse, keep doubtful scans, or also repair",
    )
    pack.add_argument("--threads", type=int, help="scans packed at once (default: all cores)")
    _add_series(pack)
    pack.set_defaults(run=_pack)

    verify = verbs.add_parser(
        "verify",
        help="check every scan of an archive",
        description="Read every scan below SRC to its end on all cores and report what is damaged, "
        "doubtful or repairable: OUT/report.html and OUT/report.json. Run it again to go on after "
        "a stop. Exit code 65 if a scan is refused.",
    )
    verify.add_argument("src", type=Path, nargs="+", metavar="SRC", help="scan file or folder")
    verify.add_argument("--out", type=Path, required=True, metavar="OUT", help="made if absent")
    verify.add_argument(
        "--policy",
        choices=POLICIES,
        default="error",
        help="accepted are: error nothing doubtful, warn doubts, repair also what can be mended",
    )
    verify.add_argument("--threads", type=int, help="scans at a time (default: one per core)")
    verify.add_argument(
        "--no-check-hu",
        dest="check_hu",
        action="store_false",
        help="accept values that do not look like HU",
    )
    verify.set_defaults(run=_verify)

    locate = verbs.add_parser(
        "locate",
        help="say which input a case id stands for",
        description="Case ids are keyed hashes, so that no store or log holds a path. With the "
        "store's key and the same inputs, this prints the path behind one id.",
    )
    locate.add_argument(
        "store", type=Path, metavar="STORE", help="a store, or an output folder of embed"
    )
    locate.add_argument("case", metavar="CASE")
    locate.add_argument(
        "src", type=Path, nargs="+", metavar="SRC", help="the inputs that were packed"
    )
    _add_series(locate)
    locate.set_defaults(run=_locate)

    train = verbs.add_parser(
        "train",
        help="pretrain a backbone with DINOv2",
        description=f"Recipes: {', '.join(recipes.RECIPES)}. Stages, behind a plus as in "
        f"vit-b+high-res: {', '.join(recipes.STAGES)}. An interrupted run goes on where it "
        "stopped, bit for bit, when the same command is given again.",
        epilog=_TRAIN_EPILOG + _train_settings(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("recipe", metavar="RECIPE")
    train.add_argument(
        "store", type=Path, metavar="STORE", help="folder written by tapct-fast pack"
    )
    train.add_argument("--out", type=Path, required=True, metavar="DIR", help="checkpoints, logs")
    train.add_argument(
        "--start",
        metavar="WEIGHTS",
        help="begin with a backbone (exported folder, .safetensors, hub id; of a 2D network too), "
        "whose heads are new, or with the teacher of another RUN and its heads",
    )
    train.add_argument(
        "--distill",
        type=Path,
        metavar="RUN",
        help="take the targets from the frozen teacher of another, larger run",
    )
    train.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="auto",
        help="never: refuse a folder that holds a run",
    )
    train.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")
    train.add_argument(
        "--probe",
        type=Path,
        nargs="+",
        default=[],
        metavar="SCAN",
        help="labelled scans on which every checkpoint is scored beside the run: DIR/probe.jsonl",
    )
    train.add_argument(
        "--probe-labels",
        type=Path,
        nargs="+",
        default=[],
        metavar="LABELS",
        help="their label maps, in the order of the scans",
    )
    train.add_argument(
        "--preset",
        metavar="auto|N",
        help="fit length, batch, momentum and prototypes of the recipe to the number of scans in "
        "STORE and to the GPUs of this call (torchrun), or to N GPUs",
    )
    train.add_argument(
        "--track",
        type=lambda names: [name for name in names.split(",") if name],
        metavar="NAME,...",
        help="tensorboard, wandb, mlflow, or '' for none (default: tensorboard where installed)",
    )
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="print parameters, memory and FLOPs, try a step on fake tensors, and stop; "
        "STORE and DIR are not touched",
    )
    train.add_argument("--world", type=int, metavar="N", help="ranks of the dry run (default: 1)")
    train.add_argument("--json", action="store_true", help="print the dry run as JSON")
    train.set_defaults(run=_train)

    replay = verbs.add_parser(
        "replay",
        help="do one step of a run again and find where its numbers break",
        description="Load the newest checkpoint before step N, run up to N, print its losses and "
        "gradient norms beside the recorded ones, and name the first module and the first gradient "
        "that are not finite. RUN is only read.",
    )
    replay.add_argument("run_dir", type=Path, metavar="RUN", help="the run's folder")
    replay.add_argument("store", type=Path, metavar="STORE", help="what it was trained on")
    replay.add_argument(
        "--step", type=int, required=True, metavar="N", help="as in incidents.jsonl, from 1"
    )
    replay.add_argument("--start", metavar="WEIGHTS", help="as the run was given it")
    replay.add_argument("--distill", type=Path, metavar="RUN", help="as the run was given it")
    replay.add_argument("--device", default=None, help="default: as in train")
    replay.set_defaults(run=_replay)

    watch = verbs.add_parser(
        "watch",
        help="say how a run is doing and whether it is healthy",
        description="Show step, losses beside ln K, health numbers, probe scores and a verdict in "
        "plain words; on a terminal redrawn until the run has finished, elsewhere printed whenever "
        "it has moved on. Exit code 0 healthy, 1 warnings, 70 a sick run. DIR/dashboard.html shows "
        "the same with curves; docs/health.md explains every number.",
    )
    watch.add_argument("run_dir", type=Path, metavar="DIR", help="what train was given as --out")
    watch.add_argument(
        "--every",
        type=_positive,
        default=5.0,
        metavar="SECONDS",
        help="between two looks (default: 5)",
    )
    watch.add_argument("--once", action="store_true", help="look once")
    watch.add_argument("--json", action="store_true", help="one line of JSON per change")
    watch.set_defaults(run=_watch)

    views = verbs.add_parser(
        "views",
        help="show what the model sees: views and masks of chosen samples",
        description="Write a contact sheet of samples of a run, as pictures (PNG) and as one page "
        "with a table of what was drawn for each view: OUT/views.html.",
        epilog="Any setting of the recipe can be changed with --group.name VALUE, as in train.",
    )
    views.add_argument(
        "store", type=Path, metavar="STORE", help="folder written by tapct-fast pack"
    )
    views.add_argument("--out", type=Path, required=True, metavar="DIR", help="made if absent")
    views.add_argument(
        "--recipe", default="vit-s", help=f"{', '.join(recipes.RECIPES)} (default: vit-s)"
    )
    views.add_argument(
        "--sample",
        type=int,
        nargs="+",
        default=[0, 1],
        metavar="N",
        help="samples, counted from 0 over the run (default: 0 1)",
    )
    views.set_defaults(run=_views)

    export = verbs.add_parser(
        "export",
        help="write the teacher of a run as a backbone",
        description="Write model.safetensors, config.json and preprocessor.json to OUT, "
        "or one file for another program; docs/export.md says what each holds.",
    )
    export.add_argument("run_dir", type=Path, metavar="RUN", help="run folder or one checkpoint")
    export.add_argument("out", type=Path, metavar="OUT")
    export.add_argument("--which", choices=("teacher", "student"), default="teacher")
    export.add_argument(
        "--format",
        choices=("folder", "pt2", "onnx", "nnunet"),
        default="folder",
        help="folder: for this library (default); pt2: compiled for PyTorch on this CPU; "
        "onnx: for ONNX Runtime; nnunet: a .pth to fine-tune from",
    )
    export.set_defaults(run=_export)

    check = verbs.add_parser(
        "check",
        help="compare a backbone with its definition in every precision and backend",
        description="Run a synthetic scan in every precision and attention backend of this machine "
        "and print a table to paste into a report: each one's distance from the eager float32 "
        "definition, its time, hashes of the weights, versions. Exit code 65 if a bound is broken. "
        "Takes two minutes for a B model on two CPU cores.",
    )
    check.add_argument(
        "backbone", metavar="BACKBONE", help="exported folder, model.safetensors or hub id"
    )
    check.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    check.add_argument(
        "--slices", type=int, metavar="N", help="depth of the scan (default: the backbone's own)"
    )
    check.add_argument("--json", type=Path, metavar="FILE", help="also write the table as JSON")
    check.set_defaults(run=_check)

    embed = verbs.add_parser(
        "embed",
        help="extract features of whole scans",
        description="Slide windows over each scan and write its feature volume (with affine), cls "
        "tokens and pooled vector. Run it again to go on after a stop.",
    )
    embed.add_argument(
        "backbone", metavar="BACKBONE", help="exported folder, model.safetensors or hub id"
    )
    embed.add_argument(
        "scan", type=Path, nargs="+", metavar="SCAN", help="scan file or DICOM series folder"
    )
    embed.add_argument("--out", type=Path, required=True, metavar="DIR")
    embed.add_argument(
        "--overlap",
        type=float,
        default=0.5,
        help="of neighbouring windows, 0 to 0.9 (default: 0.5)",
    )
    embed.add_argument(
        "--batch-size", type=int, help="windows per forward (default: what free memory allows)"
    )
    embed.add_argument("--device", default="cpu")
    embed.add_argument(
        "--no-check-hu",
        dest="check_hu",
        action="store_false",
        help="accept values that do not look like HU",
    )
    _add_series(embed)
    embed.set_defaults(run=_embed)

    probe = verbs.add_parser(
        "probe",
        help="say what frozen features are worth on labelled scans, beside rivals",
        description="Encode every scan once with each backbone, fit the same head on each one's "
        "features by cross-validation over patients, and print a table with 95 %% intervals and "
        "paired differences. OUT gets report.html, probe.json and the features; run it again to go "
        "on after a stop. docs/probe.md explains every number.",
    )
    probe.add_argument(
        "dataset",
        type=Path,
        metavar="DATASET",
        help="nnU-Net raw folder, MONAI decathlon .json, or .csv with the column scan and any of "
        "labels, patient, target, split, fold",
    )
    probe.add_argument(
        "--backbone",
        nargs="+",
        action="extend",
        required=True,
        metavar="B",
        help="exported folder, .safetensors or hub id; random:RECIPE or random:BACKBONE; "
        "intensity; timm:NAME[@random]; monai:NAME@FILE.safetensors|random; module:function. "
        "NAME=B is what tables call it; the first is compared with each other one",
    )
    probe.add_argument("--out", type=Path, required=True, metavar="OUT", help="made if absent")
    probe.add_argument(
        "--task",
        choices=("segmentation", "classification", "regression", "retrieval"),
        help="default: segmentation where there are label maps, else classification",
    )
    probe.add_argument(
        "--decoder", choices=("linear", "conv"), default="linear", help="of segmentation"
    )
    probe.add_argument(
        "--pooling",
        choices=("mean", "mean+std", "max", "mean+std+max", "abmil"),
        default="mean",
        help="of the other tasks: from a scan's windows to its vector (default: mean)",
    )
    probe.add_argument(
        "--head",
        choices=("logistic", "ridge", "knn"),
        help="default: logistic in classification, ridge in regression",
    )
    probe.add_argument(
        "--folds", type=int, default=5, help="without a split in DATASET (default: 5)"
    )
    probe.add_argument(
        "--splits",
        type=Path,
        metavar="FILE",
        help="nnU-Net's splits_final.json (default: in DATASET)",
    )
    probe.add_argument(
        "--shots", type=int, metavar="K", help="train on K scans only, K of each class"
    )
    probe.add_argument("--seed", type=int, default=0)
    probe.add_argument("--device", default="cpu")
    probe.add_argument(
        "--cache", type=Path, metavar="DIR", help="folder of the features (default: OUT/cache)"
    )
    probe.add_argument(
        "--policy", choices=POLICIES, default="error", help="what scans are read; as in pack"
    )
    probe.add_argument(
        "--no-check-hu",
        dest="check_hu",
        action="store_false",
        help="accept values that do not look like HU",
    )
    probe.set_defaults(run=_probe)

    bench = verbs.add_parser(
        "bench",
        add_help=False,
        help="list, run, compare, plot and tabulate the benchmarks of a repository",
    )
    bench.add_argument("words", nargs=argparse.REMAINDER)
    bench.set_defaults(run=_bench)

    doctor = verbs.add_parser("doctor", help="show versions, backends and what is missing")
    doctor.set_defaults(run=_doctor)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code."""
    parser = _parser()
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
        code: int = args.run(args)
    except TapctError as error:
        print(f"tapct-fast {args.verb}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"tapct-fast {args.verb}: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return code


if __name__ == "__main__":
    sys.exit(main())

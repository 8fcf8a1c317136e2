"""The words of the command line: every verb with its arguments; ``cli`` does what they ask for."""

import argparse
from pathlib import Path
from typing import NoReturn, TypeAlias

from tapct_fast import __version__, recipes
from tapct_fast.errors import POLICIES


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line with the way out."""

    def error(self, message: str) -> NoReturn:
        """Print the message and end the program."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


_Verbs: TypeAlias = "argparse._SubParsersAction[Parser]"

_TRAIN_EPILOG = """
Any setting of the recipe can be changed with --group.name VALUE, e.g. --vit.depth 6 --train.seed 1
--views.global_views.size_zyx 8,64,64 --heads.ibot none. Settings and their values in RECIPE vit-s:

"""


def _add_series(verb: Parser) -> None:
    verb.add_argument(
        "--series", metavar="KEY", help="which series, where DICOM folders hold several: 1, 2, ..."
    )


def _add_no_check_hu(verb: Parser) -> None:
    verb.add_argument(
        "--no-check-hu",
        dest="check_hu",
        action="store_false",
        help="accept values that do not look like HU",
    )


def _add_backbone(verb: Parser) -> None:
    verb.add_argument(
        "backbone", metavar="BACKBONE", help="exported folder, model.safetensors or hub id"
    )


def _add_overlap(verb: Parser) -> None:
    verb.add_argument(
        "--overlap",
        type=float,
        default=0.5,
        help="of neighbouring windows, 0 to 0.9 (default: 0.5)",
    )


def _add_store(verb: Parser) -> None:
    verb.add_argument("store", type=Path, metavar="STORE", help="folder written by tapct-fast pack")


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _train_settings() -> str:
    flat = recipes.settings(recipes.vit_s())
    width = max(map(len, flat))
    return "\n".join(f"  --{name:<{width}}  {value}" for name, value in flat.items())


def _add_demo(verbs: _Verbs) -> None:
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


def _add_pack(verbs: _Verbs) -> None:
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
    _add_no_check_hu(pack)
    pack.add_argument(
        "--policy",
        choices=POLICIES,
        default="error",
        help="what to do about doubts and damage: refuse, keep doubtful scans, or also repair",
    )
    pack.add_argument("--threads", type=int, help="scans packed at once (default: all cores)")
    _add_series(pack)


def _add_verify(verbs: _Verbs) -> None:
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
    _add_no_check_hu(verify)


def _add_locate(verbs: _Verbs) -> None:
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


def _add_train(verbs: _Verbs) -> None:
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
    _add_store(train)
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


def _add_replay(verbs: _Verbs) -> None:
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


def _add_watch(verbs: _Verbs) -> None:
    watch = verbs.add_parser(
        "watch",
        help="say how a run is doing and whether it is healthy",
        description="Show step, losses beside ln K, health numbers, probe scores and a verdict in "
        "plain words; on a terminal redrawn until the run has finished, elsewhere printed whenever "
        "it has moved on. Exit code 0 healthy, 1 warnings, 70 a sick run. DIR/report.html shows "
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


def _add_report(verbs: _Verbs) -> None:
    report = verbs.add_parser(
        "report",
        help="write the page of a run or of an embedded archive anew",
        description="Recognise what train or embed left in DIR and write DIR/report.html: tables, "
        "curves, settings, environment, hashes; one file without anything outside it. train and "
        "embed write it themselves; docs/reports.md says what is in it.",
    )
    report.add_argument("directory", type=Path, metavar="DIR", help="--out of train or embed")


def _add_views(verbs: _Verbs) -> None:
    views = verbs.add_parser(
        "views",
        help="show what the model sees: views and masks of chosen samples",
        description="Write a contact sheet of samples of a run, as pictures (PNG) and as one page "
        "with a table of what was drawn for each view: OUT/views.html.",
        epilog="Any setting of the recipe can be changed with --group.name VALUE, as in train.",
    )
    _add_store(views)
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


def _add_export(verbs: _Verbs) -> None:
    export = verbs.add_parser(
        "export",
        help="write the teacher of a run as a backbone",
        description="Write model.safetensors, config.json, preprocessor.json and a model card, "
        "README.md, to OUT, or one file for another program; docs/export.md says what each holds.",
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
    export.add_argument(
        "--license", metavar="ID", help="of the weights, as apache-2.0; for README.md"
    )
    export.add_argument(
        "--base-model", metavar="HUB_ID", help="what the run was started from; for README.md"
    )
    export.add_argument(
        "--probe",
        type=Path,
        metavar="FILE",
        help="probe.jsonl of the run or probe.json of an evaluation; its scores in README.md",
    )


def _add_check(verbs: _Verbs) -> None:
    check = verbs.add_parser(
        "check",
        help="compare a backbone with its definition in every precision and backend",
        description="Run a synthetic scan in every precision and attention backend of this machine "
        "and print a table to paste into a report: each one's distance from the eager float32 "
        "definition, its time, hashes of the weights, versions. Exit code 65 if a bound is broken. "
        "Takes two minutes for a B model on two CPU cores.",
    )
    _add_backbone(check)
    check.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    check.add_argument(
        "--slices", type=int, metavar="N", help="depth of the scan (default: the backbone's own)"
    )
    check.add_argument("--json", type=Path, metavar="FILE", help="also write the table as JSON")


def _add_embed(verbs: _Verbs) -> None:
    embed = verbs.add_parser(
        "embed",
        help="extract features of whole scans",
        description="Slide windows over each scan and write its feature volume (with affine), cls "
        "tokens and pooled vector, and a manifest of all scans. Each one is embedded exactly once: "
        "run it again to go on after a stop. docs/embed.md says what the folder holds.",
    )
    _add_backbone(embed)
    embed.add_argument(
        "scan",
        type=Path,
        nargs="+",
        metavar="ARCHIVE",
        help="scan file, DICOM series folder, or a folder searched for scans",
    )
    embed.add_argument("--out", type=Path, required=True, metavar="FEATURES", help="made if absent")
    _add_overlap(embed)
    embed.add_argument(
        "--batch-size", type=int, help="windows per forward (default: what the memory allows)"
    )
    embed.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    embed.add_argument(
        "--format",
        choices=("safetensors", "zarr"),
        default="safetensors",
        help="a file per scan (default), or a Zarr v3 group per scan",
    )
    embed.add_argument(
        "--timeout",
        type=_positive,
        default=600.0,
        metavar="SECONDS",
        help="for reading one scan; a later one is quarantined and the rest goes on (default: 600)",
    )
    embed.add_argument(
        "--readers", type=int, metavar="N", help="scans read at a time (default: 1, on CUDA to 4)"
    )
    embed.add_argument(
        "--memory",
        type=_positive,
        metavar="GIB",
        help="for scans that are read ahead (default: a quarter of what is free)",
    )
    embed.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="in this process (default), or on a Ray cluster",
    )
    embed.add_argument(
        "--workers", type=int, metavar="N", help="of Ray (default: one per GPU, or per core)"
    )
    embed.add_argument(
        "--ray-address", metavar="ADDRESS", help="of a running cluster (default: start one here)"
    )
    embed.add_argument(
        "--every",
        type=_positive,
        default=10.0,
        metavar="SECONDS",
        help="between progress lines, off a terminal, and writings of progress.json (default: 10)",
    )
    embed.add_argument("--json", action="store_true", help="print the numbers as one line of JSON")
    _add_no_check_hu(embed)
    _add_series(embed)


def _add_probe(verbs: _Verbs) -> None:
    probe = verbs.add_parser(
        "probe",
        help="say what frozen features are worth on labelled scans, beside rivals",
        description="Encode every scan once with each backbone, fit the same head on each one's "
        "features by cross-validation over patients, and print a table with 95 % intervals and "
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
    _add_no_check_hu(probe)


def _add_view(verbs: _Verbs) -> None:
    view = verbs.add_parser(
        "view",
        help="show what the features of a scan see, in a page to open in a browser",
        description="Write DIR/view.html: the scan in three planes under principal components of "
        "its features, the attention of cls, the similarity to a clicked patch and segmentations; "
        "and each of these as PNG and NIfTI. docs/view.md says how to read it.",
    )
    view.add_argument("scan", type=Path, metavar="SCAN", help="scan file or DICOM series folder")
    view.add_argument(
        "--backbone", required=True, help="exported folder, model.safetensors or hub id"
    )
    view.add_argument("--out", type=Path, required=True, metavar="DIR", help="made if absent")
    view.add_argument(
        "--head",
        type=Path,
        metavar="HEAD",
        help="of a probe of this backbone (.safetensors): segments the scan",
    )
    view.add_argument("--labels", type=Path, metavar="FILE", help="a label map on the scan's grid")
    view.add_argument(
        "--label-names",
        type=Path,
        metavar="FILE",
        help="their names: nnU-Net's dataset.json, or a JSON object of number to name",
    )
    view.add_argument(
        "--plane",
        type=int,
        metavar="N",
        help="encode slices at N x N pixels instead of the backbone's own size: finer tokens",
    )
    _add_overlap(view)
    view.add_argument("--device", default="cpu")
    _add_no_check_hu(view)
    _add_series(view)


def _add_bench(verbs: _Verbs) -> None:
    bench = verbs.add_parser(
        "bench",
        add_help=False,
        help="list, run, compare, plot and tabulate the benchmarks of a repository",
    )
    bench.add_argument("words", nargs=argparse.REMAINDER)


def _add_doctor(verbs: _Verbs) -> None:
    verbs.add_parser("doctor", help="show versions, backends and what is missing")


def build_parser() -> Parser:
    """Return the parser; what it parses has ``verb`` and that verb's arguments."""
    parser = Parser(
        prog="tapct-fast",
        allow_abbrev=False,
        description="Self-supervised 3D CT backbones: pack scans, train, export, embed, probe.",
        epilog="Start with: tapct-fast demo",
    )
    parser.add_argument("--version", action="version", version=f"tapct-fast {__version__}")
    verbs: _Verbs = parser.add_subparsers(
        dest="verb", required=True, metavar="VERB", parser_class=Parser
    )
    for add in (
        _add_demo,
        _add_pack,
        _add_verify,
        _add_locate,
        _add_train,
        _add_replay,
        _add_watch,
        _add_report,
        _add_views,
        _add_export,
        _add_check,
        _add_embed,
        _add_probe,
        _add_view,
        _add_bench,
        _add_doctor,
    ):
        add(verbs)
    return parser

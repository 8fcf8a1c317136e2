"""Kill embeds of one archive with SIGKILL and finish them: ``python killed_embeds.py FOLDER ...``.

One warm process, with a single thread, forks every run: importing torch, and what its first product
of matrices loads, take longer than a run. Prints one line of JSON, which test_archive.py judges.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from tapct_fast.backbone.backbone import Backbone
from tapct_fast.backbone.preprocess import Preprocess
from tapct_fast.config import VitConfig
from tapct_fast.downstream import archive
from tapct_fast.downstream.embed import embed_scans
from tapct_fast.io.nifti import write_nifti
from tapct_fast.io.volume import Volume
from tapct_fast.model.vit import Vit

SEED = 8
SHAPE_ZYX = (8, 48, 40)


def make_backbone() -> Backbone:
    config = VitConfig(
        dim=64, depth=1, image_zyx=(8, 32, 32), num_registers=0, layer_scale=1.0, drop_path=0.0
    )
    vit = Vit(config)
    vit.init_weights(0)
    vit.eval().requires_grad_(False)
    return Backbone(vit, Preprocess(resize_yx=(32, 32))).eval()


def make_archive(folder: Path, num_scans: int) -> None:
    folder.mkdir()
    noise_ZYX = np.random.default_rng(SEED).integers(-1000, 800, SHAPE_ZYX).astype(np.int16)
    for number in range(num_scans):
        path = folder / f"{number:04d}.nii"
        write_nifti(path, noise_ZYX + np.int16(number), np.diag([-0.8, -0.8, 3.0, 1.0]))
    (folder / "0000.nii").write_bytes(b"no scan")  # one that is refused


def new_out(folder: Path) -> Path:
    folder.mkdir()
    (folder / ".key").write_bytes(bytes(range(32)))
    (folder / ".key").chmod(0o600)
    return folder


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def run(
    scans: Path,
    out: Path,
    journal: Path,
    before: Callable[[], None],
    *,
    format: str = "safetensors",
) -> None:
    """Embed in this process; each scan that is encoded leaves its number in the journal."""
    encode = archive.embed_volume
    with journal.open("a", buffering=1) as file:

        def counted(*args: object, **options: object) -> object:
            file.write(f"{resident_mib():.2f}\n")
            return encode(*args, **options)

        archive.embed_volume = counted
        before()
        embed_scans(make_backbone(), [scans], out, format=format, every_s=1000.0)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


def fork(work: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)
        work()
        os._exit(0)
    finally:
        os._exit(1)


def killed_at_random(root: Path, num_scans: int, num_kills: int) -> dict[str, object]:
    """Run once undisturbed; then kill at random times, and let the last run finish."""
    scans, whole, broken = root / "scans", new_out(root / "whole"), new_out(root / "broken")
    make_archive(scans, num_scans)
    _, status = os.waitpid(fork(lambda: run(scans, whole, root / "whole.log", lambda: None)), 0)
    assert status == 0, status
    times = sorted(path.stat().st_mtime for path in (whole / "cases").glob("*.json"))
    scan_s = (times[-1] - times[0]) / num_scans

    def num_records() -> int:
        return len(list((broken / "cases").glob("*.json")))

    rng, lock = random.Random(SEED), broken / ".lock"
    kills = []
    for _ in range(num_kills):
        records = num_records()
        child = fork(lambda: run(scans, broken, root / "broken.log", lambda: None))
        if kills:  # the first at any time, the others while it works: behind its imports
            wait_for(lambda child=child: lock.exists() and lock.read_text() == f"{child}\n")
            # By scans, not by the clock, which runs ahead where other programs work. Before the
            # end: the scans that are left are shared among the kills that are, and more.
            most = 2 * (num_scans - records) // (num_kills - len(kills) + 5)
            until = records + rng.randint(0, most)
            wait_for(lambda until=until: num_records() >= until)
        time.sleep(rng.uniform(0.0, 2 * scan_s))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        kills.append((os.WTERMSIG(status), records))
    _, status = os.waitpid(fork(lambda: run(scans, broken, root / "broken.log", lambda: None)), 0)
    assert status == 0, status
    return {
        "kills": kills,
        "resident_mib": [float(x) for x in (root / "whole.log").read_text().split()],
        "encoded": len((root / "broken.log").read_text().split()),
    }


def killed_at_each_rename(root: Path, num_scans: int, format: str) -> dict[str, object]:
    """Kill before the first rename, before the second, ... until a run has fewer."""
    scans, whole = root / "scans", new_out(root / "whole")
    make_archive(scans, num_scans)
    log = root / "run.log"
    os.waitpid(fork(lambda: run(scans, whole, log, lambda: None, format=format)), 0)
    outs: list[list[object]] = []
    while True:
        out = new_out(root / f"broken-{len(outs)}")
        statuses = []
        for limit in (len(outs), None):

            def arm(limit: int | None = limit) -> None:
                num_left = [limit]

                def watch(event: str, _: object) -> None:
                    if event == "os.rename" and num_left[0] is not None:
                        if num_left[0] == 0:
                            os.kill(os.getpid(), signal.SIGKILL)
                        num_left[0] -= 1

                sys.addaudithook(watch)

            child = fork(lambda arm=arm, out=out: run(scans, out, log, arm, format=format))
            statuses.append(os.waitpid(child, 0)[1])
        outs.append([out.name, *statuses])
        if statuses[0] == 0:
            return {"outs": outs}


def warm_up() -> None:
    zeros_ZYX = np.zeros(SHAPE_ZYX, np.int16)
    archive.embed_volume(make_backbone(), Volume(zeros_ZYX, (3.0, 0.8, 0.8), np.eye(4)))
    # Another thread would be lost in the forks; one may just be ending.
    wait_for(lambda: len(list(Path("/proc/self/task").iterdir())) == 1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warm_up()
    root, how, num_scans, rest = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
    if how == "random":
        found = killed_at_random(root, num_scans, int(rest))
    else:
        found = killed_at_each_rename(root, num_scans, rest)
    sys.stdout.write(json.dumps(found) + "\n")

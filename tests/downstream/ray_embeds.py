"""Embed an archive here and on a local Ray cluster: ``python ray_embeds.py FOLDER``.

While the cluster works, one of its workers is killed. Prints one line of JSON for test_ray.py.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch

from tapct_fast.backbone.backbone import Backbone
from tapct_fast.backbone.preprocess import Preprocess
from tapct_fast.config import VitConfig
from tapct_fast.downstream.embed import embed_scans
from tapct_fast.downstream.ray_engine import RayCluster
from tapct_fast.io.nifti import write_nifti
from tapct_fast.model.vit import Vit

NUM_SCANS = 24
KEY = bytes(range(100, 132))


def make_backbone() -> Backbone:
    config = VitConfig(dim=64, depth=2, image_zyx=(12, 64, 64), num_registers=0, layer_scale=1.0)
    vit = Vit(config)
    vit.init_weights(0)
    vit.eval().requires_grad_(False)
    return Backbone(vit, Preprocess(resize_yx=(64, 64))).eval()


def workers_of(session: str) -> list[int]:
    """Return the actors of our own cluster, whose temporary folder their environment names."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            title = (folder / "cmdline").read_bytes()
            if title.startswith(b"ray::MapWorker") and session.encode() in (
                (folder / "environ").read_bytes()
            ):
                found.append(int(folder.name))
        except (OSError, ValueError):
            continue
    return found


def kill_one(session: str, out: Path, killed: list[int]) -> None:
    deadline = time.monotonic() + 120
    while not killed and time.monotonic() < deadline:
        workers = workers_of(session)
        if len(workers) == 2 and len(list((out / "cases").glob("*.json"))) >= 4:
            os.kill(workers[0], signal.SIGKILL)
            killed.append(workers[0])
        time.sleep(0.005)


def main(root: Path) -> None:
    torch.set_num_threads(1)
    scans = root / "doe_jane"
    scans.mkdir()
    for number in range(NUM_SCANS):
        hu_ZYX = np.random.default_rng(number).integers(-1000, 800, (40, 24, 20)).astype(np.int16)
        write_nifti(scans / f"doe_jane_{number:02d}.nii.gz", hu_ZYX, np.diag([-1.0, -1.0, 3.0, 1]))
    (scans / "doe_jane_03.nii.gz").write_bytes(b"no scan")
    outs = [root / name for name in ("local", "cluster")]
    for out in outs:
        out.mkdir()
        (out / ".key").write_bytes(KEY)
    backbone = make_backbone()
    embed_scans(backbone, [scans], outs[0])
    killed: list[int] = []
    threading.Thread(
        target=kill_one, args=(os.environ["RAY_TMPDIR"], outs[1], killed), daemon=True
    ).start()
    report = embed_scans(backbone, [scans], outs[1], ray=RayCluster(workers=2), timeout_s=60.0)
    again = embed_scans(backbone, [scans], outs[1])
    counts = [[r.embedded, r.skipped, r.quarantined] for r in (report, again)]
    sys.stdout.write(
        json.dumps({"counts": counts, "killed": len(killed), "progress": report.progress}) + "\n"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))

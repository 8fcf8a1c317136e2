"""Use the wheel as a stranger does: ``python -S use_wheel.py SITE DEPENDENCIES``."""

import sys
import tempfile
from importlib import resources
from pathlib import Path

site = Path(sys.argv[1])
sys.path[:0] = sys.argv[1:3]

import numpy as np  # noqa: E402 (the path comes first)

import tapct_fast  # noqa: E402

if Path(tapct_fast.__file__).parent.parent != site:
    sys.exit(f"the wheel was not used, but {tapct_fast.__file__}")
for name in ("page.html", "page.css", "scene.js", "draw.js", "page.js"):
    if not resources.files("tapct_fast.view").joinpath(name).is_file():
        sys.exit(f"the wheel lacks the view's {name}")
with tempfile.TemporaryDirectory() as folder:
    hu_ZYX = np.random.default_rng(0).normal(0, 300, (8, 32, 32)).astype(np.int16)
    volume = tapct_fast.from_numpy(hu_ZYX, np.diag([-0.8, -0.8, 2.5, 1.0]))
    scan, store = Path(folder) / "scan.nii.gz", Path(folder) / "store"
    tapct_fast.save_nifti(scan, volume.hu_ZYX, volume)
    if not np.array_equal(tapct_fast.read_volume(scan).hu_ZYX, hu_ZYX):
        sys.exit("the wheel's reader returns other voxels than were written")
    if tapct_fast.pack([scan], store).packed != 1:
        sys.exit("the wheel could not pack a scan")
    box = tapct_fast.Store.open(store).read_box(0, (1, 2, 3), (4, 5, 6))
    if not np.array_equal(box, hu_ZYX.clip(-1024, 3071)[1:5, 2:7, 3:9]):
        sys.exit("the wheel's store returns other voxels than were packed")
print("the wheel reads, writes and packs")

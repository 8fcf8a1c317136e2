"""Show the features of a scan as colours.

    python examples/pca_of_a_scan.py BACKBONE SCAN OUT.png

Three planes of the scan, each beside the first three principal components of its tokens. Needs
Pillow. docs/pca-torso.png was made by it.
"""

import dataclasses
import sys
from pathlib import Path

from PIL import Image

import tapct_fast
from tapct_fast.figures import Shown, fit_colors, scan_figure

HEIGHT, GAP = 300, 8  # pixels


def main(backbone_path: str, scan: str, out: str) -> None:
    """Write the picture."""
    backbone = tapct_fast.load_backbone(backbone_path)
    # A finer grid of tokens than the plane of training; positions are interpolated.
    backbone.preprocess = dataclasses.replace(backbone.preprocess, resize_yx=(192, 192))
    volume = tapct_fast.read_volume(Path(scan))
    shown = Shown(volume, tapct_fast.embed_volume(backbone, volume))
    figure = scan_figure("", shown, fit_colors([shown]), [])
    pictures = []
    for panel in (panel for row in figure.rows for panel in row):
        height_mm, width_mm = panel.size_mm
        size = (round(HEIGHT * width_mm / height_mm), HEIGHT)
        pictures.append(Image.fromarray(panel.rgb_YXC).resize(size, Image.Resampling.NEAREST))
    width = sum(picture.width + GAP for picture in pictures) - GAP
    sheet = Image.new("RGB", (width, HEIGHT), "white")
    x = 0
    for picture in pictures:
        sheet.paste(picture, (x, 0))
        x += picture.width + GAP
    sheet.save(out, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What the features of one scan see: a page to look into, pictures, and NIfTI for other viewers."""

from tapct_fast.view.scene import LabelMap, label_map_of, read_label_names
from tapct_fast.view.write import write_view

__all__ = ["LabelMap", "label_map_of", "read_label_names", "write_view"]

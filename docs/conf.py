"""The documentation site: pages of this folder, tutorials that run, the reference from docstrings.

``make docs`` builds it with warnings as errors; ``reference.py`` writes the pages of ``docs/api``.
"""

import os
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(path) for path in (REPOSITORY / "docs", REPOSITORY, REPOSITORY / "kernels")]
# Of tutorials, which run elsewhere, and of the programs that they start.
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[1:3])
os.environ["OMP_NUM_THREADS"] = "1"  # as they say

from tapct_fast import __version__  # noqa: E402  # found by the lines above

project = "tapct_fast"
author = "the tapct_fast authors"
copyright = author  # the name that Sphinx reads
version = release = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "reference"]
exclude_patterns = ["_build"]
# Every name must be found: reference.py resolves those of annotations as Python does.
nitpicky = True
myst_enable_extensions = ["attrs_block", "colon_fence"]
myst_heading_anchors = 3

# A tutorial that fails fails the build. It runs in a folder of its own.
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_execution_timeout = 900  # seconds for one cell; a minute where nothing else runs
nb_merge_streams = True

add_module_names = False
autodoc_member_order = "bysource"
# Where torchvision's wheel lacks operators beside a CPU build of torch, transformers cannot load
# it; adapters.hf does not use it.
autodoc_mock_imports = ["torchvision"]
napoleon_numpy_docstring = False
napoleon_use_ivar = True
maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"tapct_fast {release}"
html_static_path = ["_static"]
html_css_files = ["house.css"]
html_copy_source = False
html_theme_options = {
    "light_css_variables": {
        "color-brand-primary": "#1f6feb",
        "color-brand-content": "#1f6feb",
        "color-brand-visited": "#1f6feb",
    },
    "dark_css_variables": {
        "color-brand-primary": "#79b0ff",
        "color-brand-content": "#79b0ff",
        "color-brand-visited": "#79b0ff",
    },
}

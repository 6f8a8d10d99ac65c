"""How the site is built: `make docs`. Warnings are errors, and no page needs anything from another server."""

import runpy
import sys
from pathlib import Path


DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS / "_ext"))
sys.path.insert(0, str(DOCS.parent))

project = "loqt_peft"
author = "The loqt_peft developers"
copyright = author
version = release = runpy.run_path(str(DOCS.parent / "loqt_peft" / "_version.py"))["__version__"]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "repository_links",
    "markdown_docstrings",
    "reference_tables",
    "gpu_page",
]
exclude_patterns = ["_build", "_ext", "_static", "Thumbs.db"]
nitpicky = False

myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "attrs_block"]
# a bare address in a table is meant to be one
myst_linkify_fuzzy_links = False

html_theme = "furo"
html_title = f"loqt_peft {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "source_repository": "https://github.com/loqt-peft/loqt_peft/",
    "source_branch": "main",
    "source_directory": "docs/",
    "light_css_variables": {"color-brand-primary": "#00598c", "color-brand-content": "#00598c"},
    "dark_css_variables": {"color-brand-primary": "#56b4e9", "color-brand-content": "#56b4e9"},
}

autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_use_rtype = False
napoleon_use_ivar = True
copybutton_exclude = ".linenos, .gp, .go"

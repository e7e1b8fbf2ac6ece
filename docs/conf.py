"""How the pages are built: ``pip install -e '.[docs]' && sphinx-build -W docs build/docs``.

Sphinx, because the docstrings are written in its markup and because it is kept up; the Furo theme, because what it
builds fetches nothing from elsewhere: no fonts, no scripts of a content network. The pages are Markdown (MyST).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import generated  # noqa: E402  (beside this file)

import multipruner  # noqa: E402

project = "multipruner"
release = version = multipruner.__version__
author = "the multipruner authors"
copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["figures"]
root_doc = "index"
smartquotes = False  # a flag in a sentence begins with two hyphens
nitpicky = False  # types of torch and transformers have no pages here

html_theme = "furo"
html_title = f"multipruner {version}"
html_copy_source = html_show_sourcelink = False
html_show_copyright = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#00588c", "color-brand-content": "#00588c"},
    "dark_css_variables": {"color-brand-primary": "#7cc4f0", "color-brand-content": "#7cc4f0"},
}
pygments_style = "default"
pygments_dark_style = "monokai"

myst_heading_anchors = 3
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88


def _fill(app: Any, page: str, source: list[str]) -> None:
    """Put in what is read off the code."""
    source[0] = generated.fill(source[0])


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("source-read", _fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

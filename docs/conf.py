"""Settings of the manual. Build it with ``python -m sphinx docs docs/_build/html``.

Neither that nor reading it needs a network: MathJax, which draws the equations, lies beside the pages.
"""

import re
import sys
from pathlib import Path

from sphinx.util import inspect

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

project = "sbac"
release = re.search(r'^__version__ = "(.+)"$', (ROOT / "sbac/__init__.py").read_text(encoding="utf-8"), re.MULTILINE)[1]
version = release

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_title = f"sbac {release}"
html_show_copyright = False

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3

default_role = "code"  # docstrings put names into single backticks
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88


def plain_text(app, what, name, obj, options, lines):
    """Docstrings are plain text: asterisks and bars are no markup, and a module's indented blocks are code."""
    for i, line in enumerate(lines):
        lines[i] = re.sub(r"(`+[^`]+`+)|([*|])", lambda found: found[1] or "\\" + found[2], line)
    if what == "module":
        starts = [i for i in range(1, len(lines)) if lines[i].startswith("    ") and not lines[i - 1].strip()]
        for i in reversed(starts):
            lines[i:i] = ["::", ""]


def signature(app, what, name, obj, options, arguments, returned):
    """What a caller writes, where a metaclass checks the arguments, and for `load`, which is two methods in one."""
    if what == "class" and type(obj).__call__ is not type.__call__ and "__init__" in vars(obj):
        found = inspect.stringify_signature(inspect.signature(obj.__init__, bound_method=True), show_annotation=False)
        return re.sub(r"<class '[\w.]*?(\w+)'>", r"\1", found), None
    if name == "sbac.saving.Saveable.load":
        return re.sub(r"^\(instance: [^,]+, ", "(", arguments), returned
    return None


def skip(app, what, name, obj, skipped, options):
    """The fields of a named tuple are in its signature."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def setup(app):
    app.connect("autodoc-process-docstring", plain_text, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", signature)
    app.connect("autodoc-skip-member", skip)

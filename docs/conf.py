"""The documentation, built by Sphinx: `make docs` puts it into build/docs, and takes warnings for errors."""

from docutils.nodes import SkipNode, math, math_block
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

project = "megaprompt"
html_theme = "furo"
html_title = "megaprompt"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["wide.css"]
highlight_language = "none"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "cyclopts.ext.sphinx"]
exclude_patterns = ["requirements.txt"]

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_execution_show_tb = True
nb_output_stderr = "remove"  # progress

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
default_role = "code"  # docstrings have single backticks
smartquotes = False  # --options stay as they are
html_math_renderer = "mathml"


def inline(translator: HTML5Translator, node: math) -> None:
    translator.body.append(convert(node.astext()))
    raise SkipNode


def block(translator: HTML5Translator, node: math_block) -> None:
    translator.body.append(convert(node.astext(), display="block"))
    raise SkipNode


def setup(app: Sphinx) -> None:
    """Formulas as MathML, which browsers show by themselves: nothing is loaded from elsewhere."""
    app.add_html_math_renderer("mathml", inline_renderers=(inline, None), block_renderers=(block, None))

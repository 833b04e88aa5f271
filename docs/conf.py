"""Sphinx: the pages of docs/ and README as they are, and the reference from the docstrings (`make docs`)."""

project = "nemo-upcycle"
root_doc = "docs/index"
include_patterns = [
    "docs/*.md",
    "docs/results/*.md",
    "docs/reference/**",
    "*.md",
    "docker/*.md",
    "benchmarks/results/*.md",
]
extensions = ["myst_parser", "sphinx.ext.napoleon", "autoapi.extension"]
html_theme = "furo"
default_role = "code"  # docstrings write `code` with single backticks
myst_heading_anchors = 3
suppress_warnings = [
    "toc.not_included",  # tables of benchmarks are reached by links
    "autoapi.python_import_resolution",  # constants assigned together: A, B = ...
]
# Read from the source: nothing is imported, so that neither torch nor NeMo is needed.
autoapi_dirs = ["build/tree/nemo_upcycle"]
autoapi_root = "docs/reference"
autoapi_add_toctree_entry = False
autoapi_options = ["members", "show-module-summary"]
autoapi_member_order = "bysource"

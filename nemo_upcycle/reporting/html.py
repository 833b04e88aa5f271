"""A page of Markdown as one HTML file: its figures are inside, and it loads nothing."""

from __future__ import annotations

import base64
import html
import itertools
import re
from collections.abc import Mapping
from typing import Any


_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; overflow-wrap: anywhere; }
h1 + p { font-size: 1.25rem; line-height: 1.35; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #8886; padding-bottom: .2rem; }
p, li { overflow-wrap: break-word; }
.table { margin: 1rem 0; overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #8884; vertical-align: top; }
th { text-align: left; vertical-align: bottom; }
th:first-child, td:first-child { padding-left: 0; min-width: 7rem; }
.n { white-space: nowrap; }
h1 + p + .table td:nth-child(2) { font-size: 1.2em; font-weight: 600; line-height: 1.25; }
img { display: block; max-width: min(100%, 48rem); background: white; }
code, pre { font: .9em ui-monospace, monospace; background: #8882; border-radius: 3px; }
code { padding: .1em .3em; }
pre { padding: .7rem 1rem; overflow-x: auto; }
pre code { background: none; padding: 0; }
nav { columns: 2; margin: 1rem 0 2rem; }
nav a { display: block; }
@media (max-width: 40rem) {
  body { margin: 1rem auto; }
  th, td { padding: .25rem .4rem; font-size: .9rem; }
  h1 + p { font-size: 1.15rem; }
  h1 + p + .table td:nth-child(2) { font-size: 1em; }
  p:has(> img) { overflow-x: auto; }
  img { min-width: 38rem; }
  h1 + p + .table + p > img { min-width: 0; }
}
@media print {
  :root { color-scheme: light; }
  body { font-size: 10pt; max-width: none; margin: 0; padding: 0; }
  nav { display: none; }
  .table, pre { overflow: visible; }
  pre { white-space: pre-wrap; }
  table, tr, img, pre, li { break-inside: avoid; }
  thead { display: table-header-group; }
  th, td { padding: .15rem .4rem; }
  h1, h2, h2 + p { break-after: avoid; }
  p { orphans: 3; widows: 3; }
  img { min-width: 0; max-height: 13cm; }
}
"""
#: A number with its sign, error and unit: no line breaks inside.
_NUMBER = re.compile(r"[-+]?\d[\d.,:/]*(?:e[-+]?\d+)?(?: ± \d[\d.,]*(?:e[-+]?\d+)?)?(?: (?:%|[KMGT]iB|bytes)(?!\w))?")


def render_html(markdown: str, figures: Mapping[str, bytes]) -> str:
    """Return a page of its own: text, contents, tables, and figures as data.

    HTML in the text is shown, not obeyed: it may come from the texts that models wrote. Of images only `figures` are
    shown; any other is its text.

    Args:
        markdown: the page, as `compose` writes it.
        figures: name in the page -> PNG.

    Example:
        >>> "<h1 id=" in render_html("# demo", {})
        True
    """
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    for name, rule in _RULES.items():
        parser.add_render_rule(name, rule)
    tokens = parser.parse(markdown)
    title, contents = "", list[str]()
    for heading, inline in itertools.pairwise(tokens):
        if heading.type != "heading_open":
            continue
        heading.attrs["id"] = name = f"section-{len(contents)}"
        if heading.tag == "h1":
            title = "".join(child.content for child in inline.children or ())
        else:
            contents.append(f'<a href="#{name}">{parser.renderInline(inline.content)}</a>')
    body = parser.renderer.render(tokens, parser.options, {"figures": figures})
    first, second, rest = body.partition("<h2")  # the contents stand behind the opening
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{first}<nav>{''.join(contents)}</nav>\n{second}{rest}"
        "</body>\n</html>\n"
    )


def _image(_: Any, tokens: Any, index: int, options: Any, env: Mapping[str, Any]) -> str:
    """Render a figure that was handed over as its bytes, and any other image as its text."""
    source, text = str(tokens[index].attrs["src"]), html.escape(tokens[index].content)
    if source not in env.get("figures", {}):
        return f"![{text}]({html.escape(source)})"
    data = base64.b64encode(env["figures"][source]).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{text}">'


def _text(_: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
    return _NUMBER.sub(r'<span class="n">\g<0></span>', html.escape(tokens[index].content, quote=False))


_RULES = {
    "image": _image,
    "text": _text,
    "table_open": lambda *_: '<div class="table">\n<table>\n',
    "table_close": lambda *_: "</table>\n</div>\n",
}

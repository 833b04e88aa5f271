"""A page of Markdown as one HTML file: its figures are inside, and it loads nothing."""

from __future__ import annotations

import base64
import itertools
from pathlib import Path
from typing import Any


_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #8886; padding-bottom: .2rem; }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; }
table { font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #8884; vertical-align: top; }
th { text-align: left; }
img { max-width: 100%; background: white; }
code, pre { font: .9em ui-monospace, monospace; background: #8882; border-radius: 3px; }
code { padding: .1em .3em; }
pre { padding: .7rem 1rem; overflow-x: auto; }
pre code { background: none; padding: 0; }
nav { columns: 2; margin: 1rem 0 2rem; }
nav a { display: block; }
"""


def render_html(markdown: str, folder: Path) -> str:
    """Return a page of its own: contents, text, tables, and the figures that it names as data.

    HTML in the text is shown, not obeyed: it may come from the texts that models wrote.

    Args:
        markdown: the page, as `compose` writes it.
        folder: where the figures are.

    Example:
        >>> "<h1 id=" in render_html("# demo", Path())
        True
    """
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(markdown)
    title, contents = "", list[str]()
    for heading, inline in itertools.pairwise(tokens):
        if heading.type != "heading_open":
            continue
        heading.attrs["id"] = name = f"section-{len(contents)}"
        if heading.tag == "h1":
            title = inline.content
        else:
            contents.append(f'<a href="#{name}">{parser.renderInline(inline.content)}</a>')
    for image in (child for token in tokens for child in token.children or () if child.type == "image"):
        _embed(image, folder)
    body = parser.renderer.render(tokens, parser.options, {})
    first, end, rest = body.partition("</h1>")
    plain = parser.renderInline(title)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{plain}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{first}{end}\n<nav>{''.join(contents)}</nav>\n{rest}</body>\n</html>\n"
    )


def _embed(image: Any, folder: Path) -> None:
    """Put a figure's bytes in place of its name."""
    path = folder / str(image.attrs["src"])
    image.attrs["src"] = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()

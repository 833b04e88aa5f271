"""Turn Markdown into one self-contained HTML file that contains the figures."""

from __future__ import annotations

import base64
import html
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


_STYLE = Path(__file__).with_name("report.css")
#: A number with its sign, error and unit, in which the page must not break a line.
_NUMBER = re.compile(r"[-+]?\d[\d.,:/]*(?:e[-+]?\d+)?(?: ± \d[\d.,]*(?:e[-+]?\d+)?)?(?: (?:%|[KMGT]iB|bytes)(?!\w))?")


def render_html(markdown: str, figures: Mapping[str, bytes], refresh_s: int = 0) -> str:
    """Render Markdown as a self-contained HTML page with a table of contents.

    HTML in the text is displayed as text, because it may come from texts that models wrote. Images are shown only if
    they are in `figures`. For any other image, its text is shown.

    Args:
        markdown: text of the page, as `compose` writes it.
        figures: name of a figure in the page -> PNG.
        refresh_s: interval after which a browser reloads the page (seconds); 0 never reloads it.

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
    refresh = f'<meta http-equiv="refresh" content="{refresh_s}">\n' if refresh_s else ""
    body = parser.renderer.render(tokens, parser.options, {"figures": figures})
    first, second, rest = body.partition("<h2")  # the table of contents follows the opening
    style = _STYLE.read_text(encoding="utf-8")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n{refresh}'
        f"<title>{html.escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<header>\n{first}</header>\n"
        f"<nav>{''.join(contents)}</nav>\n{second}{rest}</body>\n</html>\n"
    )


def _image(_: Any, tokens: Any, index: int, options: Any, env: Mapping[str, Any]) -> str:
    """Embed an image if its bytes are in `figures`; otherwise show the image's text."""
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

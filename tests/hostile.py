"""Texts that a user may enter as a name. Each text tries to break the file into which the package writes it."""

from __future__ import annotations


#: Kind of attack -> text.
HOSTILE = {
    "quotes": """it's "a" 'b'""",
    "code": 'a""";__import__("os").system("touch PWNED");"""',
    "code_in_single_quotes": "a''';__import__('os').system('touch PWNED');'''",
    "new_lines": "a\n\n# owned\n\n- item\r\n---\nkey: value\n",
    "code_on_a_new_line": "a\nimport os; os.system('touch PWNED')\n#",
    "backticks": "`touch PWNED` ```\n# out\n``` a`b",
    "commands": "$(touch PWNED) ${HOME} $HOME; touch PWNED & | > < !",
    "backslashes": "a\\ \\n \\\" \\' \\",
    "script": "</script><script>alert(1)</script></style></title>",
    "image": '<img src=x onerror="alert(1)">',
    "markdown": "![x](y.png) [x](javascript:alert(1)) **b** _i_ ~~s~~ $m$ &lt; <https://a.example>",
    "cells": "a | | b || c |\\| d",
    "right_to_left": "a\u202ecod.exe\u202c \u2066b\u2069 \u200fc",
    "line_separators": "a\u2028# b\u2029# c\x85# d\ufeff",
    "control": "a\x1b[31m\x07b\x7f",
    "long": "x" * 10_000,
    "long_words": "word " * 2_000,
    "format": "{} {0} {name} %s %(name)s %d {{}}",
    "references": "${oc.env:HOME} \\${a} ${",
    "dash": "-rf --help",
    "hash": "# comment",
    "heading": "Title\n=====\n\n## Scores\n",
    "path": "../../etc/passwd",
    "yaml": "!!python/object/apply:os.system ['touch PWNED'] &a *a {a: [b",
    "number": "1e3",
    "null": "null",
    "surrogate": "a\udcffb",
    "unicode": "Zürich 模型 ☃",
}

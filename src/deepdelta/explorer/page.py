"""Self-contained pages: a body, the style, scripts and data in one file that asks for nothing else."""

import html
import json
from importlib.resources import files
from typing import Any

_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
"""  # noqa: E501


def asset(name: str) -> str:
    """The text of a file of this package."""
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def assemble(title: str, body: str, data: Any, scripts: tuple[str, ...]) -> str:
    """The page: the asset `body`, `data` as JSON that no text can end, and the assets `scripts` in their order."""
    plain = json.dumps(data, allow_nan=False, separators=(",", ":"))  # ASCII alone
    for character in "<>&":
        plain = plain.replace(character, f"\\u{ord(character):04x}")
    code = "".join(f"<script>\n{asset(name)}</script>\n" for name in scripts)
    embedded = f'<script type="application/json" id="data">{plain}</script>\n'
    head = _HEAD.format(title=html.escape(title), style=asset("style.css"))
    return f"{head}{asset(body)}{embedded}{code}</body>\n</html>\n"

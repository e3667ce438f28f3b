"""What a package index shows: the README without its pictures, links into this repository as their text alone."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

OUTSIDE = r"\((?!https?:)[^)\s]*\)"
NOTE = """

Pages that are named here without a link, the make targets and the studies' results are in the repository; the source
distribution has the pages too, in `docs/`.
"""


class Page(MetadataHookInterface):
    def update(self, metadata: dict[str, Any]) -> None:
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = re.sub(rf"!\[[^\]]*\]{OUTSIDE} ?", "", text)
        text = re.sub(rf"\[([^\]]+)\]{OUTSIDE}", r"\1", text)
        text = re.sub(r"\n{3,}", "\n\n", text.strip() + NOTE)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}

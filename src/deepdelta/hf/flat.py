"""One file that holds the whole model, for those who load an export without this library (`trust_remote_code=True`).

It is put together from the library's own modules, so that there is one implementation of the network: their sources
one after another, without the imports of each other, after what stands in for the rest (`standing_in.py`).
"""

import ast
from pathlib import Path

import deepdelta
from deepdelta.config import to_plain
from deepdelta.nn.presets import PRESETS
from deepdelta.version import __version__

NAME = "modeling_deepdelta"
"""Of the module, as `auto_map` in config.json names it."""
MODULES = (
    "hf/standing_in",
    "ops/precision",
    "nn/config",
    "ops/rewrite/reference",
    "ops/step/reference",
    "nn/plain",
    "nn/layout",
    "nn/linear",
    "nn/parts/direction",
    "nn/parts/expansion",
    "nn/parts/compression",
    "nn/parts/gate",
    "nn/parts/target",
    "nn/parts/query",
    "nn/input_map",
    "nn/rewriting",
    "nn/residual",
    "nn/chain",
    "nn/stream",
    "models/attention",
    "models/gpt",
    "hf/lines",
    "hf/caching",
    "hf/configuration",
    "hf/modeling",
)
ABSENT = ("deepdelta", "jaxtyping", "annotated_types", "pydantic")
"""Packages that the file does without."""
AUTO_MAP = {
    "AutoConfig": f"{NAME}.DeepDeltaConfig",
    "AutoModel": f"{NAME}.DeepDeltaModel",
    "AutoModelForCausalLM": f"{NAME}.DeepDeltaForCausalLM",
}


def flat_source() -> str:
    """The file's text."""
    imports: set[str] = set()
    bodies = []
    for module in MODULES:
        kept, body = _split((Path(deepdelta.__file__).parent / f"{module}.py").read_text(encoding="utf-8"))
        imports |= kept
        bodies.append(f"# deepdelta/{module}.py\n\n\n{body}")
    text = "\n\n\n".join(bodies)
    # Beside the library, in one process, its caches are not these.
    text = text.replace('LAYER_TYPE = "deepdelta"', 'LAYER_TYPE = "deepdelta_flat"')
    text = text.replace('PRESETS["ddl"]', f"ResidualConfig(**{to_plain(PRESETS['ddl'])!r})")
    head = (
        f'"""A model of deepdelta {__version__}, put together from its modules; Apache-2.0. Change them, not this."""'
    )
    return "\n".join([head, "", *sorted(imports), "", "", text, ""])


def _split(source: str) -> tuple[set[str], str]:
    """The imports of a module that others than this library's satisfy, and the rest without its docstring."""
    tree, lines = ast.parse(source), source.splitlines()
    imports, dropped = set(), set()
    for i, node in enumerate(tree.body):
        text = ast.unparse(node)
        docstring = i == 0 and isinstance(node, ast.Expr)
        # The output's name in exported programs is the library's.
        if docstring or isinstance(node, ast.Import | ast.ImportFrom) or text.startswith("pytree."):
            assert node.end_lineno is not None
            dropped |= set(range(node.lineno - 1, node.end_lineno))
        if isinstance(node, ast.Import) or (
            isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] not in ABSENT
        ):
            imports.add(text)
    return imports, "\n".join(line for i, line in enumerate(lines) if i not in dropped).strip("\n")

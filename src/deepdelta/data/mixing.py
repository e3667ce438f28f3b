"""Several sources of training text, drawn by their weights; one source is a corpus by itself."""

import hashlib
import json
from dataclasses import replace

from deepdelta.data.config import DataConfig
from deepdelta.data.corpus import Corpus, load_source
from deepdelta.data.documents import Say
from deepdelta.errors import UserError
from deepdelta.files import AnyPath


def load_corpus(config: DataConfig, *, cache: AnyPath | None = None, progress: Say | None = None) -> Corpus:
    """The corpus that `config` describes: its source (`corpus.load_source`), and what it mixes.

    Of a mixture, `train` and `validation` are those of `config.source`; training windows are drawn from `mixture`. The
    sources stay where they are mapped: nothing is copied to mix them.

    Raises:
        UserError: see `load_source`; or the sources do not have one tokenizer and one vocabulary.
    """
    alone = replace(config, mixture=())
    main = load_source(alone, cache=cache, progress=progress)
    if not config.mixture:
        return main
    parts: dict[str, Corpus] = {}
    for name, _ in config.mixture:
        if name != config.source:
            parts[name] = load_source(replace(alone, source=name), cache=cache, progress=progress)
        else:
            parts[name] = main
        of_it, of_main = (
            (corpus.tokenizer and corpus.tokenizer.sha256, corpus.vocab_size) for corpus in (parts[name], main)
        )
        if of_it != of_main:
            raise UserError(
                f"sources that are mixed must have one tokenizer and vocabulary, and {name} has another than "
                f"{config.source}: name one `tokenizers` JSON file by tokenizer, or give ids of one vocabulary."
            )
    total = sum(weight for _, weight in config.mixture)
    shares = {name: weight / total for name, weight in config.mixture}
    told = [main.sha256, *([parts[name].sha256, share] for name, share in shares.items())]
    others = [(name, *shard) for name, part in parts.items() if part is not main for shard in part.shards]
    return replace(
        main,
        mixture=tuple((parts[name].train, share) for name, share in shares.items()),
        sha256=hashlib.sha256(json.dumps(told).encode()).hexdigest(),
        sources=tuple(dict.fromkeys(file for part in (main, *parts.values()) for file in part.sources)),
        mapped=tuple(dict.fromkeys(file for part in (main, *parts.values()) for file in part.mapped)),
        shards=main.shards + tuple((f"{name}/{shard}", sha256) for name, shard, sha256 in others),
        description=f"{main.description}; trained on a mixture: "
        + ", ".join(f"{share:.1%} of {name} ({len(parts[name].train):,} tokens)" for name, share in shares.items()),
    )

"""Text sources to batches: `load_corpus` gives two arrays of ids, `batch` and `windows` cut them."""

from deepdelta.data.batches import IGNORED, batch, spread, window_count, windows
from deepdelta.data.cache import default_cache
from deepdelta.data.config import DataConfig
from deepdelta.data.corpus import Corpus, check_context, train_tail
from deepdelta.data.mixing import load_corpus
from deepdelta.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "IGNORED",
    "BPETokenizer",
    "ByteTokenizer",
    "Corpus",
    "DataConfig",
    "Tokenizer",
    "batch",
    "check_context",
    "default_cache",
    "load_corpus",
    "load_tokenizer",
    "spread",
    "train_tail",
    "window_count",
    "windows",
]

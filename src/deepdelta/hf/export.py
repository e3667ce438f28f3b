"""From a trained GPT to a folder that transformers reads: weights, configuration, tokenizer, how to generate."""

from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from deepdelta.data import BPETokenizer, ByteTokenizer, Tokenizer
from deepdelta.data.tokenizer import FILE_NAME, SEPARATOR
from deepdelta.files import write_text
from deepdelta.hf.flat import AUTO_MAP, NAME, flat_source
from deepdelta.hf.modeling import DeepDeltaForCausalLM
from deepdelta.models import GPT


def export_hf(model: GPT, tokenizer: Tokenizer | None, folder: Path) -> None:
    """Write the model, and its tokenizer if it has one, into an existing folder, with the code that it needs where this
    library is absent.

    The separator between documents is the token that begins, ends and pads texts. Ids that the tokenizer does not have
    are never generated.
    """
    special = None if tokenizer is None else tokenizer.separator
    ids = {"bos_token_id": special, "eos_token_id": special, "pad_token_id": special}
    exported = DeepDeltaForCausalLM.from_gpt(model, **ids)
    rows = model.embedding.weight.shape[0]
    unused = [] if tokenizer is None else list(range(tokenizer.vocab_size, rows))
    exported.generation_config = GenerationConfig(**ids, suppress_tokens=unused or None)
    exported.config.auto_map = AUTO_MAP
    exported.save_pretrained(folder)
    write_text(folder / f"{NAME}.py", flat_source())
    if tokenizer is not None:
        _write_tokenizer(tokenizer, model.config.context, folder)


def _write_tokenizer(tokenizer: Tokenizer, context: int, folder: Path) -> None:
    separator = tokenizer.separator_token if isinstance(tokenizer, BPETokenizer) else SEPARATOR
    if isinstance(tokenizer, ByteTokenizer):
        held = byte_tokenizer()
    else:
        tokenizer.save(folder)
        held = tokenizers.Tokenizer.from_file(str(folder / FILE_NAME))
    PreTrainedTokenizerFast(
        tokenizer_object=held,
        bos_token=separator,
        eos_token=separator,
        pad_token=separator,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=context,
    ).save_pretrained(folder)


def byte_tokenizer() -> tokenizers.Tokenizer:
    """`ByteTokenizer` as one of the library `tokenizers`: a byte-level BPE without merges, each id the byte itself.

    The NUL byte, its separator, is a token of its own and no byte of a text.
    """
    letters = [_letter(byte) for byte in range(256)]
    vocabulary = {letter: byte for byte, letter in enumerate(letters) if byte != ByteTokenizer.separator}
    made = tokenizers.Tokenizer(models.BPE(vocabulary | {SEPARATOR: ByteTokenizer.separator}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([SEPARATOR])
    return made


def _letter(byte: int) -> str:
    """What the byte-level BPE writes for a byte: itself where it is a visible character of Latin-1, else the next free
    one from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return chr(byte if byte in visible else 256 + sum(other not in visible for other in range(byte)))

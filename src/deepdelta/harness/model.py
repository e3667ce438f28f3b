"""A language model as lm-eval asks for it: log-likelihoods of continuations, of whole texts, and what it writes.

Shapes: B requests, T tokens.
"""

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from deepdelta.data import Tokenizer
from deepdelta.decoding import generate
from deepdelta.errors import UserError
from deepdelta.models import GPT, LanguageModel
from deepdelta.progress import reporting

Ids = list[int]


class HarnessModel(TemplateLM):
    """The model of a run, for lm-eval's tasks.

    A continuation's log-likelihood is the sum of log p of its tokens after those of the context, in fp64, and whether
    each of them is the likeliest. Of what is longer than the model's context the last tokens count. A text begins
    after the separator between documents.
    """

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer, *, batch_size: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}.")
        self.model, self.held, self.batch_size = model.eval(), tokenizer, batch_size
        self._device = model.embedding.weight.device

    @property
    def eot_token_id(self) -> int:
        return self.held.separator

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> Ids:
        """The ids of a text; nothing is put before or after them."""
        return self.held.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Ids, Ids]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        context = self.model.config.context
        windows = []
        for _, before, continuation in requests:
            if len(continuation) > context:
                raise UserError(
                    f"a continuation of {len(continuation)} tokens does not fit into the model's context of {context}."
                )
            windows.append(((before + continuation)[-context - 1 :], len(continuation)))
        found: list[tuple[float, bool]] = [(0.0, True)] * len(windows)
        longest_first = sorted(range(len(windows)), key=lambda i: -len(windows[i][0]))
        with reporting("Log-likelihoods", len(windows)) as reporter:
            for first in range(0, len(windows), self.batch_size):
                chosen = longest_first[first : first + self.batch_size]
                for i, result in zip(chosen, self._batch([windows[i] for i in chosen]), strict=True):
                    found[i] = result
                reporter.update(first + len(chosen), "")
        return found

    @torch.no_grad()
    def _batch(self, windows: Sequence[tuple[Ids, int]]) -> list[tuple[float, bool]]:
        longest = max(len(ids) for ids, _ in windows) - 1
        # Padded on the right, which no earlier token sees.
        rows = [ids[:-1] + [0] * (longest - len(ids) + 1) for ids, _ in windows]
        logits_BTV = self.model(torch.tensor(rows, device=self._device)).logits
        found = []
        for logits_TV, (ids, count) in zip(logits_BTV, windows, strict=True):
            targets = torch.tensor(ids[len(ids) - count :], device=self._device)
            found.append(_scored(logits_TV[len(ids) - 1 - count : len(ids) - 1], targets))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows of the model's context that do not overlap."""
        windows = [self._windows(request.args[0]) for request in requests]
        values = iter(self._loglikelihood_tokens([window for text in windows for window in text]))
        return [sum(next(values)[0] for _ in text) for text in windows]

    def _windows(self, text: str) -> list[tuple[Any, Ids, Ids]]:
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.model.config.context,
            context_len=1,
        )
        return [(None, *make_disjoint_window(window)) for window in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to one of the texts that end it."""
        written = []
        with reporting("Continuations", len(requests)) as reporter:
            for request in requests:
                context, options = request.args
                written.append(self._written(context, **options))
                reporter.update(len(written), "")
        return written

    def _written(
        self,
        context: str,
        until: str | Sequence[str] = (),
        max_gen_toks: int = 256,
        do_sample: bool = False,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        **others: Any,
    ) -> str:
        if others:
            raise UserError(f"a task asks to generate with {', '.join(others)}, which is not known here.")
        if not isinstance(self.model, GPT):
            raise UserError(f"only models with delta residuals generate, got rival='{self.model.config.rival}'.")
        ends = [until] if isinstance(until, str) else list(until)
        drawn = generate(
            self.model,
            self.tok_encode(context) or [self.eot_token_id],
            tokens=max_gen_toks,
            temperature=(temperature or 1.0) if do_sample else 0.0,
            top_k=top_k,
            top_p=top_p,
            vocab_size=self.held.vocab_size,
            stop=[self.eot_token_id],
        )
        ids: Ids = []
        for one in drawn:
            if one == self.eot_token_id:
                break
            ids.append(one)
            text = self.held.decode(ids)
            if stops := [text.index(end) for end in ends if end and end in text]:
                return text[: min(stops)]
        return self.held.decode(ids)


def _scored(logits_TV: Tensor, targets_T: Tensor) -> tuple[float, bool]:
    log_p_TV = logits_TV.double().log_softmax(-1)
    value = log_p_TV.gather(-1, targets_T[:, None]).sum().item()
    return value, bool((logits_TV.argmax(-1) == targets_T).all())

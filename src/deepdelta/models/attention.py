"""The two branches of the reference architecture: causal attention with RoPE, and SwiGLU.

Shapes: B batch, T tokens, D model width, H heads, E width of a head, F hidden width of the MLP.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn import functional as F

from deepdelta.nn import RMSNorm
from deepdelta.nn.linear import Initialised, plain_linear


class Rotary(nn.Module):
    """Rotary positions: base^(-2i/R) per pair, half-split rotation of R = fraction * E features, fp32 angles."""

    def __init__(self, head_dim: int, context: int, base: float, fraction: float) -> None:
        super().__init__()
        self.rotated, self.context, self.base = int(head_dim * fraction) // 2 * 2, context, base
        # No buffers: they follow from the settings, and what fills a model that was built on 'meta' (to_empty, a state
        # dict, transformers' from_pretrained) would leave buffers that no state dict holds with arbitrary numbers.
        self._tables: tuple[Tensor, Tensor] | None = None
        if (device := torch.get_default_device()).type != "meta":
            self._tables = self._computed(device)

    def _computed(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin, (context, 1, half) each; computed on the CPU, so that every device has the same numbers."""
        frequency = 1.0 / self.base ** (torch.arange(0, self.rotated, 2, device="cpu").float() / max(self.rotated, 1))
        angle_TR = torch.outer(torch.arange(self.context, device="cpu").float(), frequency)
        return angle_TR.cos().unsqueeze(1).to(device), angle_TR.sin().unsqueeze(1).to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Rotary":
        """What moves a module moves the tables; what empties it makes them anew."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = fn(torch.empty(0, device="cpu") if self._tables is None else self._tables[0]).device
        if device.type == "meta":
            self._tables = None
        elif self._tables is None or self._tables[0].device != device:
            self._tables = self._computed(device)
        return self

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin on this device, kept until another one is asked for."""
        if self._tables is not None and self._tables[0].device == device:
            return self._tables
        with torch.inference_mode(False):  # What training uses later must be no inference tensor.
            made = self._computed(device)
        # Not what stands for it while a graph is traced or torch.func transforms a function.
        transformed = not torch.compiler.is_compiling() and is_functorch_wrapped_tensor(made[0])
        if type(made[0]) is Tensor and not transformed:
            self._tables = made
        return made

    def at(self, positions: Tensor | slice, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin at positions (B, T) or at a slice of them, (..., 1, half)."""
        cosine, sine = self.tables(device)
        return cosine[positions], sine[positions]

    def forward(self, x_BTHE: Tensor, angles: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x rotated to the positions that `angles` are of; None: from 0 on."""
        half = self.rotated // 2
        angles = angles or self.at(slice(x_BTHE.shape[1]), x_BTHE.device)
        cosine, sine = (table.to(x_BTHE.dtype) for table in angles)
        first, second, rest = x_BTHE[..., :half], x_BTHE[..., half : 2 * half], x_BTHE[..., 2 * half :]
        return torch.cat((first * cosine - second * sine, first * sine + second * cosine, rest), dim=-1)


class Slots(NamedTuple):
    """Where new tokens stand, and what they attend to, in cached decoding or beside padding."""

    angles: tuple[Tensor, Tensor]
    """cos and sin of the tokens' positions."""
    visible: Tensor | None
    """Which keys each token attends to, (B or 1, 1, T, keys); None: those up to its own."""


Remember = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From the keys and values of new tokens, (B, H, T, E) each, to those of all tokens that these may attend to."""


class KeyValues(NamedTuple):
    """An attention's memory in cached decoding, (B, H, context, E) each."""

    keys: Tensor
    values: Tensor

    def extend(self, first: int, k_BHTE: Tensor, v_BHTE: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values up to the new ones, which are written into the slots from `first` on of every row."""
        last = first + k_BHTE.shape[2]
        self.keys[:, :, first:last] = k_BHTE
        self.values[:, :, first:last] = v_BHTE
        return self.keys[:, :, :last], self.values[:, :, :last]


class Attention(Initialised):
    """Multi-head causal attention without biases; q and k are normed per head after the rotation.

    `out_norm` is where the weight of a norm of the result starts; None: the result is as it is. What is `told` is added
    to the input, as a looped GPT does.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        rotary: Rotary,
        *,
        qk_norm: bool,
        out_norm: float | None,
        std: float,
        out_std: float,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.std, self.out_std = heads, head_dim, std, out_std
        self.query = plain_linear(dim, heads * head_dim)
        self.key = plain_linear(dim, heads * head_dim)
        self.value = plain_linear(dim, heads * head_dim)
        self.out = plain_linear(heads * head_dim, dim)
        self.query_norm = RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.key_norm = RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.out_norm = nn.Identity() if out_norm is None else RMSNorm(dim, init=out_norm)
        # The tables are the model's: held in a tuple, they are not registered once per layer.
        self._rotary = (rotary,)

    def start(self, name: str, parameter: Tensor, generator: Generator) -> None:
        parameter.normal_(0.0, self.out_std if name == "out.weight" else self.std, generator=generator)

    def forward(
        self,
        c_BTD: Float[Tensor, "B T D"],
        remember: Remember | None = None,
        slots: Slots | None = None,
        told: Float[Tensor, "B T D"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        c_BTD = c_BTD if told is None else c_BTD + told
        heads = (*c_BTD.shape[:2], self.heads, self.head_dim)
        rotary, angles = self._rotary[0], None if slots is None else slots.angles
        q_BHTE = self.query_norm(rotary(self.query(c_BTD).view(heads), angles)).transpose(1, 2)
        k_BHTE = self.key_norm(rotary(self.key(c_BTD).view(heads), angles)).transpose(1, 2)
        v_BHTE = self.value(c_BTD).view(heads).transpose(1, 2)
        if remember is not None:
            k_BHTE, v_BHTE = remember(k_BHTE, v_BHTE)
        visible = None if slots is None else slots.visible
        # Of one token the kernel would take the first key for its own.
        causal = visible is None and (slots is None or c_BTD.shape[1] > 1)
        y_BHTE = F.scaled_dot_product_attention(q_BHTE, k_BHTE, v_BHTE, attn_mask=visible, is_causal=causal)
        return self.out_norm(self.out(y_BHTE.transpose(1, 2).flatten(2)))  # type: ignore[no-any-return]


class SwiGLU(Initialised):
    """W_o (silu(W_1 c) * W_2 c) of hidden width F; `out_norm` as in `Attention`."""

    def __init__(self, dim: int, hidden: int, *, out_norm: float | None, std: float, out_std: float) -> None:
        super().__init__()
        self.std, self.out_std = std, out_std
        self.gate = plain_linear(dim, hidden)
        self.up = plain_linear(dim, hidden)
        self.out = plain_linear(hidden, dim)
        self.out_norm = nn.Identity() if out_norm is None else RMSNorm(dim, init=out_norm)

    def start(self, name: str, parameter: Tensor, generator: Generator) -> None:
        parameter.normal_(0.0, self.out_std if name == "out.weight" else self.std, generator=generator)

    def forward(self, c_BTD: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.out_norm(self.out(F.silu(self.gate(c_BTD)) * self.up(c_BTD)))  # type: ignore[no-any-return]

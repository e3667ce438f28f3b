"""Linear maps and the keyed initialisation that every parameter of the library goes through.

A parameter is drawn from a generator keyed by (seed, its full name): what two models share under the same name
starts bit-equal, whatever else either of them contains.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from deepdelta.ops import accumulation_dtype, without_autocast


class Initialised(nn.Module, ABC):
    """A module that says how each of its own parameters starts."""

    @abstractmethod
    def start(self, name: str, parameter: Tensor, generator: Generator) -> None:
        """Fill `parameter`, this module's own `name` (or that of a plain linear map in it), drawing from `generator`
        alone."""

    def own_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What `start` fills: the module's own parameters, and those of children that are torch's own nn.Linear."""
        yield from self.named_parameters(recurse=False)
        for name, child in self.named_children():
            if type(child) is nn.Linear:
                yield from child.named_parameters(name)


def keyed_generator(seed: int, name: str) -> Generator:
    """A CPU generator whose numbers depend on the seed and the name, and on nothing else."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@torch.no_grad()
def initialise(module: nn.Module, seed: int, prefix: str = "") -> None:
    """Start every parameter of `module` whose owner is `Initialised`; others (a user's own layers) stay as they are.

    Parameters on the device 'meta' have no values to start.
    """
    for owner_name, owner in module.named_modules(prefix=prefix):
        if isinstance(owner, Initialised):
            for name, parameter in owner.own_parameters():
                if parameter.is_meta:
                    continue
                value = torch.empty_like(parameter, device="cpu")
                owner.start(name, value, keyed_generator(seed, f"{owner_name}.{name}"))
                parameter.copy_(value)


class Linear(nn.Linear, Initialised):
    """y = W x + b, W drawn N(0, std^2), b starting at `bias` (None: no bias).

    `precise` computes in fp32 (fp64 for fp64 weights) whatever autocast says: for gate logits. It is an nn.Linear, so
    LoRA and torchao take it for one; torch's quantize_dynamic takes only nn.Linear itself (`plain_linear`), and so
    leaves gates and targets as they are.
    """

    def __init__(
        self, inputs: int, outputs: int, *, std: float, bias: float | None = None, precise: bool = False
    ) -> None:
        # Not nn.Linear's own, which draws a start from torch's generator.
        super(nn.Linear, self).__init__()
        self.in_features, self.out_features = inputs, outputs
        self.std, self.bias_start, self.precise = std, bias, precise
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.register_parameter("bias", None if bias is None else nn.Parameter(torch.empty(outputs)))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew from a seed drawn of torch's generator, for tools that ask every layer to."""
        initialise(self, int(torch.randint(2**62, (), device="cpu")))

    def start(self, name: str, parameter: Tensor, generator: Generator) -> None:
        if name == "weight":
            parameter.normal_(0.0, self.std, generator=generator)
        else:
            assert self.bias_start is not None
            parameter.fill_(self.bias_start)

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        return (precise_linear if self.precise else F.linear)(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, bias={self.bias is not None}, std={self.std:.4g}"


def plain_linear(inputs: int, outputs: int) -> nn.Linear:
    """torch's own nn.Linear without a bias. Its owner's `start` fills W: torch's generator is not touched."""
    return nn.Linear(inputs, outputs, bias=False, device="meta").to_empty(device=torch.get_default_device())


def precise_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """W x + b in fp32 (fp64 for fp64 weights) whatever autocast says."""
    wide = accumulation_dtype(weight.dtype)
    with without_autocast(x.device):
        return F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))


class RMSNorm(Initialised):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (reference: eps 1e-5), the weight starting at `init`."""

    def __init__(self, dim: int, eps: float = 1e-5, init: float = 1.0) -> None:
        super().__init__()
        self.eps, self.init = eps, init
        self.weight = nn.Parameter(torch.empty(dim))

    def start(self, name: str, parameter: Tensor, generator: Generator) -> None:
        parameter.fill_(self.init)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        if torch.compiler.is_exporting():
            # Written out: torch's own ties the program that it is exported in to more than one token.
            wide = x.to(accumulation_dtype(x.dtype))
            scaled = wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()
            return scaled.to(x.dtype) * self.weight.to(x.dtype)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)

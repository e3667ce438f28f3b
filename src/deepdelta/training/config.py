"""Everything that decides the numbers of a training run."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from annotated_types import Gt, Interval
from pydantic import ConfigDict

from deepdelta.config import LARGEST, Count, Plain, Settings, Threads, from_plain, merged, to_plain
from deepdelta.data import DataConfig
from deepdelta.errors import UserError
from deepdelta.models import GPTConfig
from deepdelta.nn import Backend, Plan, ResidualConfig
from deepdelta.nn.presets import PRESETS, overlaid

Whole = Annotated[int, Interval(ge=0, le=LARGEST)]
Share = Annotated[float, Interval(ge=0, le=1)]
Decay = Annotated[float, Interval(ge=0, lt=1)]
Positive = Annotated[float, Gt(0)]


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """A run is a pure function of this, the corpus, the versions, the machine and the number of threads."""

    __pydantic_config__ = ConfigDict(strict=True, allow_inf_nan=False)

    model: GPTConfig = field(default_factory=GPTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    seed: Whole = 0
    """Draws the parameters (with their names) and the batches (with the step)."""
    init_offset: Whole = 0
    """Added to the seed for the parameters alone: the same batches from another start, as a noise floor needs it."""
    steps: Count = 1000
    batch_size: Count = 8
    """Sequences per micro-batch, over all processes."""
    accumulate: Count = 1
    """Micro-batches per step."""
    lr: Positive | None = None
    """Peak learning rate, reached after `warmup` steps; `schedule` says what follows. None: `tuned_rate`, what the
    studies found for such a residual."""
    final_lr: Share = 0.1
    """The share of `lr` that the last step has."""
    warmup: Whole = 100
    schedule: Literal["cosine", "constant"] = "cosine"
    """cosine: down to the last step, so that a run extended by more steps goes back up. constant: `lr` up to the
    `cooldown`, so that a run without one, extended, is the run that had those steps from the start."""
    cooldown: int = 0
    """Of a constant rate: the last steps, over which it falls linearly to `lr * final_lr`."""
    embedding_rate: Positive = 1.0
    """The learning rate of embeddings, as a multiple of `lr`."""
    exempt_rate: Positive = 1.0
    """That of gates, biases, norms and reads."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices, at a rate for AdamW (its update has the size of AdamW's); AdamW for the rest."""
    momentum: Decay = 0.95
    """Of Muon."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Of AdamW."""
    weight_decay: Annotated[float, Interval(ge=0, le=1e6)] = 0.1
    """On matrices and embeddings; never on gates, biases, norms and reads."""
    clip: Positive = 1.0
    """Largest gradient norm."""
    not_finite: Count = 3
    """A step whose loss or gradient is not finite changes nothing and is counted; so many in a row stop the run."""
    average: Literal["none", "ema", "last"] = "none"
    """Kept beside the weights, as average.safetensors, and evaluated at the end: their exponential moving average over
    the steps, or their mean after each of the last `average_steps`, of an extended run those since the extension."""
    ema_decay: Decay = 0.999
    """Of the moving average: what is left of it in each step."""
    average_steps: Count = 100
    eval_every: Count = 250
    """Steps between validations on `eval_tokens`."""
    eval_tokens: Count = 65536
    """Validation tokens of those, in whole windows evenly spread over the split."""
    final_eval_tokens: Count | None = None
    """Validation tokens of the final number after the last step, spread likewise; None is the whole split."""
    checkpoint_every: Count = 250
    keep_last: Count = 1
    """Checkpoints that are kept: where the last is damaged, the same command goes on from the one before it."""
    keep_best: bool = False
    """Keep the checkpoint with the lowest validation loss too, as best.safetensors."""
    async_save: bool = True
    """Write checkpoints on a thread, from a copy in host memory (12 bytes a parameter), while steps go on; without it
    steps wait for the disk. Not a bit of the run depends on it."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on a CUDA device that has it, else fp32."""
    backend: Backend = "auto"
    """What does the rewrites: reference (plain PyTorch), fused (numba on the CPU, Triton on CUDA), or auto."""
    memory: Plan = "replay"
    """What is saved of the state for the backward pass: save (every state), replay (some, the others made again, bit
    for bit), recover (the last, the others made backwards). Compiled code decides by itself."""
    recompute: bool = False
    """Make the activations of a layer again in the backward pass instead of keeping them: less memory, about a third
    more time."""
    compile: bool = False
    """torch.compile the model."""
    parallel: Literal["ddp", "fsdp", "tensor"] = "ddp"
    """How processes that torchrun has started share a run: ddp, each has the whole model and some rows of every batch;
    fsdp, weights, gradients and optimiser state are shared too, and whole a layer at a time; tensor, each has some
    heads and some of the MLP's hidden features, the rest of the model, and the whole batch."""
    threads: Threads | None = None
    """CPU threads; None keeps torch's choice."""
    draw_repeats: bool = False
    """Of a looped GPT: each step repeats the layers between once and `model.repeats` times, drawn from the seed and the
    step, all numbers alike; validations repeat them `model.repeats` times."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cooldown and self.schedule != "constant":
            raise UserError(f"cooldown must be 0 where the schedule is not 'constant', got {self.cooldown}.")
        if self.draw_repeats and self.model.repeats is None:
            raise UserError("draw_repeats is for a looped GPT: set model.repeats, the most that is drawn.")
        if self.draw_repeats and self.compile:
            raise UserError("draw_repeats and compile do not go together: every number would be compiled anew.")
        for name, owner, needed in (
            ("ema_decay", "average", "ema"),
            ("average_steps", "average", "last"),
            ("momentum", "optimizer", "muon"),
        ):
            if getattr(self, owner) != needed and (value := getattr(self, name)) != getattr(TrainConfig, name):
                raise UserError(
                    f"{name}={value} has no effect where {owner} is not '{needed}'; set that, or leave it out."
                )
        if not 0 <= self.cooldown <= max(0, self.steps - self.warmup):
            raise UserError(
                f"cooldown must lie in [0, {max(0, self.steps - self.warmup)}], the steps after the warmup; got "
                f"{self.cooldown}."
            )

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        if self.lr is not None:
            return self.lr
        # Nothing was chosen for rivals: what the plain residual takes.
        return tuned_rate(self.model.residual if self.model.rival is None else PRESETS["additive"], self.model.dim)

    @property
    def warning(self) -> str | None:
        """What is likely to be a mistake in these settings."""
        if self.warmup < self.steps:
            return None
        return (
            f"Warning: warmup={self.warmup} reaches steps={self.steps}, so training ends while the learning rate still "
            f"rises; set warmup to {self.steps // 10}, or more steps."
        )

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.accumulate * self.model.context

    def stretched(self, steps: int) -> "TrainConfig":
        """The same schedule over another number of steps: warm-up and cooldown keep their share."""
        if steps == self.steps:
            return self
        warmup = round(self.warmup * steps / self.steps)
        cooldown = self.cooldown * steps // self.steps
        return replace(self, steps=steps, warmup=max(min(1, self.warmup), warmup), cooldown=cooldown)


def tuned_rate(residual: ResidualConfig, dim: int) -> float:
    """The learning rate that the studies chose at d 64 for the nearest residual, times 64 / dim.

    Found by `headline`, `published` and `control-matrix` at d 64; `sizes` and `larger` found that rates fall about so
    from d 32 to d 96. Elsewhere it is a place to start from, no result.
    """
    if residual.compression == "token":
        at_64 = 9e-3
    elif residual.expansion == "embedding_conv" and not residual.writes_branch:
        at_64 = 2.8e-2
    else:
        at_64 = 5e-3
    return at_64 * 64 / dim


def settings_over(base: Mapping[str, Any], layer: Mapping[str, Any]) -> Plain:
    """Plain settings of a run with others laid over them (`overlaid`); `preset` stands for `model.residual.preset`."""
    rest = dict(layer)
    if "preset" in rest:
        rest = merged({"model": {"residual": {"preset": rest.pop("preset")}}}, rest)
    return overlaid(base, rest)


def run_settings(*layers: Mapping[str, Any], where: str) -> TrainConfig:
    """The settings of a run that plain data from several places give, a later one laid over those before.

    Raises:
        UserError: naming `where`, for what no run can have.
    """
    plain = {"model": {"residual": to_plain(GPTConfig().residual)}}
    for layer in layers:
        plain = settings_over(plain, layer)
    return from_plain(TrainConfig, plain, where=where)

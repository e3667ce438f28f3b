"""The command plan."""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from deepdelta.planning import COMPUTE, CONVOLUTION, GPUS, MEMORY, USABLE, Layout, gpu_named, outlook
from deepdelta.training.config import run_settings
from deepdelta.training.recipes import PUBLISHED, recipe


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a whole run would take on GPUs: memory of each, layout, tokens per second, hours; nothing is computed."""

    recipe: str = "small"
    """small and medium, the authors'; large, xl, 3b, 7b."""
    preset: str = "ddl"
    """A named residual, as docs/settings.md lists them."""
    gpus: int = 1
    gpu: str = "h100"
    """a100, h100, h200 or b200."""

    def __call__(self) -> None:
        gpu = gpu_named(self.gpu)
        config = run_settings(recipe(self.recipe), {"preset": self.preset}, where="")
        found = outlook(config, gpu, self.gpus)
        layout, model = found.layout, config.model
        batches = f"micro-batches of {layout.batch_size} x {model.context}, {layout.accumulate} a step"
        rows = {
            "parameters": f"{found.parameters:,} ({model.stack}, d = {model.dim})",
            "layout": f"{layout.name}, {batches}",
            "state of a device": f"{layout.state / 1e9:,.2f} GB",
            "activations of a device": f"{layout.activations / 1e9:,.2f} GB",
            "optimiser's part of the state": f"{found.optimizer_bytes / 1e9:,.2f} GB, all shards together",
            "FLOPs per token": f"{found.flops_per_token / 1e9:,.2f} billion in products, forward and backward",
            "bytes per token": f"{found.bytes_per_token / 1e6:,.1f} MB by all else",
            "tokens per second": f"{found.tokens_per_second:,.0f}",
            "hours": f"{found.hours:,.1f} for {config.steps:,} steps of {config.tokens_per_step:,} tokens",
        }
        if (theirs := PUBLISHED.get((self.recipe, self.preset))) is not None:
            rows["the authors' run"] = f"validation loss {theirs.loss:.4f}, 1-shot {theirs.score:.2f}"
            if (speed := theirs.tokens_per_second) is not None:
                ours = outlook(config, GPUS["h200"], 4).tokens_per_second
                rows["their tokens per second"] = (
                    f"{speed:,.0f} on 4 h200; as planned {ours:,.0f} ({ours / speed - 1:+.1%})"
                )
        table = Table("what", "expected", title=f"{self.recipe}, {self.preset}, on {self.gpus} {self.gpu}")
        for row in rows.items():
            table.add_row(*row)
        Console().print(table)
        print(
            f"""\
Assumed of a {self.gpu}: {gpu.peak / 1e12:,.0f} TFLOP/s of bf16, {gpu.bandwidth / 1e12:.2f} TB/s, {gpu.memory / 1e9:.0f} GB, of which {USABLE:.0%} are used.
Time: {COMPUTE:.0%} of the first for products, {MEMORY:.0%} of the second for the bytes of all other operators one by one,
{CONVOLUTION:.0%} of it for convolutions; communication hidden. The three shares are fitted on the 11 speeds that the authors
published, and give them within -10 % and +18 %. Activations as plain PyTorch holds them: +4 to +5 % against our peaks.
No speed of a GPU has been measured here (docs/planning.md).
It trains with:
{self.command(layout)}"""  # noqa: E501
        )

    def command(self, layout: Layout) -> str:
        """What trains so."""
        start = f"torchrun --standalone --nproc-per-node {self.gpus} -m deepdelta" if self.gpus > 1 else "deepdelta"
        # The micro-batches of a command are those of all processes.
        options = [f"--recipe {self.recipe} --preset {self.preset}", f"--batch-size {layout.batch_size * self.gpus}"]
        options.append(f"--accumulate {layout.accumulate}")
        if self.gpus > 1:
            options.append(f"--parallel {'ddp' if layout.name == 'DDP' else 'fsdp'}")
        if layout.name == "FSDP, checkpointed layers":
            options.append("--recompute")
        return f"{start} train RUN {' '.join(options)}"

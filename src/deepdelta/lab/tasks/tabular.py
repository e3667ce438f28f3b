"""Regression on a table: scikit-learn's diabetes data and a residual MLP, the plainest example.

442 patients, 10 measurements each, and the progression of the disease a year later.
Shapes: B rows, F features, D width.
"""

from dataclasses import dataclass, field
from typing import Annotated, NamedTuple

import torch
from annotated_types import Ge, Interval
from jaxtyping import Float
from sklearn.datasets import load_diabetes
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from deepdelta.config import Count
from deepdelta.errors import UserError
from deepdelta.lab.tasks.fitting import CONDITIONS, AdamW, fit, seeded, stream_of
from deepdelta.lab.tasks.task import Progress, Task
from deepdelta.nn import ResidualConfig
from deepdelta.releases import check_tested
from deepdelta.training.config import Positive


@dataclass(frozen=True, kw_only=True)
class TabularSettings(AdamW):
    """Sizes of the residual MLP and the recipe; a condition changes `residual` alone."""

    residual: ResidualConfig = field(default_factory=ResidualConfig)
    depth: Count = 6
    """Residuals."""
    dim: Count = 32
    dropout: Annotated[float, Interval(ge=0, lt=1)] = 0.5
    """On the hidden layer of every branch."""
    train_rows: Annotated[int, Ge(2)] = 309
    """The other rows are the test set."""
    steps: Count = 150
    batch_size: Count = 64
    lr: Positive = 1e-3
    weight_decay: float = 0.1


class Split(NamedTuple):
    """Standardised by the mean and the standard deviation of the training rows."""

    train_x: Float[Tensor, "B F"]
    train_y: Float[Tensor, " B"]
    test_x: Float[Tensor, "C F"]
    test_y: Float[Tensor, " C"]


def split_rows(train_rows: int, seed: int) -> Split:
    """The table in two disjoint parts.

    Raises:
        UserError: no row is left to test on.
    """
    check_tested("scikit_learn")
    x, y = (torch.from_numpy(array) for array in load_diabetes(return_X_y=True, scaled=False))
    if train_rows >= len(y):
        raise UserError(f"train_rows must leave rows to test on, so be less than {len(y)}, got {train_rows}.")
    order = torch.randperm(len(y), generator=Generator().manual_seed(seed))
    train, test = order[:train_rows], order[train_rows:]
    x, y = ((data - data[train].mean(0)) / data[train].std(0) for data in (x, y))
    return Split(x[train].float(), y[train].float(), x[test].float(), y[test].float())


class ResidualMLP(nn.Module):
    """Linear map in, `depth` residuals with a hidden layer each, linear map out."""

    def __init__(self, features: int, settings: TabularSettings, seed: int) -> None:
        super().__init__()
        dim = settings.dim
        self.inward = nn.Linear(features, dim)
        self.stream = stream_of(settings.residual, dim, seed)
        self.blocks = nn.Sequential(
            *(
                self.stream.wrap(
                    nn.Sequential(
                        nn.Linear(dim, 2 * dim), nn.GELU(), nn.Dropout(settings.dropout), nn.Linear(2 * dim, dim)
                    )
                )
                for _ in range(settings.depth)
            )
        )
        self.outward = nn.Sequential(nn.RMSNorm(dim), nn.Linear(dim, 1))

    def forward(self, x: Float[Tensor, "B F"]) -> Float[Tensor, " B"]:
        y: Tensor = self.outward(self.stream.reduce(self.blocks(self.stream.expand(self.inward(x)))))
        return y.squeeze(-1)


def run(settings: TabularSettings, seed: int, progress: Progress) -> dict[str, float]:
    """Fit the mean squared error on the training rows.

    Returns:
        rmse: root mean squared error on the test rows, in standard deviations of the training rows' target;
        train_rmse: the same on the training rows.
    """
    data = split_rows(settings.train_rows, seed)
    generator = Generator().manual_seed(seed)
    with seeded(seed):
        model = ResidualMLP(data.train_x.shape[1], settings, seed)

        def loss_of(step: int) -> Tensor:
            rows = torch.randint(settings.train_rows, (settings.batch_size,), generator=generator)
            return F.mse_loss(model(data.train_x[rows]), data.train_y[rows])

        fit(model, loss_of, settings, progress)
    with torch.no_grad():
        return {
            "rmse": F.mse_loss(model(data.test_x), data.test_y).sqrt().item(),
            "train_rmse": F.mse_loss(model(data.train_x), data.train_y).sqrt().item(),
        }


TASK = Task(
    settings=TabularSettings(),
    conditions=CONDITIONS,
    baseline="additive",
    primary="rmse",
    unit="standard deviations of the target",
    higher_is_better=False,
    run=run,
)

"""What residuals move, counted."""

from dataclasses import replace

import torch
from torch import nn

from deepdelta.lab.bench import SUITES, subjects, suites
from deepdelta.lab.measure.traffic import moved_bytes, numbers_per_token


def test_what_residuals_move_by_hand() -> None:
    class Branch(nn.Linear):
        pass

    class Plain(nn.Module):
        def __init__(self, layers: int) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 8)
            self.branches = nn.ModuleList(Branch(8, 8) for _ in range(2 * layers))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embedding(ids)
            for branch in self.branches:
                x = x + branch(x.transpose(0, 1)).transpose(0, 1)
            return x @ self.embedding.weight.t()

    # x and h are read and their sum is written; neither the branch, the views, the embedding nor the head count.
    assert numbers_per_token(Plain, (Branch,), vocab_size=11, layers=3, tokens=6) == 3 * 8
    group = replace(SUITES["peers"].groups[0], dim=32, context=16)
    cpu = torch.device("cpu")
    for case, channels, gates in ((suites.ADDITIVE_FUSED, 1, 0), (suites.SCALAR[1], 1, 2), (suites.DDL[1], 4, 5)):
        # X and h in, X' and c' out, as the operator's bound has it; and c is read again for gate and target.
        bound = subjects.step_bytes(channels, 32, 4)[0] / 4 + (32 if gates else 0)
        moved = 32 * subjects.moved(group, case, cpu)
        # Logits of gate and target are written and read, the saved numbers of a token written.
        assert bound <= moved <= bound + 3 * (channels + 2) + 2 * gates
    # Eager PyTorch's addition and RMSNorm, of whose steps every one reads and writes.
    assert subjects.moved(group, suites.ADDITIVE, cpu) > 2 * subjects.moved(group, suites.ADDITIVE_FUSED, cpu)


def test_what_a_training_step_moves_by_hand() -> None:
    x_NI, weight_IO = torch.randn(5, 3), torch.randn(3, 4, requires_grad=True)
    optimizer = torch.optim.AdamW([weight_IO], foreach=False, fused=True)

    def step() -> None:
        (x_NI @ weight_IO).backward(torch.ones(5, 4))
        optimizer.step()
        weight_IO.grad = None

    step()
    x, weight, y = 5 * 3, 3 * 4, 5 * 4
    product, ones, gradient = x + weight + y, y, x + y + weight
    # The count of steps is read, added to in place and read by the fused step, which reads the parameter, its gradient
    # and both moments, and writes them, by its signature the gradient too.
    counted, update = 2 + 1, 4 * weight + 4 * weight
    assert moved_bytes(step) == 4 * (product + ones + gradient + counted + update)

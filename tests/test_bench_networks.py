"""The small networks of the benchmark: what is timed as plain is the additive stream, number for number."""

from dataclasses import replace

import pytest
import torch

from deepdelta import PRESETS, UserError
from deepdelta.lab.bench.networks import NETWORKS, NetworkName, SmallNetwork, images_and_labels
from deepdelta.lab.bench.suites import NETWORKS as SUITE


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_plain_network_is_the_additive_stream(kind: NetworkName) -> None:
    images, labels = images_and_labels(3)
    assert images.shape == (3, 1, 8, 8) and labels.shape == (3,)
    found = []
    for residual in (None, PRESETS["additive"]):
        torch.manual_seed(0)
        network = SmallNetwork(kind, 8, 2, residual).double()
        logits = network(images.double())
        torch.nn.functional.cross_entropy(logits, labels).backward()
        found.append((logits, [p.grad for p in network.inward.parameters()]))
    torch.testing.assert_close(found[0], found[1])


def test_a_network_belongs_to_its_work_alone() -> None:
    group = SUITE.groups[0]
    with pytest.raises(UserError, match="the work 'network' and no other names a network, got None"):
        replace(group, network=None)
    with pytest.raises(UserError, match="got mlp"):
        replace(group, work="training", baseline=group.cases[0].name, bars=())
    with pytest.raises(UserError, match="network is measured uncompiled"):
        replace(group, compiled=True)

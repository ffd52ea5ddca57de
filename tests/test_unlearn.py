"""What unlearning does once and only once."""

import pytest
import torch_pruning

from conftest import make_images, make_net
from fedunlearn.channels.plan import Cut
from fedunlearn.data.partition import partition
from fedunlearn.federation.federation import Federation
from fedunlearn.federation.local import LocalEngine
from fedunlearn.federation.rounds import Repair
from fedunlearn.training.sgd import Training
from fedunlearn.unlearn import unlearn


@pytest.mark.parametrize(("jointly", "steps"), [(False, 2), (True, 1)])
def test_the_graph_of_the_model_is_followed_once_for_each_pruning_step(monkeypatch, jointly, steps):
    followed = []
    build = torch_pruning.DependencyGraph.build_dependency

    def counted(graph, *arguments, **options):
        followed.append(graph)
        return build(graph, *arguments, **options)

    monkeypatch.setattr(torch_pruning.DependencyGraph, "build_dependency", counted)
    federation = Federation(LocalEngine(partition(make_images(80, 4), by="iid", clients=2, seed=0)))
    repair = Repair(Training(lr=0.05, batch_size=8), rounds=1)
    unlearn(make_net(classes=4), federation, forget=[0, 2], cut=Cut(0.3), repair=repair, jointly=jointly)
    assert len(followed) == steps

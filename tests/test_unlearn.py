"""What unlearning does once and only once, and how it repairs."""

import pytest
import torch
import torch_pruning

from conftest import make_images, make_net
from fedunlearn.channels.plan import Cut
from fedunlearn.data.partition import partition
from fedunlearn.errors import FederationError
from fedunlearn.federation.averaging import Server
from fedunlearn.federation.federation import Federation
from fedunlearn.federation.local import LocalEngine
from fedunlearn.federation.rounds import Repair, train_rounds
from fedunlearn.training.sgd import Training, one_cycle
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


def test_a_federation_that_leaves_classes_out_already_is_refused():
    federation = Federation(LocalEngine(partition(make_images(80, 4), by="iid", clients=2, seed=0)), exclude=(3,))
    with pytest.raises(FederationError, match=r"unlearn\(federation\) leaves out the classes \[3\], whose images"):
        unlearn(make_net(classes=4), federation, forget=2, cut=Cut(0.3), repair=Repair(Training(lr=0.05), rounds=1))


def test_the_repair_is_training_of_the_pruned_model_on_the_kept_classes_by_the_server_it_names():
    clients = partition(make_images(80, 4), by="iid", clients=2, seed=0)
    server, training = Server(one_cycle, 0.5), Training(lr=0.05, batch_size=8)
    repair = Repair(training, rounds=3, batch_norm=False, server=server)
    done = unlearn(make_net(classes=4), Federation(LocalEngine(clients)), forget=2, cut=Cut(0.3), repair=repair)
    kept = Federation(LocalEngine(clients)).keeping(exclude=(2,))
    by_hand = train_rounds(done.pruned, kept, training, rounds=3, phase="repair", server=server)
    for name, tensor in by_hand.module.state_dict().items():
        assert torch.equal(done.repaired.module.state_dict()[name], tensor)
    plain = unlearn(
        make_net(classes=4), Federation(LocalEngine(clients)), forget=2, cut=Cut(0.3), repair=Repair(training, rounds=3)
    )
    assert not torch.equal(plain.repaired.module.get_parameter("8.weight"), by_hand.module.get_parameter("8.weight"))

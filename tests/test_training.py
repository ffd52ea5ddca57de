"""What training takes from torch and scikit-learn: their own results, without all that they import for them."""

import copy
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.flop_counter import sdpa_backward_flop_count as sdpa_backward
from torch.utils.flop_counter import sdpa_flop_count as sdpa

from conftest import job, make_images, make_net, normalised
from fedunlearn.channels.plan import Classifier, Cut
from fedunlearn.data.partition import hold_out, partition
from fedunlearn.data.readers import read_digits
from fedunlearn.errors import RecipeError
from fedunlearn.federation.ask import ask
from fedunlearn.federation.averaging import Server, fedavg
from fedunlearn.federation.federation import Federation
from fedunlearn.federation.jobs import ClientData, Job, handle
from fedunlearn.federation.journal import Journal
from fedunlearn.federation.ledger import flops_per_image
from fedunlearn.federation.local import LocalEngine
from fedunlearn.federation.rounds import Repair, Watch, train_rounds
from fedunlearn.federation.tasks import Train
from fedunlearn.models import MODELS, build_model
from fedunlearn.training.sgd import Sgd, Training, one_cycle, train_locally
from fedunlearn.unlearn import unlearn


class Unusual(nn.Module):
    """A user's model: functional layers, matrix products of all kinds, a part without gradients."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 1, 3, 3))
        self.strided = nn.Conv2d(8, 8, 3, stride=2)
        self.upwards = nn.ConvTranspose2d(8, 4, 2)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.weight = nn.Parameter(torch.randn(5, 4))
        self.bias = nn.Parameter(torch.zeros(5))
        self.fixed = nn.Linear(5, 5).requires_grad_(False)

    def forward(self, images):
        maps = self.upwards(self.strided(F.relu(F.conv2d(images, self.kernel, padding=1, dilation=2))))
        rows = maps.flatten(2).transpose(1, 2)
        rows = self.attention(rows, rows, rows, need_weights=False)[0]
        rows = rows + F.scaled_dot_product_attention(rows, rows, rows)
        rows = torch.einsum("bnc,bmc->bnm", rows, rows) @ rows
        pooled = F.linear(rows.mean(1), self.weight, self.bias)
        with torch.inference_mode():
            known = self.fixed(pooled.detach())
        return pooled + pooled @ (pooled.T @ pooled) + self.fixed(pooled) + known.clone().sum().item()


def counted_by_torch(model, shape):
    """Return the oracle's count for an image: forward, and forward with backward."""
    copied, images = copy.deepcopy(model).train(), torch.zeros((2, *shape))
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, lambda q, k, v, *rest, **how: sdpa(q, k, v)
    backwards = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    known = dict([attention, (backwards, lambda grad, q, k, v, *rest, **how: sdpa_backward(grad, q, k, v))])
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        logits = copied(images)
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        F.cross_entropy(logits, torch.zeros(2, dtype=torch.int64)).backward()
    return forward // 2, (forward + counter.get_total_flops()) // 2


@pytest.mark.parametrize("name", MODELS)
def test_operations_are_counted_as_torch_counts_them(name):
    model = build_model(name, classes=10, colours=3)
    counts = flops_per_image(model, (3, 32, 32))
    assert counts == counted_by_torch(model, (3, 32, 32))
    assert 0 < counts[0] < counts[1] < 3.01 * counts[0]


def test_operations_of_functional_layers_and_matrix_products_are_counted_too():
    model = Unusual()
    assert flops_per_image(model, (1, 8, 8)) == counted_by_torch(model, (1, 8, 8))


@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "fused": True},
        {"momentum": 0.0, "weight_decay": 5e-4, "fused": True},
        {"momentum": 0.9},
    ],
    ids=["as clients train", "without momentum", "as relearning trains"],
)
def test_steps_are_those_of_torchs_sgd_to_the_bit(settings):
    ours, theirs = make_net(seed=1), make_net(seed=1)
    for net in (ours, theirs):
        net[0].bias.requires_grad_(False)
    mine, other = Sgd(ours.parameters(), lr=0.1, **settings), torch.optim.SGD(theirs.parameters(), lr=0.1, **settings)
    draw = torch.Generator().manual_seed(0)
    for _ in range(6):
        images, labels = torch.randn(8, 1, 8, 8, generator=draw), torch.randint(0, 3, (8,), generator=draw)
        for net, optimiser in ((ours, mine), (theirs, other)):
            F.cross_entropy(net.train()(images), labels).backward()
            optimiser.step()
        mine.zero_grad()
        other.zero_grad()
        assert all(parameter.grad is None for parameter in ours.parameters())
        for name, tensor in theirs.state_dict().items():
            assert ours.state_dict()[name].numpy().tobytes() == tensor.numpy().tobytes(), name


def test_a_client_takes_the_steps_of_nesterov_with_weight_decay():
    """``g + decay * w``, ``v = momentum * v + g``, ``w -= lr * (g + momentum * v)``, over three steps by hand."""
    net, images, velocity = make_net(), make_images(6), None
    slow = copy.deepcopy(net).train()
    weights = list(slow.parameters())
    train_locally(net, images, Training(0.1, 6, 3.0, momentum=0.9, weight_decay=0.01), lr=0.1, draw=torch.Generator())
    for _ in range(3):
        found = torch.autograd.grad(F.cross_entropy(slow(normalised(images)), images.labels), weights)
        steps = [gradient + 0.01 * weight.detach() for gradient, weight in zip(found, weights)]
        velocity = steps if velocity is None else [0.9 * v + step for v, step in zip(velocity, steps)]
        with torch.no_grad():
            for weight, step, v in zip(weights, steps, velocity):
                weight.sub_(0.1 * (step + 0.9 * v))
    for expected, weight in zip(weights, net.parameters()):
        torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-5)


def test_the_rate_rises_in_a_line_over_a_fifth_and_falls_by_a_cosine():
    rates = [one_cycle(round, 10) for round in (0, 1, 5)]
    assert rates == pytest.approx([0.25, 0.75, (1 + math.cos(math.pi * 0.35 / 0.8)) / 2])


def test_a_layer_that_is_skipped_at_first_takes_the_steps_of_torchs_sgd():
    """Layers are dropped at random in training, those of the first steps too."""
    ours, theirs = make_net(seed=1), make_net(seed=1)
    settings = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    mine, other = Sgd(ours.parameters(), fused=True, **settings), torch.optim.SGD(theirs.parameters(), **settings)
    draw = torch.Generator().manual_seed(0)
    for step in range(4):
        images, labels = torch.randn(8, 1, 8, 8, generator=draw), torch.randint(0, 3, (8,), generator=draw)
        for net, optimiser in ((ours, mine), (theirs, other)):
            optimiser.zero_grad()
            F.cross_entropy(net.train()(images), labels).backward()
            if step in (0, 2):
                net[3].weight.grad = net[3].bias.grad = None
            optimiser.step()
        for name, tensor in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], tensor)


def test_the_digits_are_those_of_scikit_learn():
    theirs, mine = load_digits(), read_digits()
    images = np.round(theirs.images * (255 / 16)).astype(np.uint8)
    found = [(bytes(image), label) for part in mine for image, label in zip(part.images.numpy(), part.labels.tolist())]
    assert sorted(found) == sorted((bytes(image), label) for image, label in zip(images, theirs.target.tolist()))
    assert mine.train.classes == tuple(str(name) for name in theirs.target_names)


FRUGAL = """
import sys, torch
from conftest import make_images, make_net
from fedunlearn.data.readers import read_digits
from fedunlearn.federation.ledger import flops_per_image
from fedunlearn.federation.local import LocalEngine
from fedunlearn.federation.rounds import train_rounds
from fedunlearn.training.sgd import Training, train_locally
assert train_locally(make_net(), make_images(9), Training(0.1, 8), lr=0.1, draw=torch.Generator()) == 9
assert flops_per_image(make_net(), (1, 8, 8))[0] > 0
assert len(read_digits().train) > 0
import fedunlearn.cli, fedunlearn.flower.app
UNUSED = ("torch._dynamo", "torch_pruning", "scipy", "sklearn", "jinja2", "matplotlib", "PIL")
print([name for name in UNUSED if name in sys.modules])
"""


def test_training_and_counting_import_none_of_what_they_do_not_use():
    here = Path(__file__).parent  # of conftest, which makes the inputs
    done = subprocess.run([sys.executable, "-c", FRUGAL], cwd=here, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_a_step_with_smoothed_labels_is_that_of_the_formula():
    net, smoothing, lr = make_net(), 0.3, 0.1
    images = make_images(6)
    slow = copy.deepcopy(net).train()
    training = Training(lr=lr, batch_size=6, momentum=0.0, weight_decay=0.0, label_smoothing=smoothing)
    train_locally(net, images, training, lr=lr, draw=torch.Generator())
    log_p = slow(normalised(images)).log_softmax(1)
    target = (1 - smoothing) * F.one_hot(images.labels, 3) + smoothing / 3
    gradients = torch.autograd.grad(-(target * log_p).sum(1).mean(), list(slow.parameters()))
    for trained, before, gradient in zip(net.parameters(), slow.parameters(), gradients, strict=True):
        torch.testing.assert_close(trained, before - lr * gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("every", "rounds", "measured"), [(0, 3, []), (1, 3, [0, 1, 2]), (2, 5, [1, 3, 4])])
def test_validation_accuracy_is_measured_every_so_many_rounds_and_at_the_last(every, rounds, measured):
    shares, held = hold_out(partition(make_images(60), by="iid", clients=2, seed=0), 0.2, seed=0)
    fed = Federation(LocalEngine(shares, validation=held))
    train_rounds(make_net(), fed, Training(lr=0.01), rounds=rounds, watch=Watch(every))
    assert [step.round for step in fed.journal.steps("train") if step.validation is not None] == measured


def test_the_server_s_momentum_is_that_of_the_formula_and_survives_an_interruption():
    fed = Federation(LocalEngine(partition(make_images(60), by="iid", clients=2, seed=0)))
    training, server = Training(lr=0.05, batch_size=8, momentum=0.0), Server(one_cycle, 0.9)
    expected, velocity = make_net(), None
    for round in range(3):
        shares = LocalEngine(partition(make_images(60), by="iid", clients=2, seed=0))
        task = Train(training=training, lr=training.lr * one_cycle(round, 3))
        own = Job(task=task, model=Classifier(expected, (1, 8, 8)), phase="train", round=round)
        average, _ = ask(shares, own, lambda replies: fedavg((reply.tensors, reply.images) for reply in replies))
        before = torch.nn.utils.parameters_to_vector(expected.parameters()).detach()
        expected.load_state_dict(average)
        change = torch.nn.utils.parameters_to_vector(expected.parameters()).detach() - before
        velocity = change if velocity is None else 0.9 * velocity + change
        torch.nn.utils.vector_to_parameters(before + velocity, expected.parameters())
    whole = train_rounds(make_net(), fed, training, rounds=3, server=server)
    for mine, other in zip(whole.module.state_dict().values(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_a_decay_that_takes_the_weights_off_in_a_few_steps_is_refused():
    with pytest.raises(
        RecipeError, match=r"weight_decay=\.\.\.\): lr times weight_decay over 1 - momentum is 0\.2, exp"
    ):
        Training(0.1, momentum=0.9, weight_decay=0.2)
    most = Training(0.1, 1, momentum=0.9, weight_decay=0.1)
    assert most.decays_too_fast(0.1, min_images=10) is None
    assert "is 0.1, expected at most 0.05: with more" in most.decays_too_fast(0.1, min_images=20)


def test_the_server_s_momentum_moves_a_module_that_stands_under_two_names():
    plain, twice = make_net(), make_net()
    twice.add_module("again", nn.Identity())  # so that the state lists the first layer twice
    twice.again.inner = twice[0]
    fed = Federation(LocalEngine(partition(make_images(60), by="iid", clients=2, seed=0)))
    one, two = (
        train_rounds(net, replace(fed, journal=Journal()), Training(0.05, 8), rounds=3, server=Server(momentum=0.9))
        for net in (plain, twice)
    )
    assert torch.equal(one.module[0].weight, two.module[0].weight)


def test_a_killed_training_goes_on_with_the_server_s_velocity(tmp_path):
    engine = LocalEngine(partition(make_images(60), by="iid", clients=2, seed=0))
    training, server = Training(lr=0.05, batch_size=8), Server(momentum=0.5)
    train_rounds(make_net(), Federation(engine, Journal(tmp_path)), training, rounds=2, server=server)
    resumed = train_rounds(make_net(), Federation(engine, Journal(tmp_path)), training, rounds=4, server=server)
    whole = train_rounds(make_net(), Federation(engine), training, rounds=4, server=server)
    assert all(t.equal(whole.module.state_dict()[name]) for name, t in resumed.module.state_dict().items())


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        (lambda at: 1.0, r"Server\(schedule\) failed \(TypeError: .*\): it is called as schedule\(round, rounds\)"),
        *((lambda at, rounds, f=f: f, f"must give numbers above 0, got {f}") for f in (None, 0, -1.0, float("nan"))),
    ],
)
def test_a_schedule_that_gives_no_rates_is_refused_before_any_client_is_asked(schedule, text):
    asked = []

    class Asked(LocalEngine):
        def run(self, job):
            asked.append(job)
            return super().run(job)

    fed = Federation(Asked(partition(make_images(60), by="iid", clients=3)))
    server, training = Server(schedule), Training(lr=0.05, batch_size=8)
    with pytest.raises(RecipeError, match=text):
        train_rounds(make_net(), fed, training, rounds=2, server=server)
    with pytest.raises(RecipeError, match=text):
        unlearn(make_net(), fed, forget=1, cut=Cut(0.3), repair=Repair(training, rounds=2, server=server))
    assert asked == []


@pytest.mark.parametrize("momentum", [-0.1, 1.0, float("nan"), "0.9"])
def test_a_momentum_of_the_server_out_of_range_is_refused(momentum):
    with pytest.raises(RecipeError, match=r"Server\(momentum=\.\.\.\) must be at least 0 and below 1, got"):
        Server(momentum=momentum)


def test_augmentations_of_the_recipe_reach_the_batches():
    def trained(augment):
        task = Train(training=Training(0.1, 30, augment=augment), lr=0.1)
        return handle(job(task, make_net()), make_net(), ClientData("a", make_images(30))).tensors["0.weight"]

    assert not trained(()).equal(trained(("flip",)))

"""Models as users bring them: parts called twice, frozen, shared, kept activations, weights that are computed."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from conftest import classifier, make_images, normalised
from fedunlearn.audits.observe import observe
from fedunlearn.channels.copying import copied
from fedunlearn.data.partition import partition
from fedunlearn.federation.local import LocalEngine
from fedunlearn.federation.rounds import Federation, reestimate
from fedunlearn.run import result
from fedunlearn.run.result import evaluate
from fedunlearn.seeding import generator
from fedunlearn.training.batch_norm import batch_norm_sums

EXAMPLE = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


# Activations that a model keeps on itself


class Keeping(nn.Module):
    """Reads its features from itself, where another thread may have put its own."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x):
        self.kept = {"maps": [F.relu(self.conv(x))]}
        for _ in range(20):  # time for another thread to get in between
            self.kept["maps"].append(self.kept["maps"][-1] * 1.0)
        return self.linear(self.kept["maps"][-1].mean((2, 3)))


class Watcher:
    """Keeps what a hook of its own sees, as programs for heat maps do."""

    def see(self, _module, _inputs, output):
        self.seen = output


def test_a_copy_is_made_of_a_model_that_keeps_activations():
    net, watcher = Keeping(), Watcher()
    net.conv.register_forward_hook(watcher.see)
    out = net(EXAMPLE)
    assert net.kept["maps"][0].grad_fn is not None
    twin = copied(net)
    assert twin.kept["maps"][0].equal(net.kept["maps"][0])
    assert twin.kept["maps"][0].data_ptr() != net.kept["maps"][0].data_ptr()
    assert twin(EXAMPLE).equal(out)
    assert twin.conv.weight is not net.conv.weight


def test_threads_that_evaluate_do_not_share_what_a_model_keeps(monkeypatch):
    torch.manual_seed(0)
    net, images = Keeping(), make_images(1200)
    with torch.no_grad():
        right = net(normalised(images)).argmax(1) == images.labels
    expected = {name: float(right[images.labels == k].double().mean()) for k, name in enumerate(images.classes)}
    monkeypatch.setattr(result, "cores", lambda: 8)
    for _ in range(4):
        assert evaluate(net, images, forget=0)["accuracy"]["per_class"] == pytest.approx(expected)
        assert observe(net, images).logits.argmax(1).eq(images.labels).equal(right)


# Batch normalisation


class FirstNorm(nn.Module):
    """Normalises pixels, each by itself or all alike, before the convolution."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.conv, self.linear = norm, nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        x = self.norm(x.flatten(1)).view_as(x) if isinstance(self.norm, nn.BatchNorm1d) else self.norm(x)
        return self.linear(self.conv(x).relu().mean((2, 3)))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(64), nn.BatchNorm2d(1)])
@pytest.mark.parametrize("clients", [2, 20])
def test_the_first_layer_gets_the_variance_of_all_images_whatever_the_size_of_a_client(norm, clients):
    images = make_images(60)  # three each at twenty clients
    fed = Federation(LocalEngine(partition(images, by="iid", clients=clients)))
    fitted = reestimate(classifier(FirstNorm(norm)), fed).module.norm
    pixels = normalised(images).double().flatten(1 if isinstance(norm, nn.BatchNorm1d) else 0)
    torch.testing.assert_close(fitted.running_mean.double().squeeze(), pixels.mean(0), rtol=1e-5, atol=1e-5)
    expected = pixels.var(0, unbiased=False)
    torch.testing.assert_close(fitted.running_var.double().squeeze(), expected, rtol=1e-4, atol=1e-5)


def test_all_calls_of_a_batch_normalisation_layer_count_and_one_without_a_call_keeps_its_statistics():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.spare, self.linear = nn.BatchNorm2d(1), nn.BatchNorm2d(1), nn.Linear(1, 3)

        def forward(self, x):
            return self.linear((self.norm(x) + self.norm(3 * x + 1)).mean((2, 3)))

    net, images = Twice(), make_images(30)
    net.spare.running_mean.fill_(5)
    sums = batch_norm_sums(net, images, generator(0, "test"))
    x = normalised(images).double()
    calls = (x, 3 * x + 1)
    assert float(sums["mean:norm"]) == pytest.approx(30 * sum(float(z.mean()) for z in calls) / 2, rel=1e-5)
    assert float(sums["square:norm"]) == pytest.approx(30 * sum(float((z**2).mean()) for z in calls) / 2, rel=1e-5)
    assert (float(sums["mean:spare"]), float(sums["square:spare"])) == (30 * 5.0, 30 * 26.0)

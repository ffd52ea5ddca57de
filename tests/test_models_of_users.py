"""Models as users bring them: parts called twice, frozen, shared, kept activations, weights that are computed."""

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torch.nn.utils import prune as masks
from torch.utils.checkpoint import checkpoint

import nets
from conftest import classifier, make_images, make_net, normalised, write_set
from fedunlearn.audits.artefacts import artefacts
from fedunlearn.audits.observe import observe
from fedunlearn.channels.copying import copied
from fedunlearn.channels.groups import find_channels
from fedunlearn.channels.heads import head_layer
from fedunlearn.channels.plan import Cut, PruningPlan, plan_pruning, prune
from fedunlearn.channels.scores import Ranking, random_scores
from fedunlearn.channels.stats import measure_channels
from fedunlearn.channels.taps import Tap
from fedunlearn.checkpoint import load_weights, read_weights, save_checkpoint
from fedunlearn.data.partition import partition
from fedunlearn.errors import ModelError, RecipeError
from fedunlearn.federation.federation import Federation
from fedunlearn.federation.jobs import Job
from fedunlearn.federation.local import LocalEngine
from fedunlearn.federation.measuring import reestimate
from fedunlearn.federation.privacy import Privacy
from fedunlearn.federation.rounds import Repair, train_rounds
from fedunlearn.federation.tasks import Train
from fedunlearn.flower.client import cut as cut_tensors
from fedunlearn.flower.client import spread
from fedunlearn.models import build_model
from fedunlearn.run.audit_file import Candidate, audit_model
from fedunlearn.run.commands import run
from fedunlearn.run.experiment import prepare
from fedunlearn.run.recipe import load_recipe
from fedunlearn.run.references import check_kept
from fedunlearn.run.result import evaluate
from fedunlearn.seeding import generator
from fedunlearn.training import evaluation
from fedunlearn.training.batch_norm import batch_norm_sums
from fedunlearn.training.compute import Compute
from fedunlearn.training.sgd import Training, train_locally
from fedunlearn.unlearn import unlearn

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


def test_a_model_that_keeps_what_has_no_copies_is_refused_in_one_line():
    net = Mixing()
    net.lock = threading.Lock()
    for call in (
        lambda: forgotten(net),
        lambda: evaluate(net, make_images(), forget=0),
        lambda: prune(net, PruningPlan()),
    ):
        with pytest.raises(
            ModelError, match=r"cannot be copied \(TypeError: cannot pickle '_thread.lock' object\): take"
        ):
            call()


def test_threads_that_evaluate_do_not_share_what_a_model_keeps(monkeypatch):
    torch.manual_seed(0)
    net, images = Keeping(), make_images(1200)
    with torch.no_grad():
        right = net(normalised(images)).argmax(1) == images.labels
    expected = {name: float(right[images.labels == k].double().mean()) for k, name in enumerate(images.classes)}
    monkeypatch.setattr(evaluation, "cores", lambda: 8)
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
    rules = Privacy(min_count=0, min_images=1)
    fed = Federation(LocalEngine(partition(images, by="iid", clients=clients), rules=rules))
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


class Mixing(nn.Module):
    """Two convolutions with ``mix`` between them."""

    def __init__(self, mix=lambda maps: maps):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc, self.mix = nn.Linear(8, 3), mix

    def forward(self, x):
        return self.fc(F.relu(self.c2(self.mix(F.relu(self.c1(x))))).mean((2, 3)))


def federation(**values):
    return Federation(LocalEngine(partition(make_images(), by="iid", clients=2)), **values)


def forgotten(net, fed=None, **values):
    options = {"cut": Cut(0.25), "repair": Repair(Training(lr=0.05), rounds=1), "rank": Ranking(random_scores)}
    return unlearn(net, fed or federation(), forget=2, **{**options, **values})


def test_evaluation_refuses_what_depends_on_the_batch_or_on_chance():
    class Centred(Mixing):
        def forward(self, x):
            return super().forward(x - x.mean(0))

    class Dropping(Mixing):
        def forward(self, x):
            return super().forward(F.dropout(x))  # in evaluation too

    for net in (Centred(), Dropping()):
        with pytest.raises(ModelError, match="one image different logits beside other images, or a second time"):
            evaluate(net, make_images(), forget=0)
    untracked = make_net()
    untracked[1] = nn.BatchNorm2d(6, track_running_stats=False)
    for call in (lambda: evaluate(untracked, make_images(), forget=0), lambda: find_channels(untracked, EXAMPLE)):
        with pytest.raises(ModelError, match=r"'1' keeps no running statistics.*use batch normalisation with running"):
            call()


# A trial shows something


START = ["normal", "zero head", "silent"]


def started(net, start):
    with torch.no_grad():
        if start == "zero head":
            net.fc.weight.zero_(), net.fc.bias.zero_()
        if start == "silent":
            net.c2.bias.fill_(-50)
    return net


@pytest.mark.parametrize("start", START)
@pytest.mark.parametrize(
    "mix",
    [
        lambda h: h.flip(1),
        lambda h: h.roll(3, 1),
        lambda h: h.view(len(h), 2, -1, *h.shape[2:]).transpose(1, 2).flatten(1, 2),
        lambda h: h.sort(1).values,
        lambda h: h.amax(1, keepdim=True).expand(-1, 8, -1, -1),
        lambda h: h.softmax(1),
        # What does nothing to maps of large values.
        lambda h: torch.cat([(h - 0.3)[:, :4].relu(), (h - 0.3)[:, 4:]], 1),
        lambda h: torch.where(torch.arange(8)[:, None, None] % 2 == 0, (h - 0.3).relu(), h - 0.3),
        lambda h: (h - 0.3).relu() - (0.3 - h).relu().flip(1),
        lambda h: h + (0.3 - h).relu().mean(1, keepdim=True),
    ],
    ids=["flip", "roll", "shuffle", "sort", "amax", "softmax", "half", "every other", "negatives", "mean of negatives"],
)
def test_channels_that_are_moved_on_the_way_are_left_out_whatever_the_weights_are(mix, start):
    torch.manual_seed(0)
    channels = find_channels(started(Mixing(mix), start), EXAMPLE)
    assert list(channels.taps) == ["c2"]
    assert "cross an operation" in channels.left_out["c1"]


@pytest.mark.parametrize("width", [12, 24, 128])  # of which a drawn half has as many of either half
@pytest.mark.parametrize(
    "mix",
    [
        lambda h: (h.view(len(h), 2, -1, 8, 8) * torch.tensor([0.3, 2.0]).view(1, 2, 1, 1, 1)).flatten(1, 2),
        lambda h: h.reshape(len(h), 2, h.shape[1] // 2, 64).softmax(3).reshape(h.shape),
    ],
    ids=["scales", "softmax"],
)
def test_channels_that_code_divides_into_equal_parts_are_left_out_at_any_width(mix, width):
    torch.manual_seed(0)
    net = Mixing(mix)
    net.c1, net.c2 = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 8, 3, padding=1)
    assert "cross an operation" in find_channels(net, EXAMPLE).left_out["c1"]


class AttentionPool(nn.Module):
    """A mean of pixels by weights of another convolution, for each of two groups of channels."""

    def __init__(self):
        super().__init__()
        self.c1, self.weights, self.c2 = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 2, 1), nn.Conv2d(8, 24, 1)
        self.fc = nn.Linear(24, 3)

    def forward(self, images):
        h = self.c1(images).relu()
        weights = self.weights(h).flatten(2).softmax(-1)
        values = self.c2(h).view(len(h), 2, -1, weights.shape[-1])
        return self.fc((values @ weights[..., None]).flatten(1))


def test_attention_over_pixels_is_left_out_and_not_followed_for_ever():
    channels = find_channels(AttentionPool(), torch.rand(2, 1, 16, 16))  # it took minutes
    assert "cross an operation" in channels.left_out["c2"]


def test_flattened_maps_are_followed_whatever_their_size():
    net = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 48 * 48, 3))
    assert list(find_channels(net, torch.zeros(2, 1, 48, 48)).taps) == ["0"]


def test_the_only_row_of_a_head_of_another_class_is_told_from_a_gate():
    class Head(nn.Linear):
        pass

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.gate, self.fc = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 1, 1), Head(8, 1)

        def forward(self, images):
            h = self.conv(images).relu()
            return self.fc((h * self.gate(h).sigmoid()).mean((2, 3)))

    assert head_layer(Gated(), EXAMPLE) == "fc"


class Shared(nn.Linear):
    """Rows that are divided by a norm over all of them, or from which their mean is taken."""

    def __init__(self, centred):
        super().__init__(8, 3)
        self.centred = centred

    def forward(self, x):
        w = self.weight
        return F.linear(x, w - w.mean(0) if self.centred else F.normalize(w, dim=0), self.bias)


def test_a_head_of_another_class_than_linear_is_tried_out():
    for centred in (True, False):
        net = make_net()
        net[8] = Shared(centred)
        if centred:
            assert classifier(net).without_rows([0]).rows == 2
        else:
            with pytest.raises(ModelError, match="the model's output must come straight from a Linear layer"):
                classifier(net).without_rows([0])


class Viewing(nn.Module):
    """Joins axes by view, which takes contiguous maps only; and has a scale of five axes."""

    def __init__(self, training_alone=False):
        super().__init__()
        self.training_alone = training_alone
        self.c1, self.fc = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8 * 64, 3)
        self.scale = nn.Parameter(torch.ones(1, 1, 1, 1, 1))

    def forward(self, images):
        h = (self.c1(images).relu()[:, None] * self.scale)[:, 0]
        return self.fc(h.flatten(1) if self.training_alone and not self.training else h.view(len(h), -1))


def test_a_model_that_joins_axes_by_view_is_computed_in_contiguous_maps():
    assert Compute().able(make_net(), EXAMPLE) == Compute()
    assert Compute().able(Viewing(), EXAMPLE) == Compute(memory_format="contiguous")
    assert Compute().able(Viewing(training_alone=True), EXAMPLE) == Compute(memory_format="contiguous")
    dropping, before = nn.Sequential(nn.Dropout(), *make_net()), torch.get_rng_state()
    assert Compute().able(dropping, EXAMPLE) == Compute(draws=True)
    assert torch.get_rng_state().equal(before)
    done = forgotten(Viewing())
    assert done.model.labels == (0, 1)


def test_a_model_that_fails_fails_at_its_clients_and_not_before():
    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 3)

        def forward(self, images):
            raise ValueError("no such image")

    engine = LocalEngine(partition(make_images(), by="iid", clients=2))
    task = Train(training=Training(0.1, 8), lr=0.1)
    for reply in engine.run(Job(task=task, model=classifier(Failing()), phase="train")):
        assert "no such image" in reply.error


def test_channels_that_are_mixed_a_little_are_left_out():
    """Of sums over neighbouring channels, as in AlexNet: a constant of 1e-4 is enough to make others of them."""
    torch.manual_seed(0)
    channels = find_channels(Mixing(nn.LocalResponseNorm(5)), EXAMPLE)
    assert list(channels.taps) == ["c2"]
    assert "cross an operation" in channels.left_out["c1"]


def test_normalisation_over_several_processes_is_refused_with_what_to_do():
    net = nn.SyncBatchNorm.convert_sync_batchnorm(make_net())
    for call in (lambda: find_channels(net, EXAMPLE), lambda: forgotten(net)):
        with pytest.raises(ModelError, match=r"'1' is a SyncBatchNorm.*build the network with BatchNorm2d"):
            call()


@pytest.mark.parametrize("start", START)
@pytest.mark.parametrize("mix", [lambda h: h, lambda h: -h], ids=["plain", "negative"])
def test_plain_channels_are_followed_whatever_the_weights_are(mix, start):
    torch.manual_seed(0)
    assert list(find_channels(started(Mixing(mix), start), torch.zeros(1, 1, 8, 8)).taps) == ["c1", "c2"]


def test_channels_that_reach_no_logit_are_left_out_because_nothing_shows():
    torch.manual_seed(0)
    channels = find_channels(Mixing(lambda h: 0 * h), EXAMPLE)
    assert "nothing shows that it was followed rightly" in channels.left_out["c1"]


def test_a_shared_maximum_as_the_only_channel_of_a_convolution_is_no_traceback():
    net = Mixing(lambda h: h.amax(1, keepdim=True))
    net.c2 = nn.Conv2d(1, 8, 3, padding=1)
    assert "c1" in find_channels(net, EXAMPLE).left_out


def test_a_file_that_ends_the_program_is_told_as_such(tmp_path, monkeypatch):
    (tmp_path / "argp.py").write_text("import sys\nsys.exit(2)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ModelError, match=r"'argp:net': its file ends the program when it is imported \(SystemExit: 2\)"
    ):
        build_model("argp:net", classes=2, colours=1)


def test_a_network_that_is_the_same_for_every_seed_retrains_nothing(tmp_path, monkeypatch):
    def seeded(classes, colours):
        torch.manual_seed(0)
        return nets.Tiny(classes, colours)

    monkeypatch.setattr(nets, "seeded", seeded, raising=False)
    recipe = load_recipe(str(write_set(tmp_path, oracles=3, model="nets:seeded")))
    with pytest.raises(
        ModelError, match="'nets:seeded' gives the same weights for every seed, so that retrained models"
    ):
        run(recipe, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_network_that_is_the_same_for_every_seed_takes_models_retrained_before(tmp_path, monkeypatch):
    first = load_recipe(str(write_set(tmp_path, oracles=3)))
    run(first, tmp_path / "first")

    def seeded(classes, colours):
        torch.manual_seed(0)
        return nets.Tiny(classes, colours)

    monkeypatch.setattr(nets, "tiny", seeded)  # the name stays: the folder's models are of it
    given = f'audit.models="{tmp_path / "first"}"', f'model.weights="{tmp_path / "first" / "original.safetensors"}"'
    check_kept(prepare(load_recipe(str(tmp_path / "tiny.toml"), list(given))))
    with pytest.raises(ModelError, match="'nets:tiny' gives the same weights for every seed"):
        check_kept(prepare(first))


def test_a_network_that_loads_what_was_trained_is_not_retrained_without_the_class(tmp_path, monkeypatch):
    recipe = load_recipe(str(write_set(tmp_path, oracles=3)))
    run(recipe, tmp_path / "first", command="train")
    trained = dict(read_weights(tmp_path / "first" / "original.safetensors").state)

    def known(classes, colours):
        net = nets.Tiny(classes, colours)
        net.load_state_dict(trained)
        net.linear.bias.data.add_(1e-3 * torch.randn(classes))
        return net

    monkeypatch.setattr(nets, "known", known, raising=False)
    again = load_recipe(str(tmp_path / "tiny.toml"), ['model.name="nets:known"'])
    with pytest.raises(ModelError, match="'nets:known' makes networks that name most images of every"):
        run(again, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))
    model = Candidate(model=tmp_path / "first" / "original.safetensors")
    with pytest.raises(ModelError, match="'nets:known' makes networks that name most images of every class"):
        audit_model(again, tmp_path / "audit", model)


def test_retrained_models_that_have_learnt_nothing_are_told_as_such_and_not_refused(tmp_path):
    recipe = load_recipe(str(write_set(tmp_path, oracles=3)), ["train.rounds=1", "train.lr=0.00001"])
    assert run(recipe, tmp_path / "out")["verdict"] == "no verdict"


def test_train_begins_with_fresh_weights(tmp_path):
    recipe = load_recipe(str(write_set(tmp_path)), ['model.weights="some.pt"'])
    with pytest.raises(
        RecipeError, match=r"train begins with fresh weights, and model.weights names some.pt: leave it"
    ):
        run(recipe, tmp_path / "out", command="train")
    assert not (tmp_path / "out").exists()


def test_the_seed_of_the_federation_draws_the_random_scores():
    net = make_net()
    plans = [forgotten(net, federation(seed=seed)).pruned.plan.pruned for seed in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]


# Parts called twice, shared, or not run


def test_a_model_that_changes_what_a_gradient_needs_is_refused_in_one_line():
    with pytest.raises(ModelError, match=r"autograd cannot go back .*inplace operation.*: .* change nothing in place"):
        find_channels(Mixing(lambda maps: maps.add_(0.1)), EXAMPLE)


class Again(nn.Module):
    """The second convolution twice, its channels going into itself."""

    def __init__(self):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c3, self.fc = nn.Conv2d(8, 4, 1), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(F.relu(self.c3(F.relu(self.c2(F.relu(self.c2(F.relu(self.c1(x)))))))).mean((2, 3)))


def test_a_layer_that_is_called_twice_is_left_out_by_name():
    channels = find_channels(Again(), EXAMPLE)
    assert list(channels.taps) == ["c3"]
    assert "c2, where it is read, is called 2 times in a pass" in channels.left_out["c1"]
    own = Again()
    own.c3 = nn.Identity()
    own.fc = nn.Linear(8, 3)
    with pytest.raises(
        ModelError, match=r"no convolution .*c1: c2, where it is read.*a module of its own for each call"
    ):
        find_channels(own, EXAMPLE)
    batch = (EXAMPLE, torch.tensor([0, 1]))
    with pytest.raises(ModelError, match=r"c2 is called more than once in a pass.*channels of c1 cannot be read"):
        measure_channels(Again(), [batch], taps={"c1": Tap("c2", "input", 0, 8)}, classes=3)


class TwoNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 3)
        self.body = nn.Sequential(self.conv, self.norm, nn.ReLU())

    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))


def test_a_module_under_two_names_is_cut_under_both(tmp_path):
    done = forgotten(TwoNames())
    state, plan = done.repaired.module.state_dict(), done.repaired.plan
    assert plan.kept["conv.weight"] == plan.kept["body.0.weight"]
    assert done.model.module.conv is done.model.module.body[0]
    whole = spread(state, plan.kept, plan.shapes)
    TwoNames().load_state_dict(whole)
    assert all(tensor.equal(state[name]) for name, tensor in cut_tensors(whole, plan.kept).items())
    save_checkpoint(tmp_path / "m.safetensors", done.model, images=make_images(), architecture={"name": "two"})
    again = load_weights(classifier(TwoNames()), read_weights(tmp_path / "m.safetensors"))
    assert again.module.eval()(EXAMPLE).equal(done.model.module.eval()(EXAMPLE))


class Tied(Again):
    """Two convolutions with one weight."""

    def __init__(self):
        super().__init__()
        self.twin = nn.Conv2d(8, 8, 3, padding=1)
        self.twin.weight = self.c2.weight

    def forward(self, x):
        maps = F.relu(self.twin(F.relu(self.c2(F.relu(self.c1(x))))))
        return self.fc(F.relu(self.c3(maps)).mean((2, 3)))


def test_layers_that_share_a_tensor_stay_tied_and_whole():
    done = forgotten(Tied())
    left_out = done.model.plan.left_out
    assert left_out["c2"] == left_out["c1"] == "twin.weight is the same tensor as c2.weight"
    assert list(done.model.plan.pruned) == ["c3"]
    assert done.model.module.twin.weight is done.model.module.c2.weight


class SecondHead(Mixing):
    def __init__(self, how):
        super().__init__()
        self.aux, self.how = nn.Linear(8, 3), how

    def forward(self, x):
        maps = F.relu(self.c1(x))
        logits = self.fc(F.relu(self.c2(maps)).mean((2, 3)))
        if not self.training or self.how == "never":
            return logits
        second = self.aux(maps.mean((2, 3)))
        return (logits, second) if self.how == "tuple" else logits + second


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("never", "'aux' has 3 rows, one per class, and evaluation does not run it.*take it out"),
        ("added", "'aux' runs in training but not in evaluation.*take it out of the model"),
        ("tuple", "in training the model must return one tensor of logits.*got a tuple"),
    ],
)
def test_a_second_head_that_evaluation_does_not_run_is_refused(how, text):
    with pytest.raises(ModelError, match=text):
        forgotten(SecondHead(how))


def test_a_model_that_returns_more_than_logits_in_training_is_not_sent_to_a_client():
    fed, asked = federation(), []
    fed.engine.run = asked.append
    with pytest.raises(ModelError, match=r"in training the model must return one tensor of logits.*got a tuple"):
        train_rounds(SecondHead("tuple"), fed, Training(lr=0.1), rounds=1)
    assert asked == []


def test_the_row_of_the_class_in_a_second_head_is_an_artefact(tmp_path):
    net = SecondHead("never")
    model = classifier(net).without_rows([2])
    save_checkpoint(tmp_path / "m.safetensors", model, images=make_images(), architecture={"name": "second"})
    found = artefacts(tmp_path / "m.safetensors", state=net.state_dict(), forget=[2])
    assert found == ["tensor aux.weight holds the original's row 2, of the forgotten class"]


def test_a_head_that_is_used_twice_or_shared_is_refused():
    class Gated(Mixing):
        def forward(self, x):
            maps = F.relu(self.c2(F.relu(self.c1(x)))).mean((2, 3))
            return self.fc(maps * self.fc(maps).sum(1, keepdim=True))

    with pytest.raises(ModelError, match="row of a class cannot be removed alone, fc is called 2 times in a pass"):
        head_layer(Gated(), EXAMPLE)
    shared = SecondHead("never")
    shared.aux.weight = shared.fc.weight
    with pytest.raises(ModelError, match=r"aux.weight is the same tensor as fc.weight: give the output its own Linear"):
        head_layer(shared, EXAMPLE)


def test_logits_of_another_shape_in_training_are_refused():
    class Wider(Mixing):
        def forward(self, x):
            logits = super().forward(x)
            return torch.cat([logits, logits], 1) if self.training else logits

    with pytest.raises(ModelError, match=r"logits of shape \(2, 6\) in training and \(2, 3\) in evaluation"):
        find_channels(Wider(), EXAMPLE)


# Frozen, detached, computed weights


@pytest.mark.parametrize("frozen", [["c1"], ["c1", "c2"]])
def test_frozen_layers_are_cut_and_stay_frozen(frozen):
    net = Mixing()
    for name in frozen:
        net.get_submodule(name).requires_grad_(False)
    done = forgotten(net)
    assert set(done.model.plan.pruned) == {"c1", "c2"}
    flags = {name: parameter.requires_grad for name, parameter in net.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in done.model.module.named_parameters()} == flags


def test_a_frozen_model_can_be_cut_but_not_repaired():
    net = Mixing().requires_grad_(False)
    plan = plan_pruning(find_channels(net, EXAMPLE), {"c1": torch.ones(8)}, Cut(0.25))
    assert plan.pruned["c1"] == (0, 1)
    asked, fed = [], federation()
    fed.engine.run = asked.append
    for repair in (
        lambda: train_rounds(classifier(net), fed, Training(lr=0.1), rounds=1),
        lambda: forgotten(net, fed),
        lambda: train_locally(net, make_images(), Training(lr=0.1), lr=0.1, draw=generator(0, "test")),
    ):
        with pytest.raises(ModelError, match=r"every weight of the model is frozen \(requires_grad=False\)"):
            repair()
    assert asked == []
    done = forgotten(net, repair=Repair(Training(lr=0.1), rounds=0))
    assert done.model.labels == (0, 1)


class Cutting(Mixing):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x):
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.how != "no_grad"):
            maps = F.relu(self.c1(x))
        if self.how == "detach":
            maps = maps.detach()
        if "checkpoint" in self.how:
            reentrant = "reentrant" in self.how
            maps = checkpoint(lambda z: F.relu(self.c2(z)), maps, use_reentrant=reentrant)
        else:
            maps = F.relu(self.c2(maps))
        return self.fc(maps.mean((2, 3)))


@pytest.mark.parametrize("how", ["no_grad", "detach"])
def test_layers_that_autograd_does_not_record_are_left_out_by_name(how):
    channels = find_channels(Cutting(how), EXAMPLE)
    assert list(channels.taps) == ["c2"]
    assert "autograd does not record it" in channels.left_out["c1"]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_checkpointed_model_is_followed_or_refused_in_one_line():
    assert list(find_channels(Cutting("checkpoint"), EXAMPLE).taps) == ["c1", "c2"]
    with pytest.raises(ModelError, match=r"no convolution of the model can lose channels.*autograd does not record"):
        find_channels(Cutting("checkpoint, reentrant"), EXAMPLE)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("layer", ["c1", "fc"])
@pytest.mark.parametrize(
    ("compute", "text"),
    [
        (
            lambda own: masks.l1_unstructured(own, "weight", amount=0.5),
            r"weight_mask.*call torch.nn.utils.prune.remove",
        ),
        (weight_norm, r"weight_g, weight_v.*call torch.nn.utils.remove_weight_norm\(layer\) first"),
        (spectral_norm, r"weight_u.*call torch.nn.utils.remove_spectral_norm\(layer\) first"),
        (parametrizations.weight_norm, "computed in each pass .a parametrization.*remove_parametrizations"),
    ],
)
def test_weights_that_are_computed_are_refused_by_name_with_the_remedy(compute, text, layer):
    net = Mixing()
    compute(net.get_submodule(layer))
    for call in (lambda: find_channels(net, EXAMPLE), lambda: forgotten(net)):
        with pytest.raises(ModelError, match=f"'{layer}'.*{text}"):
            call()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda net: net.double(), "c1.weight is float64, expected float32.*model.float"),
        (lambda net: net.half(), "c1.weight is float16, expected float32"),
        (lambda net: net.to("meta"), "c1.weight has no values \\(it is on the meta device\\)"),
        (lambda net: setattr(net, "fc", nn.LazyLinear(3)), r"fc.weight has no shape yet \(a lazy layer\)"),
        (lambda net: net.register_buffer("phase", torch.zeros(2) * 1j), "phase is torch.complex64, of which clients"),
    ],
)
def test_weights_of_another_kind_are_refused_by_name(change, text):
    net = Mixing()
    change(net)
    for call in (lambda: head_layer(net, EXAMPLE), lambda: evaluate(net, make_images(), forget=0)):
        with pytest.raises(ModelError, match=text):
            call()


def test_an_example_without_a_batch_and_an_output_that_is_no_tensor_are_refused():
    with pytest.raises(ModelError, match=r"must be a batch .* got shape \(1, 8, 8\): one image becomes a batch by"):
        find_channels(Mixing(), EXAMPLE[0])

    class Pair(Mixing):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(ModelError, match=r"in evaluation the model must return one tensor of logits.*got a tuple"):
        evaluate(Pair(), make_images(), forget=0)


class Counting(nn.Linear):
    """Keeps a state that is no tensor."""

    def get_extra_state(self):
        return {"calls": 3}

    def set_extra_state(self, state):
        assert state


def test_a_state_that_is_no_tensor_is_refused_by_name(images):
    net = make_net()
    net[8] = Counting(8, 3)
    for step in (lambda: find_channels(net, normalised(images)[:2]), lambda: evaluate(net, images, forget=[1])):
        with pytest.raises(
            ModelError, match=r"8 keeps a state that is no tensor \(get_extra_state\), of which clients"
        ):
            step()

"""Precision, memory format, workers: what they change, what they must not change, and how they are chosen."""

import copy
import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from conftest import collected, job, make_images, make_net, tiers
from fedunlearn.channels.groups import find_channels
from fedunlearn.channels.stats import measure_channels
from fedunlearn.channels.taps import HOOKS, Tap, channel_means
from fedunlearn.data.batches import batches
from fedunlearn.data.partition import hold_out, partition
from fedunlearn.errors import RecipeError
from fedunlearn.federation import local
from fedunlearn.federation.jobs import ClientData, handle
from fedunlearn.federation.journal import header_of
from fedunlearn.federation.ledger import flops_per_image
from fedunlearn.federation.local import Copies, LocalEngine, Values
from fedunlearn.federation.tasks import Evaluate, Measure, Reestimate, Train
from fedunlearn.models import MODELS, build_model
from fedunlearn.run import kept, machine
from fedunlearn.run.commands import run
from fedunlearn.run.experiment import prepare
from fedunlearn.run.kept import cached
from fedunlearn.run.machine import settled
from fedunlearn.run.recipe import load_recipe
from fedunlearn.run.tables import ComputeTable
from fedunlearn.training.compute import FLOAT32, Compute, cores, has_bfloat16
from fedunlearn.training.sgd import Training
from fedunlearn.training.speed import _fastest, probe

EXAMPLE = torch.randn((2, 1, 8, 8), generator=torch.Generator().manual_seed(0))
BFLOAT16 = Compute("bfloat16")
CONTIGUOUS = Compute(memory_format="contiguous")
TRAINING = Training(lr=0.1, batch_size=8)
SMALL = ("model.name=nets:tiny", "federation.clients=3", "train.rounds=1", "train.local_epochs=0.2")


def jobs(net):
    return {
        "measure": job(Measure(classes=3), net),
        "reestimate": job(Reestimate(), net),
        "train": job(Train(training=TRAINING, lr=0.1), net),
        "evaluate": job(Evaluate(), net),
    }


def answer(asked, compute, images=None):
    images = images or make_images(120)
    data = ClientData("a", images, images.take(slice(0, 60)))
    reply = handle(asked, compute.placed(asked.model.copy().module), data, compute=compute)
    assert reply.error is None
    return reply.tensors


@pytest.mark.parametrize("change", [{"precision": "float16"}, {"memory_format": "nhwc"}, {"workers": 0}])
def test_settings_that_do_not_exist_are_refused(change):
    with pytest.raises(RecipeError, match="expected a precision among float32, bfloat16, a memory format among"):
        Compute(**change)


@pytest.mark.parametrize("kind", ["measure", "reestimate", "train", "evaluate"])
def test_memory_format_changes_no_answer_but_by_rounding(net, kind):
    asked = jobs(net)[kind]
    one, other = answer(asked, FLOAT32), answer(asked, CONTIGUOUS)
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", ["measure", "reestimate"])
def test_bfloat16_sums_are_those_of_float32_to_its_eight_bits(net, kind):
    asked = jobs(net)[kind]
    exact, rough = answer(asked, FLOAT32), answer(asked, BFLOAT16)
    assert {name: tensor.dtype for name, tensor in rough.items()} == {name: t.dtype for name, t in exact.items()}
    for name, tensor in exact.items():
        if tensor.is_floating_point() and tensor.ndim:
            error = (rough[name] - tensor).abs().max() / tensor.abs().max()
            assert 0 < float(error) < 2**-6, name  # and not 0: it is another computation


def test_bfloat16_trains_float32_weights():
    net = make_net(seed=3)
    images = make_images(120)
    state = answer(job(Train(training=replace(TRAINING, local_epochs=6), lr=0.1), net, phase="t"), BFLOAT16)
    assert {t.dtype for t in state.values()} == {torch.float32, torch.int64}
    trained = copy.deepcopy(net)
    trained.load_state_dict(state)
    right, rough = (answer(jobs(trained)["evaluate"], compute, images) for compute in (FLOAT32, BFLOAT16))
    assert int(right["correct"]) >= 0.95 * int(right["counts"])
    assert abs(int(rough["correct"]) - int(right["correct"])) <= 1


def test_autocast_is_what_a_pass_runs_in(net):
    batch, _ = next(batches(make_images(), 8))
    for compute, expected in ((FLOAT32, torch.float32), (BFLOAT16, torch.bfloat16)):
        with compute.autocast(), torch.inference_mode():
            assert net(batch).dtype == expected


def test_batches_and_models_lie_as_the_memory_format_says():
    images = make_images(colours=3)
    for compute in (FLOAT32, CONTIGUOUS):
        batch, _ = next(batches(images, 8, memory_format=compute.layout))
        weight = compute.placed(nn.Conv2d(3, 4, 3)).weight
        assert batch.is_contiguous(memory_format=compute.layout)
        assert weight.is_contiguous(memory_format=compute.layout)
    assert not batch.is_contiguous(memory_format=torch.channels_last)


# The engine


def engine(compute=None, clients=12):
    shares, held = hold_out(partition(make_images(240), by="iid", clients=clients), 0.2)
    return LocalEngine(shares, validation=held, compute=compute)


def test_clients_are_not_far_ahead_of_the_reply_that_is_read(net, monkeypatch):
    started, go = [], threading.Event()

    def slow(job, model, data, rules, compute):
        started.append(data.client)
        if data.client != "client-00":
            go.wait(60)
        return handle(job, model, data, rules, compute)

    monkeypatch.setattr(local, "handle", slow)
    replies = engine(Compute(workers=2)).run(jobs(net)["train"])
    assert next(replies).client == "client-00"  # with five of twelve asked, and two at work
    threading.Timer(0.5, go.set).start()
    replies.close()  # nobody wants the rest
    assert len(started) <= 3


def test_runs_of_one_engine_may_overlap(net):
    own, other = engine(Compute(workers=2)), make_net(seed=5)
    alone = [[reply.tensors for reply in engine().run(jobs(model)["train"])] for model in (net, other)]
    first, second = own.run(jobs(net)["train"]), own.run(jobs(other)["train"])
    together = list(zip(first, second))
    for number, expected in enumerate(alone):
        for replies, tensors in zip(together, expected):
            assert all(tensor.equal(replies[number].tensors[name]) for name, tensor in tensors.items())


def test_the_number_of_torch_threads_comes_back_in_any_order(net):
    own, before = engine(), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        first, second = own.run(jobs(net)["evaluate"]), own.run(jobs(net)["evaluate"])
        next(first), next(second)
        assert torch.get_num_threads() == 1
        first.close()
        assert torch.get_num_threads() == 1
        list(second)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_round_is_the_same_whatever_the_copies_did_before(net):
    used, fresh = engine(), engine()
    list(used.run(jobs(net)["reestimate"]))
    list(used.run(jobs(net)["measure"]))
    next(used.run(jobs(net)["train"]))  # is not read to its end
    with torch.no_grad():
        net[8].weight.mul_(2)
    for one, other in zip(list(used.run(jobs(net)["train"])), list(fresh.run(jobs(net)["train"]))):
        assert all(tensor.equal(other.tensors[name]) for name, tensor in one.tensors.items())


def test_the_momentum_of_batch_normalisation_comes_back_even_after_a_failure(net):
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, images):
            raise RuntimeError("the sensor is unplugged")

    for model in (net, Broken()):
        data = ClientData("a", make_images())
        reply = handle(job(Reestimate(), model), model, data)
        assert (reply.error is None) == (model is net)
        assert net[1].momentum == 0.1


# Copies of the model


class Averaging(nn.Module):
    """Keeps a running mean in a buffer that it replaces."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, rows):
        self.mean = 0.9 * self.mean + 0.1 * rows.mean(0)
        return self.layer(rows)


def test_a_copy_is_made_once_and_filled_whatever_was_done_to_it():
    copies, model = Copies(FLOAT32, torch.device("cpu")), Averaging()
    with copies.filled(Values.of(model)) as first:
        first.model(torch.ones(3, 2))
    with torch.no_grad():
        model.layer.weight.fill_(7)
    with copies.filled(Values.of(model)) as second:
        assert second is first
        assert second.model.layer.weight.eq(7).all()
        assert second.model.mean.eq(0).all()
        with copies.filled(Values.of(model)) as third:
            assert third is not second  # which is in use
    model.layer = nn.Linear(2, 3)  # the same object in other shapes
    with copies.filled(Values.of(model)) as fourth:
        assert fourth not in (first, third)
        assert fourth.model(torch.ones(1, 2)).shape == (1, 3)
    with copies.filled(Values.of(Averaging())) as fifth:
        assert fifth is not fourth


def test_a_copy_that_was_left_unchanged_is_not_filled_again():
    copies, model = Copies(FLOAT32, torch.device("cpu")), Averaging()
    values = Values.of(model)
    with copies.filled(values) as own:
        own.holds = values
        own.model.layer.bias.data.fill_(3)  # so that a second filling would show
    with copies.filled(values) as again:
        assert again.model.layer.bias.eq(3).all()
    with copies.filled(values) as changed:  # who works with it says nothing
        assert changed.model.layer.bias.equal(model.layer.bias)


def test_operations_are_counted_again_when_shapes_change(net):
    before = flops_per_image(net, (1, 8, 8))
    assert flops_per_image(net, (1, 8, 8)) == before
    net[8] = nn.Linear(8, 5)
    assert flops_per_image(net, (1, 8, 8))[0] == before[0] + 2 * 8 * 2


def test_an_empty_round_costs_nothing_but_the_asking(net):
    _, entry = collected(LocalEngine(partition(make_images(), by="iid", clients=4)), jobs(net)["evaluate"])
    assert (entry.samples, entry.flops, len(entry.clients)) == (0, 0, 4)


# Where channels are read


@pytest.mark.parametrize("name", [pytest.param(name, marks=tiers(name)) for name in MODELS])
def test_what_a_shipped_model_hands_on_is_known_to_be_rectified(name):
    model = build_model(name, classes=3, colours=3)
    example = torch.randn(2, 3, 32, 32)
    activation, convolution = (find_channels(model, example, hook=hook).taps for hook in HOOKS)
    assert all(tap.rectified for tap in activation.values())
    assert not any(tap.rectified for tap in convolution.values())
    assert list(activation) == list(convolution)


@pytest.mark.parametrize(
    ("between", "rectified"),
    [
        ([nn.ReLU()], True),
        ([nn.ReLU(inplace=True), nn.MaxPool2d(2)], True),
        ([nn.ReLU(), nn.AvgPool2d(2)], True),
        ([nn.LeakyReLU()], False),
        ([nn.GELU()], False),
        ([nn.ReLU(), nn.BatchNorm2d(4)], False),
        ([], False),
    ],
)
def test_only_what_a_relu_made_goes_without_a_clamp(between, rectified):
    torch.manual_seed(0)
    net = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(1, 4, 3), *between, nn.Conv2d(4, 2, 1), nn.ReLU())
    net = nn.Sequential(*net, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)).eval()
    tap = find_channels(net, EXAMPLE, hook="activation").taps["1"]
    assert tap.rectified is rectified
    images = make_images(20)
    found = measure_channels(net, batches(images, 7), taps={"1": tap}, classes=3).sums["1"]
    batch, labels = next(batches(images, 20))
    with torch.no_grad():
        read = net[: 2 + len(between)](batch.clone()).clamp_min(0).double().mean((2, 3))
    expected = torch.stack([read[labels == label].sum(0) for label in range(3)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_model_that_normalises_its_input_in_place_can_be_followed(net):
    class Normalising(nn.Sequential):
        def forward(self, images):
            for colour in images.unbind(1):
                colour.sub_(0.5)
            return super().forward(images)

    example = EXAMPLE.clone()
    channels = find_channels(Normalising(*net).eval(), example, hook="activation")
    assert list(channels.taps) == ["0", "3"]
    assert channels.taps["0"].rectified
    assert example.equal(EXAMPLE)


def test_means_of_bfloat16_maps_are_not_rounded_to_bfloat16():
    maps = torch.full((1, 1, 1, 3), 1.0).bfloat16()
    maps[..., 2] = 1 + 2**-7
    mean = channel_means(maps, Tap("x", "input", 0, 1, rectified=True), 1)
    assert float(mean) == pytest.approx(1 + 2**-7 / 3, rel=1e-6)


# The choice


def test_the_probe_tries_what_there_is_and_leaves_the_model_and_the_draws_alone(net):
    before, draws = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    best, tried = probe(net, (1, 8, 8), batch_size=8)
    assert best in dict(tried)
    assert tried[0][0] == Compute(workers=cores())
    assert has_bfloat16() == any(own.precision == "bfloat16" for own, _ in tried)
    assert all(rate > 0 for _, rate in tried)
    assert {own.memory_format for own, _ in tried} == {"channels_last", "contiguous"}
    assert (cores() == 1) == ({own.workers for own, _ in tried} == {cores()})
    assert all(tensor.equal(before[name]) for name, tensor in net.state_dict().items())
    assert torch.get_rng_state().equal(draws)


class _AsksForFloat32(nn.Module):
    def __init__(self):
        super().__init__()
        self.maps, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 2)

    def forward(self, x):
        maps = self.maps(x).mean((2, 3))
        if maps.dtype != torch.float32:
            raise RuntimeError("expected Float")
        return self.head(maps)


def test_the_probe_leaves_out_a_precision_in_which_the_model_does_not_train():
    best, tried = probe(_AsksForFloat32(), (1, 8, 8), batch_size=8)
    assert {own.precision for own, _ in tried} == {best.precision} == {"float32"}


def test_only_what_is_clearly_faster_takes_the_place_of_the_first():
    assert _fastest([(FLOAT32, 100.0), (CONTIGUOUS, 110.0), (BFLOAT16, 90.0)]) == FLOAT32
    assert _fastest([(FLOAT32, 100.0), (CONTIGUOUS, 110.0), (BFLOAT16, 250.0)]) == BFLOAT16


def test_a_run_records_what_the_probe_chose_and_goes_on_with_it(tmp_path):
    recipe = load_recipe("digits", (*SMALL, "compute.precision=auto"))
    out = tmp_path / "run"
    result = run(recipe, out, command="train")
    chosen = result["recipe"]["compute"]
    assert chosen["precision"] in ("float32", "bfloat16")
    assert chosen["workers"] >= 1
    assert header_of(out)["recipe"]["compute"] | {"workers": chosen["workers"]} == chosen
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    (probed,) = [event["facts"] for event in events if event["event"] == "machine probed"]
    assert len(probed["images_per_second"]) >= 2
    again = run(recipe, tmp_path / "again", command="train")  # timings waver, the machine's choice does not
    assert again["recipe"]["compute"] == chosen
    assert again["original"] == result["original"]
    # A run on a machine of another kind goes on as it began.
    other = {"precision": "float32", "memory_format": "contiguous"}
    header = header_of(out)
    header["recipe"]["compute"] = other
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "rounds.jsonl").write_text(json.dumps(header) + "\n")
    experiment, rates = settled(prepare(recipe), elsewhere)
    assert experiment.recipe.compute == ComputeTable.model_validate(other)
    assert experiment.engine._compute == Compute("float32", "contiguous", cores())
    assert rates == {}
    # The same settings, said aloud, are the same run.
    said = [f"compute.{key}={value}" for key, value in chosen.items() if key != "workers"]
    assert run(load_recipe("digits", (*SMALL, *said)), out, command="train") == result


def test_a_cache_that_cannot_be_used_costs_a_probe_and_nothing_else(tmp_path, monkeypatch):
    probes = []

    def counted(*args, **options):
        probes.append(probe(*args, **options))
        return probes[-1]

    monkeypatch.setattr(machine, "probe", counted)
    experiment = prepare(load_recipe("digits", (*SMALL, "compute.precision=auto")))
    cache = tmp_path / "cache"
    monkeypatch.setenv("FEDUNLEARN_CACHE", str(cache))

    def settles(*, probed):
        found, rates = settled(experiment, tmp_path / "run")
        best, tried = probes[-1]
        assert len(probes) == probed
        assert found.engine._compute == best
        assert list(rates.values()) == [round(rate, 1) for _, rate in tried]

    settles(probed=1)
    (finding,) = (cache / "probe").iterdir()
    settles(probed=1)  # rates and all: nothing was timed
    finding.write_text("{")
    settles(probed=2)
    settles(probed=2)  # and it is mended
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("FEDUNLEARN_CACHE", str(blocked))
    settles(probed=3)


def test_a_gpu_works_for_one_client_at_a_time_in_float32(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    experiment, rates = settled(prepare(load_recipe("digits", (*SMALL, "compute.precision=auto"))), tmp_path)
    assert (experiment.recipe.compute.precision, rates) == ("float32", {})
    assert experiment.engine._compute.workers == 1


def test_a_site_may_have_its_model_on_another_device():
    assert FLOAT32.placed(nn.Linear(2, 2, device="meta")).weight.device.type == "meta"
    assert FLOAT32.placed(nn.Linear(2, 2), torch.device("meta")).weight.device.type == "meta"


def test_nothing_is_probed_where_the_recipe_says_it_or_flower_runs_the_clients(tmp_path):
    said = prepare(load_recipe("digits", SMALL))
    assert settled(said, tmp_path) == (said, {})
    recipe = load_recipe("digits", (*SMALL, "compute.precision=auto", "federation.engine=flower-simulation"))
    local = prepare(load_recipe("digits", (*SMALL, "compute.precision=auto")))
    for experiment, rates in (settled(prepare(recipe), tmp_path), settled(local, tmp_path, elsewhere=True)):
        assert (experiment.recipe.compute, rates) == (ComputeTable(precision="float32"), {})
    assert header_of(tmp_path) == {}


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (("compute.precision=auto", "compute.workers=2"), "compute.memory_format and compute.workers need a"),
        (("compute.precision=bfloat16", "federation.engine=flower-simulation"), "compute holds for the engine local"),
        (("compute.memory_format=contiguous", "federation.engine=flower"), "clients on Flower compute in float32"),
    ],
)
def test_contradictions_are_refused(overrides, text):
    with pytest.raises(RecipeError, match=text):
        load_recipe("digits", overrides)


def test_retrained_models_are_kept_by_precision_and_not_by_workers():
    paths = {
        key: cached(load_recipe("digits", overrides), (9,), "data", 1)
        for key, overrides in {
            "plain": (),
            "bfloat16": ("compute.precision=bfloat16",),
            "contiguous": ("compute.memory_format=contiguous",),
            "workers": ("compute.workers=7",),
            "simulation": ("federation.engine=flower-simulation",),
            "sites": ("federation.engine=flower",),  # whose min_images leaves small clients out
        }.items()
    }
    assert paths["plain"] == paths["workers"] == paths["simulation"]
    assert len(set(paths.values())) == 4


def test_a_model_that_other_code_or_another_torch_retrained_is_not_taken_from_the_cache(monkeypatch, tmp_path):
    def place():
        return cached(load_recipe("digits"), (9,), "data", 1)

    before, package = place(), Path(kept.__file__).parents[1]
    assert place() == before
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "2.0.0")
        assert place() != before
    for changed in ("training/sgd.py", "training/objectives/base.py", "data/batches.py", "federation/ask.py"):
        copied = tmp_path / changed.replace("/", "-")
        shutil.copytree(package, copied)
        with monkeypatch.context() as patch:
            patch.setattr(kept, "_PACKAGE", copied)
            assert place() == before
            with (copied / changed).open("a") as file:
                file.write("# other code\n")
            assert place() != before

"""What a client's rules take out of its statistics, and what a cap on influence leaves of a poisoner's."""

import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import conftest
from conftest import classifier, make_images, make_net, write_set
from fedunlearn.channels.groups import find_channels
from fedunlearn.channels.stats import ChannelStats, capped, limit_influence, measure_channels
from fedunlearn.data.batches import batches
from fedunlearn.data.partition import partition
from fedunlearn.errors import RecipeError
from fedunlearn.federation.federation import Federation
from fedunlearn.federation.jobs import ClientData, handle
from fedunlearn.federation.local import LocalEngine
from fedunlearn.federation.measuring import measure
from fedunlearn.federation.privacy import Privacy, epsilon, protect
from fedunlearn.federation.tasks import Measure, channels_of
from fedunlearn.run.commands import run
from fedunlearn.run.experiment import prepare
from fedunlearn.run.recipe import load_recipe

EXAMPLE = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


TAPS = find_channels(make_net(), EXAMPLE, hook="activation").taps


def job(**change):
    return conftest.job(Measure(**({"classes": 3} | change)), make_net(), phase="measure-0")


def answer(images, rules, **change):
    made = job(**change)
    return handle(made, made.model.module, ClientData("x", images), rules)


def stats_of(reply):
    return ChannelStats.from_tensors({name: tensor for name, tensor in reply.tensors.items() if name != "held"})


def test_a_class_below_the_minimum_is_not_reported():
    images = make_images(60)
    few = images.take(
        torch.cat([(images.labels != 1).nonzero().flatten(), (images.labels == 1).nonzero().flatten()[:4]])
    )
    reply = answer(few, Privacy(min_count=5))
    assert reply.tensors["counts"].tolist() == [20, 0, 20]
    assert reply.tensors["held"].tolist() == [20, 0, 20]
    assert reply.images == reply.samples == 40
    open_reply = answer(few, Privacy(min_count=0))
    for name in ("sums.0", "sums.3"):
        assert torch.equal(reply.tensors[name][[0, 2]], open_reply.tensors[name][[0, 2]])
        assert not reply.tensors[name][1].any()
    assert open_reply.tensors["counts"].tolist() == [20, 4, 20]


def test_clipping_is_the_slow_loop_image_by_image():
    images = make_images(12)
    clip = 0.95
    reply = answer(images, Privacy(clip=clip))
    expected = {"0": torch.zeros(3, 6, dtype=torch.float64), "3": torch.zeros(3, 8, dtype=torch.float64)}
    norms = []
    for place, label in enumerate(images.labels.tolist()):
        alone = batches(images.take(slice(place, place + 1)), 1)
        one = measure_channels(make_net(), alone, taps=TAPS, classes=3)
        row = {layer: sums[label] for layer, sums in one.sums.items()}
        norm = math.sqrt(sum(float((own**2).sum()) for own in row.values()))
        norms.append(norm)
        for layer, own in row.items():
            expected[layer][label] += own * min(1.0, clip / norm)
    assert min(norms) < clip < max(norms)
    for layer, sums in expected.items():
        torch.testing.assert_close(reply.tensors[f"sums.{layer}"], sums, rtol=1e-5, atol=1e-6)


def test_one_image_moves_clipped_sums_by_the_clip_at_most():
    images = make_images(12)
    rules = Privacy(clip=0.7)
    whole, without = (stats_of(answer(own, rules)) for own in (images, images.take(slice(1, None))))
    moved = torch.cat([(whole.sums[layer] - without.sums[layer]).flatten() for layer in whole.sums]).norm()
    assert float(moved) <= 0.7 + 1e-6
    assert int((whole.counts - without.counts).abs().sum()) == 1


def test_with_noise_a_client_measures_all_its_images_whatever_is_asked():
    reply = answer(make_images(300), Privacy(clip=1.0, noise=0.5), sample=12)
    assert reply.images == pytest.approx(300, abs=20)
    assert answer(make_images(300), Privacy(clip=1.0, min_count=0), sample=12).images == 12


def test_with_noise_no_refusal_tells_how_many_images_there_are():
    for images in (1, 4, 5):
        assert answer(make_images(images), Privacy(clip=1.0, noise=4.0)).error is None


def test_weights_that_give_nan_for_an_image_tell_nothing_through_noise():
    made = job()
    channels_of(made.model, "activation")  # found before: a model of such weights is refused whatever the images
    made.model.module[0].weight.data[2] = float("nan")
    reply = handle(made, made.model.module, ClientData("x", make_images(30)), Privacy(clip=1.0, noise=0.1))
    assert reply.error is None
    assert all(bool(torch.isfinite(tensor).all()) for tensor in reply.tensors.values())


def test_noise_has_the_spread_it_says_and_hides_the_counts():
    tensors = {
        "counts": torch.full((2000,), 100),
        "held": torch.full((2000,), 100),
        "sums.0": torch.full((2000, 5), 400.0, dtype=torch.float64),
    }
    noised = protect(tensors, Privacy(clip=2.0, noise=3.0))
    assert float(noised["counts"].double().std()) == pytest.approx(3.0, rel=0.1)
    assert float(noised["sums.0"].std()) == pytest.approx(6.0, rel=0.05)
    assert float(noised["sums.0"].mean()) == pytest.approx(400.0, abs=0.3)
    assert torch.equal(noised["held"], noised["counts"])
    again = protect(tensors, Privacy(clip=2.0, noise=3.0))
    assert not torch.equal(noised["sums.0"], again["sums.0"])  # no seed that a server could know


@pytest.mark.parametrize(("clip", "noise"), [(2.0, 3.0), (0.7, 0.5), (1e-4, 1.0)])
def test_noise_is_of_whole_images_and_of_a_grid_far_finer_than_its_scale(clip, noise):
    """A continuous Gaussian in floating point tells of the value by the digits it rounds to; one on a grid cannot."""
    draw = torch.Generator().manual_seed(0)
    sums = 200 * clip * torch.rand(200, 5, generator=draw, dtype=torch.float64)  # as 200 clipped images give
    counts = torch.full((200,), 100)
    noised = protect({"counts": counts, "held": counts, "sums.0": sums}, Privacy(clip=clip, noise=noise))
    assert noised["counts"].dtype == torch.int64
    assert noised["sums.0"].dtype == torch.float64
    step = 2.0 ** (math.floor(math.log2(noise * clip)) - 40)
    steps = noised["sums.0"] / step  # exact: a power of two
    assert steps.equal(steps.round())
    assert not (sums / step).equal((sums / step).round())  # the exact sums are not on it
    assert not (steps / 2).equal((steps / 2).round())  # nor is the grid a coarser one
    assert float((noised["sums.0"] - sums)[sums > 10 * noise * clip].std()) == pytest.approx(noise * clip, rel=0.15)


def test_noise_on_counts_is_the_discrete_gaussian():
    """Against its definition: P(n) is proportional to exp(-n^2 / (2 s^2)) over the whole numbers."""
    counts, scale = torch.full((4000,), 1000), 0.8
    tensors = {"counts": counts, "held": counts, "sums.0": torch.zeros(4000, 1, dtype=torch.float64)}
    moved = (protect(tensors, Privacy(clip=1.0, noise=scale))["counts"] - counts).tolist()
    weights = {n: math.exp(-(n**2) / (2 * scale**2)) for n in range(-12, 13)}
    for n in range(-2, 3):
        expected = weights[n] / sum(weights.values())
        spread = math.sqrt(expected * (1 - expected) / len(moved))
        assert abs(moved.count(n) / len(moved) - expected) < 6 * spread, n


def test_noised_statistics_are_still_statistics():
    reply = answer(make_images(30), Privacy(min_count=5, clip=1.0, noise=4.0))
    counts = reply.tensors["counts"]
    assert reply.images == reply.samples == int(counts.sum())
    for name in ("sums.0", "sums.3"):
        assert bool((reply.tensors[name] >= 0).all())
        assert not reply.tensors[name][counts == 0].any()
    assert bool(((counts == 0) | (counts >= 5)).all())


def test_epsilon_is_that_of_the_gaussian_mechanism():
    """Against the exact trade-off of Balle and Wang (ICML 2018): two mechanisms of noise z are one of z / sqrt(2)."""
    delta = 1e-5
    for noise in (1.0, 4.0):
        found = epsilon(noise, delta)
        mu = math.sqrt(2) / noise
        exact = phi(mu / 2 - found / mu) - math.exp(found) * phi(-mu / 2 - found / mu)
        assert exact == pytest.approx(delta, rel=0.05)
    assert epsilon(4.0, delta, measures=3) > epsilon(4.0, delta)


def phi(x):
    return 0.5 * math.erfc(-x / math.sqrt(2))


def test_the_result_says_what_was_spent(tmp_path):
    settings = ("model.name=nets:tiny", "federation.clients=3", "train.rounds=1", "unlearn.sample=0")
    noise = ("privacy.clip=2.0", "privacy.noise=4.0")
    result = run(load_recipe("digits", settings + noise), tmp_path / "run", command="unlearn")
    assert result["engine"] == {"name": "local", "clients": 3, "images": 1294}  # and not who holds what
    assert result["privacy"]["epsilon"] == pytest.approx(epsilon(4.0, 1e-5))
    assert result["privacy"]["noise"] == 4.0


@pytest.mark.parametrize(
    ("module", "name", "use"),
    [
        ("dp_accounting", "dp-accounting", lambda: epsilon(1.0, 1e-5)),
        (
            "opendp.prelude",
            "OpenDP",
            lambda: protect({name: torch.ones(3).long() for name in ("counts", "held")}, Privacy(clip=1.0, noise=1.0)),
        ),
        (
            "opendp.prelude",
            "OpenDP",
            lambda: prepare(load_recipe("digits", ["privacy.clip=1.0", "privacy.noise=1.0", "unlearn.sample=0"])),
        ),
    ],
)
def test_the_privacy_extra_is_asked_for_by_name(monkeypatch, module, name, use):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RecipeError) as error:
        use()
    assert str(error.value) == f"privacy.noise needs {name}: pip install 'fedunlearn[privacy]'"


@pytest.mark.parametrize(
    ("rules", "text"),
    [
        ({"min_count": -1}, "privacy.min_count must be a whole number of 0 or more, got -1"),
        ({"min_count": "3"}, "privacy.min_count must be a whole number of 0 or more, got '3'"),
        ({"min_images": 2.5}, "privacy.min_images must be a whole number of 0 or more, got 2.5"),
        ({"noise": float("inf"), "clip": 1.0}, "privacy.noise must be 0 or more, got inf"),
        ({"clip": float("nan")}, "privacy.clip must be 0 or more, got nan"),
        ({"noise": 1.0}, "privacy.noise needs privacy.clip above 0"),
    ],
)
def test_rules_that_make_no_sense_are_refused(rules, text):
    with pytest.raises(RecipeError) as error:
        Privacy(**rules)
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (["privacy.noise=1.0"], "privacy.noise needs privacy.clip above 0"),
        (["privacy.noise=1.0", "privacy.clip=1.0"], "privacy.noise needs unlearn.sample = 0"),
        (["privacy.secure=true"], "privacy.secure needs --engine flower or flower-simulation"),
        (
            ["privacy.secure=true", "federation.engine=flower", "unlearn.influence=2.0"],
            "privacy.secure hides what unlearn.mean_of_clients and unlearn.influence need",
        ),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(settings, text):
    with pytest.raises(RecipeError) as error:
        load_recipe("digits", settings)
    assert text in str(error.value)


def make_parts(seed=0, clients=5):
    draw = torch.Generator().manual_seed(seed)
    counts = [torch.randint(1, 20, (3,), generator=draw) for _ in range(clients)]
    return [
        ChannelStats({"0": torch.rand(3, 4, generator=draw, dtype=torch.float64) * own[:, None]}, own) for own in counts
    ]


def test_the_cap_is_its_formula():
    parts = make_parts()
    limited = limit_influence(parts, 1.0)
    for label in range(3):
        counts = sorted(int(part.counts[label]) for part in parts)
        norms = sorted(float(part.means("0")[label].norm()) for part in parts)
        for part, own in zip(parts, limited):
            fewer = min(int(part.counts[label]), counts[2])
            scale = min(1.0, norms[2] / float(part.means("0")[label].norm()))
            assert int(own.counts[label]) == fewer
            torch.testing.assert_close(own.sums["0"][label], part.means("0")[label] * scale * fewer)


def test_of_two_holders_the_larger_is_capped_by_the_smaller():
    counts = (torch.tensor([10]), torch.tensor([10**6]))
    parts = [ChannelStats({"0": own[:, None].double()}, own) for own in counts]
    assert [int(part.counts) for part in limit_influence(parts, 2.0)] == [10, 20]


@given(st.integers(0, 50), st.floats(1.0, 5.0))
def test_a_cap_never_raises_and_statistics_within_it_stay_as_they_are(seed, cap):
    parts = make_parts(seed)
    for before, after in zip(parts, limit_influence(parts, cap)):
        assert bool((after.counts <= before.counts).all())
        assert bool((after.sums["0"] <= before.sums["0"] + 1e-9).all())
    for before, after in zip(parts, limit_influence(parts, 1e6)):
        assert torch.equal(before.counts, after.counts)
        torch.testing.assert_close(before.sums["0"], after.sums["0"])


def test_a_poisoner_weighs_no_more_than_the_cap():
    class Poisoned(LocalEngine):
        def run(self, job):
            replies = list(super().run(job))
            loud = {
                name: tensor * (1e6 if name.startswith("sums.") else 1) for name, tensor in replies[0].tensors.items()
            }
            return [type(replies[0])("client-0", loud, replies[0].images), *replies[1:]]

    clients = partition(make_images(100), by="iid", clients=5)
    net = classifier(make_net())
    honest, _ = measure(net, Federation(LocalEngine(clients)))
    poisoned, _ = measure(net, Federation(Poisoned(clients)))
    limited, _ = measure(net, Federation(Poisoned(clients)), pooling=capped(2.0))
    for layer in honest.sums:
        ratio = poisoned.means(layer).norm(dim=1) / honest.means(layer).norm(dim=1)
        assert float(ratio.min()) > 1e4
        ratio = limited.means(layer).norm(dim=1) / honest.means(layer).norm(dim=1)
        assert float(ratio.max()) < 2.0


def test_a_run_measures_its_clients_once(tmp_path):
    """The control with random channels ranks by nothing: a second measurement would only tell more of the clients."""
    asked = []

    class Counting(LocalEngine):
        def run(self, job):
            asked.append(job.task.kind)
            return super().run(job)

    settings = ["audit.oracles=0", "train.rounds=1", "evidence.feature_maps=false"]
    engine = lambda experiment: Counting(experiment.clients, validation=experiment.validation)  # noqa: E731
    result = run(load_recipe(str(write_set(tmp_path)), settings), tmp_path / "run", engine=engine)
    assert asked.count("measure") == 1
    assert result["controls"]["random"]["cost"]["client_samples"] == result["cost"]["unlearn"]["client_samples"]


def test_a_class_of_exactly_the_minimum_is_reported():
    counts = torch.tensor([5, 4])
    told = protect(
        {"counts": counts, "held": counts, "sums.0": torch.ones(2, 3, dtype=torch.float64)}, Privacy(min_count=5)
    )
    assert told["counts"].tolist() == [5, 0]
    assert told["held"].tolist() == [5, 0]
    assert told["sums.0"].sum(1).tolist() == [3, 0]

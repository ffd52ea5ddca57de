"""The Python API meets what newcomers give it: understood, or refused in one line before a client is asked."""

import unicodedata

import numpy as np
import pytest
import torch
from torch import nn

import fedunlearn as fu
from conftest import classifier, make_images, make_net
from fedunlearn.channels.scores import CRITERIA, forget_classes
from fedunlearn.errors import FedUnlearnError

TRAINING = fu.Training(lr=0.05, batch_size=8)
NAMES = ("ant", "cat", "dog", "elk")


@pytest.fixture(scope="module")
def engine():
    return fu.LocalEngine(fu.partition(make_images(48, 4), by="iid", clients=2, seed=0))


class Blinded(nn.Module):
    """Names class ``rows[k]`` as row ``k`` for an image whose only bright pixel is number ``k``, without training."""

    def __init__(self, rows):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1, bias=False)
        self.head = nn.Linear(4, len(rows), bias=False)
        with torch.no_grad():
            self.conv.weight.fill_(1.0)
            self.head.weight.zero_()
            for row, label in enumerate(rows):
                self.head.weight[row, label] = 1.0

    def forward(self, images):
        return self.head(self.conv(images).flatten(1))


def spots():
    """Return eight images of 2 x 2 pixels: of class ``k`` the pixel ``k`` is bright, so the right answers are known."""
    labels = torch.arange(8) % 4
    pixels = torch.zeros(8, 4, dtype=torch.uint8)
    pixels[torch.arange(8), labels] = 255
    return fu.LabelledImages(pixels.reshape(8, 1, 2, 2), labels, NAMES, (0.0,), (1.0,))


# rows, labels and classes


def test_the_rows_of_a_model_are_those_its_labels_name():
    short = fu.Classifier(Blinded([0, 1, 3]), (1, 2, 2), labels=(0, 1, 3))
    found = fu.evaluate(short, spots(), forget=[2])["accuracy"]
    assert (found["retain"], found["forget"], found["forget_row_kept"]) == (1.0, 0.0, None)
    swapped = fu.Classifier(Blinded([1, 0, 2, 3]), (1, 2, 2), labels=[1, 0, 2, 3])
    assert fu.evaluate(swapped, spots(), forget=[2])["accuracy"]["retain"] == 1.0


@pytest.mark.parametrize(
    ("rows", "labels", "text"),
    [
        ([0, 1, 3], None, "the model has 3 output rows, the data 4 classes: say which class each row names"),
        ([0, 1, 2, 3, 0], None, "the model has 5 output rows, the data 4 classes"),
        ([0, 1, 3], range(4), r"3 output rows and 4 labels \[0, 1, 2, 3\]: give one label per row"),
        ([0, 1, 3], (0,), "3 output rows and 1 labels"),
        ([0, 1, 3], (0, 1, 4), r"must be classes 0 .. 3, got 4"),
        ([0, 1, 3], (0, 1, -1), r"must be classes 0 .. 3, got -1"),
        ([0, 1, 3], (0, 1, 3.0), r"must be classes 0 .. 3, got 3.0"),
        ([0, 1, 3], (0, 1, 1), "two output rows are labelled as class 1"),
    ],
)
def test_rows_that_do_not_fit_are_refused_by_every_entry(engine, tmp_path, rows, labels, text):
    model = fu.Classifier(Blinded(rows), (1, 2, 2), labels=labels)
    images = fu.audit_images(spots(), spots(), forget=[2], per_class=2, seed=0)
    right = fu.Classifier(Blinded([0, 1, 3]), (1, 2, 2), labels=(0, 1, 3))
    for use in (
        lambda: fu.evaluate(model, spots(), forget=[2]),
        lambda: fu.audit(fu.Subject(model), images, oracles={}),
        lambda: fu.audit(fu.Subject(right, model), images, oracles={}),
        lambda: fu.save_checkpoint(tmp_path / "m.safetensors", model, images=spots(), architecture={}),
        lambda: fu.train_rounds(model, fu.Federation(engine), TRAINING, rounds=1),
        lambda: fu.unlearn(model, fu.Federation(engine), forget=[2], cut=fu.Cut(0.3), repair=fu.Repair(TRAINING)),
    ):
        with pytest.raises(fu.ModelError, match=text):
            use()
    assert not list(tmp_path.iterdir())


def test_row_kept_has_the_row_of_the_forgotten_class():
    short = fu.Classifier(Blinded([0, 1, 3]), (1, 2, 2), labels=(0, 1, 3))
    with pytest.raises(fu.ModelError, match="row_kept has no output row for class 2, which was forgotten"):
        fu.evaluate(short, spots(), forget=[2], row_kept=short)
    images = fu.audit_images(spots(), spots(), forget=[2], per_class=2, seed=0)
    with pytest.raises(fu.ModelError, match=r"the audit of unlearned: row_kept must have a row for each class 0 .. 3"):
        fu.audit(fu.Subject(short, short), images, oracles={})
    fewer = fu.Classifier(Blinded([0, 1]), (1, 2, 2), labels=(0, 1))
    with pytest.raises(fu.ModelError, match="the audit of b: the model has no output row for class 3, which stays"):
        fu.audit(fu.Subject(short), images, oracles={"b": fu.Subject(fewer)})


def test_training_needs_the_rows_in_the_order_of_the_labels(engine):
    model = classifier(make_net(classes=4), labels=(1, 0, 2, 3))
    with pytest.raises(fu.ModelError, match=r"rows name the classes \[1, 0, 2, 3\], the clients' labels are 0 .. 3"):
        fu.train_rounds(model, fu.Federation(engine), TRAINING, rounds=1)


@pytest.mark.parametrize("gone", [[12], [-1], [4]])
def test_rows_that_never_were_cannot_be_removed(gone):
    model = classifier(make_net(classes=4))
    with pytest.raises(fu.PlanError, match=r"no output row of class -?\d+: its classes are 0 .. 3"):
        model.without_rows(gone)
    with pytest.raises(fu.PlanError, match=r"no output row of class"):
        fu.Subject.without_rows(model.without_rows([1]), gone)
    assert model.without_rows([3]).without_rows([3, 2]).labels == (0, 1)  # of class 3 the row went before
    with pytest.raises(fu.PlanError, match=r"without the classes \[0, 1, 2, 3\] no output row would stay"):
        model.without_rows(range(4))


def test_training_and_test_images_of_an_audit_have_the_same_classes():
    train, test = make_images(40, 4), make_images(40, 3)
    with pytest.raises(fu.DataError, match="an audit needs the same in the same order"):
        fu.audit_images(train, test, forget=[2], per_class=5, seed=0)
    for forget, text in (([9], "must lie in"), ([2, 2], "one or more different"), ([-1], "must lie in")):
        with pytest.raises(fu.PlanError, match=text):
            fu.audit_images(train, train, forget=forget, per_class=5, seed=0)


# weights that are no numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_every_entry(engine, value):
    net = make_net(classes=4)
    with torch.no_grad():
        net[3].weight[1, 0, 0, 0] = value
    model, fed, images = classifier(net), fu.Federation(engine), make_images(40, 4)
    seen = fu.audit_images(images, images, forget=[2], per_class=5, seed=0)
    for use in (
        lambda: fu.evaluate(model, images, forget=[2]),
        lambda: fu.audit(fu.Subject(model, model), seen, oracles={}),
        lambda: fu.train_rounds(model, fed, TRAINING, rounds=1),
        lambda: fu.unlearn(model, fed, forget=[2], cut=fu.Cut(0.3), repair=fu.Repair(TRAINING)),
    ):
        with pytest.raises(fu.ModelError, match=r"3.weight has 1 values of 432 that are NaN or infinite"):
            use()


def test_outputs_that_overflow_are_refused():
    net, images = make_net(classes=4), make_images(40, 4)
    with torch.no_grad():
        net[8].weight.fill_(1e38)
        net[4].bias.fill_(1e10)
    with pytest.raises(fu.ModelError, match="outputs of the model are NaN or infinite"):
        fu.evaluate(net, images, forget=[2])
    seen = fu.audit_images(images, images, forget=[2], per_class=5, seed=0)
    with pytest.raises(fu.ModelError, match="outputs of the model are NaN or infinite"):
        fu.audit(fu.Subject(classifier(net)), seen, oracles={})


# the classes to forget


@pytest.mark.parametrize(
    ("forget", "expected"),
    [
        (np.int64(2), (2,)),
        ([np.int64(2)], (2,)),
        (np.array([2, 1]), (1, 2)),
        (torch.tensor(2), (2,)),
        (torch.tensor([2]), (2,)),
        ([torch.tensor(2), 0], (0, 2)),
        ({2, 0}, (0, 2)),
        (range(2), (0, 1)),
        (iter((3, 1)), (1, 3)),
        ("dog", (2,)),
        (["dog", 0], (0, 2)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_classes_to_forget_are_understood_in_every_form(forget, expected):
    assert forget_classes(forget, NAMES) == expected


@pytest.mark.parametrize(
    "forget",
    [
        2.0,
        [2.0],
        [1.5],
        True,
        [True],
        np.array([2.0]),
        torch.tensor(2.0),
        torch.tensor([True]),
        np.bool_(True),
        None,
        [float("nan")],
        [[2]],
        b"dog",
        {2: 1},
    ],
    ids=str,
)
def test_what_is_no_class_is_refused(forget):
    with pytest.raises(fu.PlanError, match=r"must be a whole number in 0 .. 3, or by name, got .*: check"):
        forget_classes(forget, NAMES)


def test_names_are_understood_where_they_are_known(engine):
    images = spots()
    assert fu.evaluate(Blinded(range(4)), images, forget="dog")["accuracy"]["forget"] == 1.0
    assert fu.audit_images(images, images, forget=["dog"], per_class=2, seed=0).forget == (2,)
    assert forget_classes(unicodedata.normalize("NFD", "Äpfel"), ("b", "Äpfel")) == (1,)
    with pytest.raises(fu.PlanError, match="no class is named 'cow'; the classes are ant, cat, dog, elk"):
        fu.evaluate(Blinded(range(4)), images, forget="cow")
    done = fu.unlearn(
        make_net(classes=4), fu.Federation(engine), forget="class 2", cut=fu.Cut(0.3), repair=fu.Repair(TRAINING)
    )
    assert done.forget == (2,)
    with pytest.raises(fu.PlanError, match="names are known in recipes and where images are given, got 'dog'"):
        forget_classes("dog", 4)  # as of clients elsewhere, who send no names


# settings


IMAGES = make_images(48, 4)
PARTS = fu.partition(IMAGES, by="iid", clients=2, seed=0)
EXAMPLE = torch.randn(2, 1, 8, 8)


SUBJECT = fu.Subject(classifier(make_net(classes=4)))


def audited(oracles):
    return fu.audit(SUBJECT, fu.audit_images(IMAGES, IMAGES, forget=1, per_class=5, seed=0), oracles=oracles)


def unlearned(engine, **change):
    options = {"cut": fu.Cut(0.3), "repair": fu.Repair(TRAINING)}
    return fu.unlearn(make_net(classes=4), fu.Federation(engine), forget=2, **{**options, **change})


def test_a_criterion_is_understood_by_its_name():
    assert [fu.Ranking(criterion=name).criterion for name in CRITERIA] == list(CRITERIA.values())


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda e: fu.Ranking(criterion="best"), "unlearn.criterion must be one of tf_idf, contrast, margin, random"),
        (lambda e: fu.Ranking(criterion=3), "unlearn.criterion must be one of .* got 3"),
        (lambda e: fu.Ranking(hook="act"), "unlearn.hook must be one of activation, convolution, got 'act'"),
        (lambda e: fu.Ranking(pooling="mean"), r"Ranking\(pooling=...\) must be pooled, mean_of_clients or capped"),
        (lambda e: fu.Ranking(sample=0), r"Ranking\(sample=...\) must be a whole number of at least 1, or None"),
        (lambda e: fu.Ranking(sample=True), r"Ranking\(sample=...\) must be a whole number"),
        (lambda e: fu.Cut("0.2"), "fraction must be at least 0 and below 1, got '0.2'"),
        (lambda e: fu.Cut(20), "fraction must be at least 0 and below 1, got 20"),
        (lambda e: fu.Cut(float("nan")), "fraction must be at least 0 and below 1, got nan"),
        (
            lambda e: fu.Repair(TRAINING, rounds=-1),
            r"Repair\(rounds=...\) must be a whole number of at least 0, got -1",
        ),
        (lambda e: fu.Repair(TRAINING, rounds=1.5), r"Repair\(rounds=...\) must be a whole number"),
        (lambda e: fu.Repair(0.1), r"Repair\(training\) must be a Training, such as Training\(lr=0.05\), got 0.1"),
        (lambda e: fu.Repair(TRAINING, target=90), r"Repair\(target=...\) must lie in 0 .. 1, or be None, got 90"),
        (lambda e: fu.Watch(every=-1), r"Watch\(every=...\) must be a whole number of at least 0, got -1"),
        (lambda e: fu.Watch(target="0.9"), r"Watch\(target=...\) must lie in 0 .. 1"),
        (lambda e: fu.Training(lr="0.1"), r"Training\(lr=...\) is out of range: got '0.1'"),
        (lambda e: fu.Training(lr=float("inf")), r"Training\(lr=...\) is out of range: got inf"),
        (lambda e: fu.Training(lr=0.1, batch_size=2.5), r"Training\(batch_size=...\) is out of range: got 2.5"),
        (lambda e: fu.Training(lr=0.1, augment="crop"), r"Training\(augment=...\) must be a tuple .* got 'crop'"),
        (
            lambda e: fu.Training(lr=0.1, augment=("blur",)),
            r"Training\(augment=...\) must be a tuple of names among",
        ),
        (lambda e: fu.Federation(e, "folder"), r"must be a Journal, got 'folder': .* give Journal\(Path\(folder\)\)"),
        (lambda e: fu.Federation([1, 2]), r"Federation\(engine\) must be an engine, .* got list"),
        (lambda e: fu.Federation(e, seed="1"), r"Federation\(seed=...\) must be a whole number of at least 0, got '1'"),
        (lambda e: fu.Federation(e, participation=0), r"Federation\(participation=...\) must lie above 0"),
        (lambda e: fu.Federation(e, clients="client-0"), "must be names in a tuple, or None, got 'client-0'"),
        (
            lambda e: fu.train_rounds(make_net(classes=4), fu.Federation(e), TRAINING, rounds=-1),
            r"train_rounds\(rounds=...\) must be a whole number of at least 0, got -1",
        ),
        (
            lambda e: fu.train_rounds(make_net(classes=4), fu.Federation(e), 0.1, rounds=1),
            r"train_rounds\(training\) must be a Training",
        ),
        (
            lambda e: fu.train_rounds(make_net(classes=4), fu.Federation(e), TRAINING, rounds=1, watch=5),
            r"train_rounds\(watch=...\) must be a Watch, such as Watch\(every=5\), got 5",
        ),
        (
            lambda e: fu.train_rounds(make_net(classes=4), fu.Federation(e), TRAINING, rounds=1, server=fu.one_cycle),
            r"train_rounds\(server=...\) must be a Server, such as Server\(one_cycle\)",
        ),
        (
            lambda e: fu.train_rounds(make_net(classes=4), e, TRAINING, rounds=1),
            r"must be a Federation, such as Federation\(engine\)",
        ),
        (lambda e: unlearned(e, jointly="no"), r"unlearn\(jointly=...\) must be True or False, got 'no'"),
        (
            lambda e: fu.Repair(TRAINING, server=0.9),
            r"Repair\(server=...\) must be a Server, such as Server\(one_cycle",
        ),
        (lambda e: fu.Repair(TRAINING, batch_norm="no"), r"Repair\(batch_norm=...\) must be True or False, got 'no'"),
        (
            lambda e: unlearned(e, rank=fu.Ranking(lambda s, f: torch.ones(6))),
            "what a criterion returns must be Channel",
        ),
        (
            lambda e: unlearned(e, rank=fu.Ranking(lambda s, f: {"conv9": torch.ones(6)})),
            "there are scores of 'conv9', which is no convolution of the model: score its layers 0, 3",
        ),
        (
            lambda e: unlearned(e, rank=fu.Ranking(pooling=lambda parts: len(list(parts)))),
            "what a pooling returns must be ChannelStats, .* got 2",
        ),
        (lambda e: fu.capped(0), r"capped\(cap\) must be a number of at least 1, got 0"),
        (lambda e: fu.capped("2"), r"capped\(cap\) must be a number of at least 1, got '2'"),
        (
            lambda e: fu.Server("one_cycle"),
            r"Server\(schedule\) must be a function, such as one_cycle, got 'one_cycle'",
        ),
        (lambda e: fu.Compute(workers="2"), "at least one worker, got .*workers='2'"),
        (lambda e: fu.Federation(e, clients=3), r"Federation\(clients=...\) must be names in a tuple, or None, got 3"),
        (
            lambda e: fu.Federation(e, holders="a"),
            r"Federation\(holders=...\) must be names in a tuple, or None, got 'a'",
        ),
        (
            lambda e: fu.Federation(e, exclude=2),
            r"Federation\(exclude=...\) must be numbers of classes in a tuple, got 2",
        ),
        (lambda e: fu.Federation(e, exclude=("a",)), r"Federation\(exclude=...\) must be numbers of classes"),
        (
            lambda e: fu.train_rounds(make_net(classes=4), fu.Federation(e, exclude=(9,)), TRAINING, rounds=1),
            r"Federation\(exclude=...\) names class 9, the clients' classes are 0 .. 3",
        ),
        (
            lambda e: fu.reestimate(classifier(make_net(classes=4)), fu.Federation(e, clients=())),
            "there is nobody to train with",
        ),
        (lambda e: fu.LocalEngine({1: IMAGES, 2: IMAGES}), r"LocalEngine\(clients\) must name each client by text"),
        (lambda e: fu.LocalEngine({"a\nb": IMAGES, "": IMAGES}), r"must name each client by text in one line"),
        (
            lambda e: fu.train_rounds(make_net(classes=4), fu.Federation(e), TRAINING, rounds=1, phase="../x"),
            r"the name of a phase must be text in one line without / or \\, got '../x'",
        ),
        (
            lambda e: fu.train_rounds(make_net(classes=4), fu.Federation(e), TRAINING, rounds=1, phase="x" * 300),
            "the name of a phase must be text in one line",
        ),
        (lambda e: fu.Journal(3), r"Journal\(folder\) must be the path of a folder, or None, got 3"),
        (lambda e: fu.Journal("a\0b"), r"Journal\(folder\) must be the path of a folder"),
        (lambda e: fu.LocalEngine(PARTS, device="meta"), r"LocalEngine\(device=...\) must be 'cpu', .*got 'meta'"),
        (lambda e: audited({"../x": SUBJECT}), r"name of a model names a file, .* without / or \\, got '../x'"),
        (lambda e: audited([SUBJECT]), r"audit\(oracles=...\) must be models by name"),
        (
            lambda e: fu.audit_images(IMAGES, IMAGES, forget=1, per_class=5, seed="a"),
            r"audit_images\(seed=...\) must be a whole number of at least 0, got 'a'",
        ),
        (
            lambda e: fu.audit_images(IMAGES, IMAGES, forget=1, per_class=5, seed=0, lr=-1),
            r"audit_images\(lr=...\) must be a number above 0, got -1",
        ),
        (lambda e: unlearned(e, cut=0.2), r"unlearn\(cut=...\) must be a Cut, such as Cut\(0.2\), got 0.2"),
        (lambda e: unlearned(e, repair=TRAINING), r"unlearn\(repair=...\) must be a Repair, .* of type Training"),
        (lambda e: unlearned(e, rank="contrast"), r"a Ranking, such as Ranking\('contrast'\), got 'contrast'"),
        (lambda e: fu.LocalEngine([IMAGES, IMAGES]), r"LocalEngine\(clients\) must be client names to LabelledImages"),
        (lambda e: fu.LocalEngine({"a": 1, "b": 2}), r"LocalEngine\(clients\)\['a'\] must be LabelledImages, got 1"),
        (lambda e: fu.LocalEngine(PARTS, validation=[IMAGES]), r"LocalEngine\(validation=...\) must be client names"),
        (lambda e: fu.LocalEngine(PARTS, compute="bfloat16"), r"LocalEngine\(compute=...\) must be a Compute"),
        (lambda e: fu.LocalEngine(PARTS, rules="strict"), r"LocalEngine\(rules=...\) must be a Privacy"),
        (
            lambda e: fu.LocalEngine(PARTS, device="gpu"),
            r"LocalEngine\(device=...\) must be 'cpu', or 'cuda'.*got 'gpu'",
        ),
        (lambda e: fu.reestimate(make_net(), fu.Federation(e)), r"reestimate\(model\) must be a Classifier"),
        (lambda e: fu.find_channels(make_net(), IMAGES), r"find_channels\(example\) must be a tensor"),
        (
            lambda e: fu.plan_pruning(make_net(), {}, fu.Cut(0.2)),
            r"plan_pruning\(channels\) must be what find_channels",
        ),
        (
            lambda e: fu.plan_pruning(fu.find_channels(make_net(), EXAMPLE), {}, 0.2),
            r"plan_pruning\(cut\) must be a Cut",
        ),
        (lambda e: fu.prune(classifier(make_net()), fu.PruningPlan()), "expected a model .* got Classifier"),
        (
            lambda e: fu.partition(IMAGES.images, clients=2),
            r"partition\(images\) must be LabelledImages, .* type Tensor",
        ),
        (lambda e: fu.partition(IMAGES, clients="3"), r"partition\(clients=...\) must be a whole number.*got '3'"),
        (lambda e: fu.partition(IMAGES, clients=2.5), r"partition\(clients=...\) must be a whole number.*got 2.5"),
        (lambda e: fu.partition(IMAGES, clients=2, seed="a"), r"partition\(seed=...\) must be a whole number"),
        (lambda e: fu.partition(IMAGES, by="dirichlet", clients=2, alpha="1"), "needs alpha above 0, got '1'"),
        (lambda e: fu.partition(IMAGES, by="bias", clients=4, bias="1"), r"needs a share in \[0, 1\], got '1'"),
        (lambda e: fu.hold_out(PARTS, "0.1"), r"the validation share must lie in \[0, 1\), got '0.1'"),
        (lambda e: fu.evaluate(make_net(classes=4), EXAMPLE, forget=1), r"evaluate\(images\) must be LabelledImages"),
        (
            lambda e: fu.evaluate(make_net(classes=4), IMAGES, forget=1, row_kept=make_net(classes=4)),
            r"evaluate\(row_kept=...\) must be a Classifier",
        ),
        (lambda e: fu.Subject(make_net()), r"Subject\(model\) must be a Classifier"),
        (lambda e: fu.Subject(classifier(make_net()), make_net()), r"Subject\(row_kept\) must be a Classifier"),
        (
            lambda e: fu.audit_images(IMAGES, EXAMPLE, forget=1, per_class=5, seed=0),
            r"audit_images\(test\) must be LabelledImages",
        ),
        (
            lambda e: fu.audit_images(IMAGES, IMAGES, forget=1, per_class=0, seed=0),
            r"audit_images\(per_class=...\) must be a whole number of at least 1, got 0",
        ),
        (lambda e: fu.audit(classifier(make_net()), IMAGES, oracles={}), r"audit\(images\) must be what audit_images"),
        (
            lambda e: fu.audit(make_net(), fu.audit_images(IMAGES, IMAGES, forget=1, per_class=5, seed=0), oracles={}),
            "the audit of unlearned: the model must be a Subject",
        ),
        (
            lambda e: fu.save_checkpoint("m.safetensors", make_net(), images=IMAGES, architecture={}),
            r"save_checkpoint\(model\) must be a Classifier",
        ),
        (
            lambda e: fu.save_checkpoint("m.safetensors", classifier(make_net()), images=EXAMPLE, architecture={}),
            r"save_checkpoint\(images=...\) must be LabelledImages",
        ),
        (lambda e: fu.load_weights(make_net(), {}), r"load_weights\(model\) must be a Classifier"),
        (lambda e: fu.load_weights(classifier(make_net()), {}), r"load_weights\(weights\) must be what read_weights"),
        (lambda e: fu.build_model("small-cnn", classes="10", colours=1), r"build_model\(classes=...\) must be a whole"),
    ],
)
def test_settings_of_another_kind_are_refused_in_one_line(engine, make, text):
    with pytest.raises(FedUnlearnError, match=text) as told:
        make(engine)
    assert "\n" not in str(told.value)


def test_an_argument_that_there_is_not_is_named_by_python():
    with pytest.raises(TypeError, match="unexpected keyword argument 'optimizer'"):
        fu.Training(lr=0.1, optimizer="adam")


def test_numbers_of_numpy_are_those_of_python_in_a_federation(engine):
    fed = fu.Federation(engine, seed=np.int64(1), exclude=(np.int64(2),))
    assert repr((fed.seed, fed.exclude)) == "(1, (2,))"


def test_a_journal_takes_the_name_of_its_folder(tmp_path):
    fu.Journal(str(tmp_path / "run"))
    assert (tmp_path / "run" / "rounds.jsonl").exists()


# models


class Compiled(nn.Module):
    """A module that holds another as ``torch.compile`` does."""

    def __init__(self, module):
        super().__init__()
        self._orig_mod = module


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.LazyLinear(4)


@pytest.mark.filterwarnings("ignore:Lazy modules", "ignore:.*torch.jit")
@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda net: net.state_dict(), r"expected a model \(torch.nn.Module\), got OrderedDict: build the model first"),
        (Compiled, "wrapped by torch.compile, which hides its layers: give model._orig_mod"),
        (nn.DataParallel, "wrapped by DataParallel, which hides its layers: give model.module"),
        (lambda net: torch.jit.trace(net.eval(), torch.ones(2, 1, 8, 8)), "the model is scripted"),
        (lambda net: Lazy(), r"head.weight has no shape yet \(a lazy layer\)"),
        (lambda net: net.to("meta"), r"0.weight has no values \(it is on the meta device\)"),
    ],
)
def test_models_of_another_kind_are_refused_by_every_entry(engine, make, text):
    model, images = make(make_net(classes=4)), make_images(40, 4)
    for use in (
        lambda: fu.evaluate(model, images, forget=[2]),
        lambda: fu.train_rounds(model, fu.Federation(engine), TRAINING, rounds=1),
        lambda: fu.unlearn(model, fu.Federation(engine), forget=[2], cut=fu.Cut(0.3), repair=fu.Repair(TRAINING)),
    ):
        with pytest.raises(fu.ModelError, match=text):
            use()

"""Images of torch data sets: drawn when they are needed, and all the rest as with images in memory."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import fedunlearn as fu
from conftest import classifier, make_images, make_net, normalised
from fedunlearn.audits.images import audit_images
from fedunlearn.audits.verdict import NEEDED
from fedunlearn.checkpoint import read_weights, save_checkpoint
from fedunlearn.data.batches import batches
from fedunlearn.data.datasets import DatasetImages, as_dataset, from_dataset
from fedunlearn.data.images import joined
from fedunlearn.data.partition import partition
from fedunlearn.errors import DataError, FederationError, RecipeError, RunError
from fedunlearn.evidence.words import VERDICTS
from fedunlearn.federation.federation import Federation
from fedunlearn.federation.journal import Journal
from fedunlearn.federation.local import LocalEngine
from fedunlearn.federation.rounds import train_rounds
from fedunlearn.training.compute import Compute
from fedunlearn.training.sgd import Training, train_locally

NAMES = ("rows", "columns", "squares")


class Drawn(Dataset):
    """A data set of the user's that counts what it is asked for."""

    def __init__(self, images, *, dtype=torch.float32):
        self.pixels, self.labels, self.asked = normalised(images).to(dtype), images.labels, []

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        self.asked.append(row)
        return self.pixels[row], self.labels[row]


def test_a_batch_asks_for_its_own_images_and_sees_them_as_they_are_given():
    images = make_images(12)
    drawn = Drawn(images, dtype=torch.float64)
    own = from_dataset(drawn, NAMES, labels=images.labels)
    assert repr(own) == "DatasetImages(12 images 1x8x8, 3 classes)"
    assert drawn.asked == [0]  # for the shape
    drawn.asked.clear()
    batch, labels = next(batches(own, 4))
    assert drawn.asked == [0, 1, 2, 3]
    assert batch.equal(normalised(images)[:4])
    assert labels.equal(images.labels[:4])
    assert own.images.untyped_storage().nbytes() == 1  # no copy of anything


def test_training_on_a_data_set_is_training_on_the_same_images_in_memory():
    images = make_images(60)
    own, trained = from_dataset(Drawn(images), NAMES), []
    for given in (images, own):
        net = make_net()
        train_locally(net, given, Training(0.1, 8), lr=0.1, draw=torch.Generator().manual_seed(0))
        trained.append(net.state_dict())
    for name, tensor in trained[0].items():
        torch.testing.assert_close(trained[1][name], tensor, rtol=1e-4, atol=1e-5)


def test_images_are_taken_left_out_shared_and_joined_as_others_are():
    images = make_images(60)
    own = from_dataset(Drawn(images), NAMES)
    parts = fu.partition(own, by="iid", clients=3, seed=0)
    same = fu.partition(images, by="iid", clients=3, seed=0)
    for name, part in parts.items():
        assert isinstance(part, DatasetImages)
        assert part.labels.equal(same[name].labels)
        torch.testing.assert_close(part.pixels(slice(0, 5)), same[name].pixels(slice(0, 5)))
    together = joined(parts.values())
    assert together.labels.equal(joined(same.values()).labels)
    torch.testing.assert_close(
        together.pixels(torch.tensor([0, 59])), joined(same.values()).pixels(torch.tensor([0, 59]))
    )
    assert own.without([1]).labels.unique().tolist() == [0, 2]
    assert len(joined([own])) == 60


def test_images_in_memory_and_of_a_data_set_are_not_joined():
    images = make_images(12)
    own = from_dataset(TensorDataset(images.pixels(slice(None)), images.labels), images.classes)
    plain = fu.LabelledImages(images.images, images.labels, images.classes, (0.0,), (1.0,))
    for parts in ((own, plain), (plain, own)):
        with pytest.raises(DataError, match="images of a data set and images in memory cannot be joined"):
            joined(parts)


def test_labels_are_those_that_are_given_or_the_targets_or_those_of_one_pass():
    images = make_images(9)
    drawn = Drawn(images)
    assert from_dataset(drawn, NAMES).labels.equal(images.labels)
    assert drawn.asked == [0, *range(9)]
    drawn.targets, drawn.labels = [2] * 9, torch.full((9,), 2)
    assert from_dataset(drawn, NAMES).labels.tolist() == [2] * 9
    assert from_dataset(drawn, NAMES, labels=[1] * 9).labels.tolist() == [1] * 9


def test_targets_that_are_transformed_are_not_those_of_the_items():
    drawn = Drawn(make_images(9))
    drawn.targets, drawn.target_transform = [2] * 9, lambda label: label
    assert from_dataset(drawn, NAMES).labels.equal(drawn.labels)


def test_no_images_have_a_shape_and_gradients_stay_with_the_data_set():
    own = from_dataset(TensorDataset(torch.rand(4, 1, 8, 8).requires_grad_(), torch.arange(4) % 3), NAMES)
    assert own.pixels(slice(0, 0)).shape == (0, 1, 8, 8)
    assert own.stored(torch.tensor(1)).shape == (1, 1, 8, 8)
    assert not own.pixels(slice(None)).requires_grad


class Endless(Dataset):
    def __getitem__(self, row):
        return torch.rand(1, 8, 8), 0


class Items(Dataset):
    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, row):
        return self.items[row]


class Failing(Items):
    def __init__(self):
        super().__init__(1)

    def __getitem__(self, row):
        raise OSError("gone")


IMAGE = torch.rand(1, 8, 8)


@pytest.mark.parametrize(
    ("dataset", "values", "text"),
    [
        ([1, 2], {}, "from_dataset(dataset) must be a torch.utils.data.Dataset"),
        (Endless(), {}, "the data set has no length"),
        (Items(), {}, "the data set holds no images"),
        (Items(IMAGE), {}, "the data set's item 0 is no pair of an image and a label"),
        (Items((IMAGE.byte(), 0)), {}, "the data set's image 0 is torch.uint8 of shape (1, 8, 8), expected a float"),
        (Items(("picture", 0)), {}, "the data set's image 0 is str, expected a float tensor"),
        (Items((IMAGE[0], 0)), {}, "the data set's image 0 is torch.float32 of shape (8, 8)"),
        (Items((IMAGE, "rows")), {}, "the data set's label 0 is 'rows', expected the number of a class"),
        (Items((IMAGE, 0), (IMAGE, 0)), {"labels": [0]}, "2 images and labels of torch.int64 and shape (1,)"),
        (Items((IMAGE, 0)), {"labels": [0.5]}, "labels of torch.float32 and shape (1,)"),
        (Items((IMAGE, 3)), {}, "labels must lie in 0 .. 2"),
        (
            Items((IMAGE, 0)),
            {"labels": ["rows"]},
            "labels must be whole numbers, one per image, and classes their names",
        ),
        (
            Items((IMAGE, 0)),
            {"classes": 2},
            "labels must be whole numbers, one per image, and classes their names, but",
        ),
        (Failing(), {}, "the data set fails at item 0 (OSError: gone)"),
        (Items((IMAGE, 0)), {"classes": "rows"}, "classes must be a tuple of names"),
    ],
)
def test_a_data_set_that_cannot_be_used_is_refused(dataset, values, text):
    with pytest.raises(DataError, match=re.escape(text)):
        from_dataset(dataset, **({"classes": NAMES} | values))


def test_an_image_of_another_shape_is_named_when_it_is_drawn():
    own = from_dataset(Items((IMAGE, 0), (torch.rand(1, 9, 8), 1)), NAMES)
    with pytest.raises(DataError, match=r"the data set's image 1 has shape \(1, 9, 8\), the first one \(1, 8, 8\)"):
        own.pixels(slice(None))


def test_the_optimiser_is_the_users_own():
    images, made = make_images(32), []

    def adam(parameters, lr):
        made.append(lr)
        return torch.optim.AdamW(parameters, lr, weight_decay=0.0)

    net, by_hand = make_net(), make_net()
    training = Training(0.1, 8, momentum=0.0, weight_decay=0.0)
    train_locally(
        net, images, training, lr=0.01, draw=torch.Generator().manual_seed(0), compute=Compute(optimiser=adam)
    )
    assert made == [0.01]
    optimiser = torch.optim.AdamW(by_hand.parameters(), 0.01, weight_decay=0.0)
    by_hand.train()
    for batch, labels in batches(images, 8, draw=torch.Generator().manual_seed(0)):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(by_hand(batch), labels).backward()
        optimiser.step()
    for name, tensor in by_hand.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], tensor)


def test_what_is_no_optimiser_is_refused():
    with pytest.raises(RecipeError, match=r"Compute\(optimiser=...\) must make an optimiser of parameters"):
        Compute(optimiser="adam")
    wrong = Compute(optimiser=lambda parameters, lr: 0.1)
    with pytest.raises(RecipeError, match=r"Compute\(optimiser=...\) made a float, expected a torch.optim.Optimizer"):
        train_locally(
            make_net(), make_images(8), Training(0.1, 8), lr=0.1, draw=torch.Generator().manual_seed(0), compute=wrong
        )


def by_hand(model, data, lr):
    """Train as a user's own script would: two passes in order, by SGD with gradients clipped."""
    optimiser = torch.optim.SGD(model.parameters(), lr)
    for _ in range(2):
        for image, label in DataLoader(data, batch_size=8):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(model(image), label).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
    return 2 * len(data)


def test_the_train_function_is_the_users_own_and_sees_no_class_to_leave_out():
    images, seen = make_images(60), []

    def train(model, data, lr):
        assert model.training
        seen.append(sorted({label for _, label in data}))
        return by_hand(model, data, lr)

    engine = fu.LocalEngine(fu.partition(images, by="iid", clients=2, seed=0), compute=Compute(train=train, workers=1))
    fed = fu.Federation(engine)
    net = make_net()
    trained = fu.train_rounds(net, fed.keeping(exclude=[1]), Training(0.05, 8), rounds=1)
    assert seen == [[0, 2], [0, 2]]
    copies, shares = [], []
    for client in engine.clients:
        own = fu.partition(images, by="iid", clients=2, seed=0)[client].without([1])
        model = make_net().to(memory_format=torch.channels_last).train()
        by_hand(model, as_dataset(own), 0.05)
        copies.append(model.state_dict())
        shares.append(len(own))
    for name, tensor in trained.module.named_parameters():
        mean = sum(share * own[name] for share, own in zip(shares, copies)) / sum(shares)
        torch.testing.assert_close(tensor, mean)
    (step,) = fed.journal.steps("train")
    assert sum(entry.samples for entry in step.entries if entry.job == "train") == 2 * sum(shares)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_what_a_train_function_cannot_do_is_refused():
    for wrong in ({"train": "loop"}, {"train": by_hand, "optimiser": torch.optim.Adam}):
        with pytest.raises(RecipeError, match=r"Compute\(train=...\) must be a function of a model, a data set and"):
            Compute(**wrong)
    clients = fu.partition(make_images(60), by="iid", clients=2, seed=0)
    lazy = fu.Federation(fu.LocalEngine(clients, compute=Compute(train=lambda model, data, lr: None)))
    with pytest.raises(FederationError, match=r"Compute\(train=...\) returned None, expected how many images it saw"):
        fu.train_rounds(make_net(), lazy, Training(0.1, 8), rounds=1)

    def wider(model, data, lr):
        model[-1] = torch.nn.Linear(model[-1].in_features, 7)
        return by_hand(model, data, lr)

    grown = fu.Federation(fu.LocalEngine(clients, compute=Compute(train=wider)))
    with pytest.raises(FederationError, match="left a model with other tensors than it was given: change the values"):
        fu.train_rounds(make_net(), grown, Training(0.1, 8), rounds=1)
    own = fu.Federation(fu.LocalEngine(clients, compute=Compute(train=by_hand)))
    erasing = Training(0.1, 8, objective=fu.Erasing(complement=1.0))
    with pytest.raises(FederationError, match="it cannot do the objective of this job: leave the objective out of"):
        fu.unlearn(make_net(), own, forget=1, cut=fu.Cut(0.2), repair=fu.Repair(erasing))


def test_what_a_train_function_leaves_on_the_model_does_not_reach_the_next_client(tmp_path):
    clients = fu.partition(make_images(60), by="iid", clients=2, seed=0)
    found = []

    def train(model, data, lr):
        found.append(all(own.requires_grad and own.grad is None for own in model.parameters()))
        seen = by_hand(model, data, lr)
        model.requires_grad_(False)
        return np.int64(seen)  # as a count of numpy's

    journal = fu.Journal(tmp_path, header={})
    fed = fu.Federation(fu.LocalEngine(clients, compute=Compute(train=train, workers=1)), journal)
    net = fu.train_rounds(make_net(), fed, Training(0.1, 8), rounds=2)
    assert found == [True] * 4
    assert all(own.requires_grad for own in net.module.parameters())
    lines = (tmp_path / "rounds.jsonl").read_text().splitlines()[1:]
    assert [json.loads(line)["entries"][0]["samples"] for line in lines] == [120, 120]


def test_images_are_a_data_set_that_ends():
    own = make_images(3)
    pairs = list(as_dataset(own))
    assert [label for _, label in pairs] == own.labels.tolist()
    torch.testing.assert_close(torch.stack([image for image, _ in pairs]), own.pixels(slice(None)))
    assert as_dataset(own)[-1][1] == int(own.labels[-1])
    with pytest.raises(IndexError, match="there are 3 images, got 3"):
        as_dataset(own)[3]
    drawn = DataLoader(Subset(as_dataset(own), torch.tensor([2, 0])), batch_size=2)  # numbers as torch draws them
    assert next(iter(drawn))[1].tolist() == own.labels[[2, 0]].tolist()
    with pytest.raises(IndexError, match=r"got slice\(0, 2, None\): give the number of one"):
        as_dataset(own)[0:2]


def test_from_training_to_findings_with_data_model_and_optimiser_of_the_users_own():
    train, test = (from_dataset(Drawn(make_images(n, seed=s)), NAMES) for n, s in ((240, 0), (90, 1)))
    clients = fu.partition(train, by="iid", clients=3, seed=0)
    compute = Compute(optimiser=torch.optim.Adam)
    fed = fu.Federation(fu.LocalEngine(clients, compute=compute))
    training = Training(0.01, 16)
    model = fu.train_rounds(make_net(), fed, training, rounds=2)
    result = fu.unlearn(model, fed, forget=1, cut=fu.Cut(0.3), repair=fu.Repair(training))
    kept = fed.keeping(exclude=[1])
    oracles = {
        f"retrained-{k}": fu.Subject.without_rows(
            fu.train_rounds(make_net(seed=k), kept, training, rounds=2, phase=f"retrain-{k}"), [1]
        )
        for k in (1, 2, 3)
    }
    images = audit_images(train, test, forget=1, per_class=20, seed=0)
    before = {"original": fu.Subject(model, model)}
    findings = fu.audit(fu.Subject(result.model, result.repaired), images, oracles=oracles, controls=before)
    assert set(NEEDED) <= set(findings.models["unlearned"].figures)
    assert findings.judgements["original"]["verdict"] in VERDICTS
    assert f"{findings.verdict}: {findings.judgements['unlearned']['reason']}" == str(findings).splitlines()[0]


class Renumbered(Dataset):
    """Leaves the targets it was made with as they are."""

    def __init__(self, order, numbers):
        self.images, self.targets = torch.rand(40, 1, 8, 8), (torch.arange(40) % 2).tolist()
        self.order, self.numbers = order, numbers

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, row):
        own = self.order[row]
        return self.images[own], self.numbers[self.targets[own]]


def test_targets_that_items_gainsay_are_refused():
    as_it_is, backwards = list(range(40)), list(range(39, -1, -1))
    assert from_dataset(Renumbered(as_it_is, (0, 1)), ("a", "b")).counts().tolist() == [20, 20]
    for order, numbers in ((as_it_is, (1, 0)), (backwards, (0, 1))):
        data = Renumbered(order, numbers)
        with pytest.raises(DataError, match="gives item 0 the label 1, and its targets 0: say which, from_dataset"):
            from_dataset(data, ("a", "b"))
        assert from_dataset(data, ("a", "b"), labels=data.targets).counts().tolist() == [
            20,
            20,
        ]  # who names them means it
        own = [data[row][1] for row in range(40)]
        assert from_dataset(data, ("a", "b"), labels=own).labels.tolist() == own


class Targeted(Renumbered):
    """Has one label, whatever its targets are."""

    def __init__(self, targets):
        super().__init__(list(range(40)), (0, 1))
        self.targets = targets

    def __len__(self):
        return 40

    def __getitem__(self, row):
        return self.images[row], 0


@pytest.mark.parametrize(
    "targets", [["a"] * 40, torch.eye(40), [[0, 1]] * 40, [None] * 40, dict.fromkeys(range(40), 0), [float("nan")] * 40]
)
def test_targets_of_another_kind_are_told_in_one_line(targets):
    with pytest.raises(DataError):
        from_dataset(Targeted(targets), ("a", "b"))


def test_a_checkpoint_does_not_say_how_a_data_set_normalises(tmp_path):
    """ "Mean 0, deviation 1" would be believed, and the right values refused."""
    images = make_images(30)
    given = from_dataset(TensorDataset(images.pixels(slice(None)), images.labels), images.classes)
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, classifier(make_net()), images=given, architecture={})
    weights = read_weights(path)
    assert (weights.mean, weights.std) == (None, None)
    assert weights.classes == images.classes


def test_a_journal_does_not_go_on_with_other_images(tmp_path):
    def trained(clients, **rest):
        journal = Journal(tmp_path / "journal")
        try:
            fed = Federation(LocalEngine(clients), journal, **rest)
            return train_rounds(make_net(), fed, Training(lr=0.1, batch_size=8), rounds=1)
        finally:
            journal.leave()

    images = make_images(60)
    clients = partition(images, by="iid", clients=3)
    first = trained(clients)
    assert all(map(torch.equal, first.module.state_dict().values(), trained(clients).module.state_dict().values()))
    black = replace(images, images=images.images * 0)
    for others in (partition(images, by="iid", clients=3, seed=5), partition(black, by="iid", clients=3)):
        with pytest.raises(RunError, match="images"):
            trained(others)


class OneWrong(Dataset):
    """Says of item 20 of 40 another label than its targets do."""

    targets = (0, 1) * 20

    def __len__(self):
        return 40

    def __getitem__(self, row):
        return torch.zeros(1, 4, 4), 1 if row == 20 else self.targets[row]


def test_a_target_in_the_middle_that_its_item_gainsays_is_refused():
    with pytest.raises(DataError, match="gives item 20 the label 1, and its targets 0"):
        from_dataset(OneWrong(), ("a", "b"))

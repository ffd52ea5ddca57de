"""Small inputs that many tests share."""

import json
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import settings
from torch import Tensor, nn

from fedunlearn.channels.plan import Classifier
from fedunlearn.data.images import LabelledImages
from fedunlearn.evidence.keys import make_keys
from fedunlearn.federation.ask import ask
from fedunlearn.federation.jobs import Engine, Job, Reply, Task
from fedunlearn.federation.ledger import Entry
from fedunlearn.run.commands import run
from fedunlearn.run.recipe import load_recipe

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium (apt-get install chromium)")
torch.set_num_threads(1)
# A machine at work on something else is slow, not wrong; pytest-timeout ends what hangs.
settings.register_profile("patient", settings.get_profile(settings.get_current_profile_name()), deadline=None)
settings.load_profile("patient")
# Of the properties that change bytes and messages at random: a few in the suite, ten thousand by hand.
EXAMPLES = int(os.environ.get("FEDUNLEARN_EXAMPLES", "100"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest: two workers take a file at a time (``--dist loadfile``)."""
    items.sort(key=lambda item: item.path.stem not in ("test_deployment", "test_run", "test_cli"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the user's cache of retrained models out of the tests, those in child processes too."""
    monkeypatch.setitem(os.environ, "FEDUNLEARN_CACHE", str(tmp_path_factory.mktemp("cache")))


def make_images(count: int = 60, classes: int = 3, *, side: int = 8, colours: int = 1, seed: int = 0) -> LabelledImages:
    """Return images whose class shows: rows, columns, a chequerboard or squares of light on noise."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    images = torch.randint(0, 80, (count, colours, side, side), generator=draw, dtype=torch.uint8)
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    patterns = (row % 2 == 0, column % 2 == 0, (row + column) % 2 == 0, (row // 2 + column // 2) % 2 == 0)
    for label in range(classes):
        images[labels == label] += 150 * patterns[label].to(torch.uint8)
    names = tuple(f"class {label}" for label in range(classes))
    return LabelledImages(images, labels, names, (0.3,) * colours, (0.25,) * colours)


def tiers(name: str) -> pytest.MarkDecorator | tuple[()]:
    """Return the mark of the deeper networks, which repeat the blocks of ResNet20 and VGG11."""
    return () if name in ("small-cnn", "resnet20", "vgg11") else pytest.mark.slow


def collected(engine: Engine, job: Job) -> tuple[list[Reply], Entry]:
    """Return all usable replies to ``job``, and what it cost."""
    return ask(engine, job, list)


def classifier(net: nn.Module, shape: tuple[int, int, int] = (1, 8, 8), **values: object) -> Classifier:
    """Return ``net`` as a classifier of small grey images."""
    return Classifier(net, shape, **values)


def job(task: Task, net: nn.Module | Classifier, *, phase: str = "test", **values: object) -> Job:
    """Return ``task`` as a job on ``net``."""
    return Job(task=task, model=net if isinstance(net, Classifier) else classifier(net), phase=phase, **values)


def make_net(classes: int = 3, colours: int = 1, *, seed: int = 0) -> nn.Sequential:
    """Return a CNN of two convolutions with batch normalisation whose running statistics are not trivial."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(colours, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, classes),
    )
    settle(net, colours)
    return net


def settle(net: nn.Module, colours: int, *, side: int = 8) -> None:
    """Give batch normalisation layers statistics and affine values as if trained."""
    net.train()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
        for _ in range(3):
            net(torch.randn(16, colours, side, side))
    net.eval()


def logits(net: nn.Module, images: Tensor) -> Tensor:
    """Return the output of ``net`` in evaluation mode."""
    with torch.no_grad():
        return net.eval()(images)


def normalised(images: LabelledImages) -> Tensor:
    """Return the images as a model sees them."""
    return (images.images.float() / 255 - 0.3) / 0.25


@pytest.fixture
def net() -> nn.Sequential:
    return make_net()


@pytest.fixture
def images() -> LabelledImages:
    return make_images()


TINY = """
[data]
source = "npz"
path = {data}
validation = 0.2

[federation]
clients = 3

[model]
name = {model}

[compute]
precision = "float32"

[train]
rounds = 3
batch_size = 8
lr = 0.1

[unlearn]
forget = [2]
criterion = "contrast"
fraction = 0.3
rounds = 2
lr = 0.05

[audit]
oracles = {oracles}
"""


def write_set(
    folder: Path, *, oracles: int = 1, names: tuple[str, ...] | None = None, model: str = "nets:tiny"
) -> Path:
    """Write an npz of striped images and the recipe that reads it, and return the recipe."""
    train, test = make_images(120, 4), make_images(60, 4, seed=1)
    arrays = {} if names is None else {"classes": np.array(names)}
    for split, images in (("train", train), ("test", test)):
        arrays |= {f"x_{split}": images.images[:, 0].numpy(), f"y_{split}": images.labels.numpy()}
    np.savez(folder / "set.npz", **arrays)
    text = TINY.format(data=json.dumps(str(folder / "set.npz")), oracles=oracles, model=json.dumps(model))
    (folder / "tiny.toml").write_text(text, "utf-8")
    return folder / "tiny.toml"


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    """A browser; the driver goes with the tests of a file, as nothing else could run an event loop beside it."""
    from playwright.sync_api import sync_playwright

    flags = ("no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update", "disable-sync")
    with sync_playwright() as playwright:
        own = playwright.chromium.launch(executable_path=BROWSER, args=[f"--{flag}" for flag in flags])
        yield own
        own.close()


@pytest.fixture(scope="session")
def signed(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder with an audited run as ``plain``, the same signed as ``run``, and the keys; tests change copies.

    Made once for all workers: the first that needs it locks the others out until it is there.
    """
    if worker_id == "master":
        return _signed(tmp_path_factory.mktemp("signed"))
    folder = tmp_path_factory.getbasetemp().parent / "signed"
    made = folder.with_suffix(".made")
    with FileLock(folder.with_suffix(".lock")):
        if not made.exists():
            _signed(folder)
            made.touch()
    return folder


@pytest.fixture
def copied(signed: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Return a copy of the signed run to do damage to, and the public key."""
    shutil.copytree(signed / "run", tmp_path / "run")
    return tmp_path / "run", signed / "operator.pub"


def _signed(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    recipe = load_recipe(str(write_set(folder, oracles=4)), ['evidence.request="case 7"', "evidence.feature_maps=true"])
    make_keys(folder / "operator")
    run(recipe, folder / "run")
    shutil.copytree(folder / "run", folder / "plain")
    run(recipe, folder / "run", key=folder / "operator")  # a finished run is signed later
    return folder


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Make every write beyond ``size`` bytes of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

"""What a recipe names: the images, each client's share of them, and what the rows of given weights mean."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedunlearn.channels.scores import forget_classes
from fedunlearn.checkpoint import Weights, read_weights
from fedunlearn.data.images import LabelledImages
from fedunlearn.data.partition import hold_out, partition
from fedunlearn.data.readers import READERS
from fedunlearn.data.splits import Splits
from fedunlearn.errors import DataError, ModelError, PlanError, RecipeError
from fedunlearn.federation.jobs import ClientData
from fedunlearn.run.recipe import Recipe


def read_data(recipe: Recipe) -> Splits:
    """Return the images that the recipe names.

    Raises:
        RecipeError: the recipe does not say where they are, or normalises them by other numbers than one per colour.
        DataError: they cannot be read.
    """
    if recipe.data.source != "digits" and not recipe.data.path:
        raise RecipeError(f"the source {recipe.data.source} is read from disk: give its place with --data")
    splits = READERS[recipe.data.source](Path(recipe.data.path), recipe.data.official, recipe.data.size)
    mean, std = tuple(recipe.data.mean), tuple(recipe.data.std)
    if not mean and not std:
        return splits
    try:
        return Splits(*(replace(images, mean=mean, std=std) for images in splits))
    except DataError as error:
        raise RecipeError(f"data.mean and data.std, a number per colour of each: {error}") from error


def normalised_for(splits: Splits, weights: Weights, recipe: Recipe) -> Splits:
    """Return the images normalised as ``weights`` were trained, where the file says how.

    Raises:
        RecipeError: the file says that the weights are of another shortcut, or normalisation, than the recipe.
        ModelError: the normalisation has another number of colours than the images.
    """
    if weights.shortcut not in (None, recipe.model.shortcut):
        raise RecipeError(
            f"{weights.path} was trained with shortcut {weights.shortcut}, the recipe has {recipe.model.shortcut}: "
            f"use --set model.shortcut={weights.shortcut}"
        )
    if weights.mean is None or weights.std is None:
        return splits
    there = tuple(recipe.data.mean), tuple(recipe.data.std)
    if there not in (((), ()), (weights.mean, weights.std)):
        raise RecipeError(
            f"{weights.path} was trained on images normalised by {weights.mean} and {weights.std}, and data.mean and "
            f"data.std are {there[0]} and {there[1]}: leave them out, the file says it"
        )
    if len(weights.mean) != splits.train.colours:
        raise ModelError(
            f"{weights.path} was trained on images of {len(weights.mean)} colours, the data has {splits.train.colours}"
        )
    return Splits(*(replace(images, mean=weights.mean, std=weights.std) for images in splits))


def normalised_by(images: LabelledImages, recipe: Recipe, weights: Weights | None) -> str:
    """Return what images are normalised by, and who said so: a model that was trained on others answers wrongly."""
    mean, std = (", ".join(f"{number:.3g}" for number in numbers) for numbers in (images.mean, images.std))
    whose = "of the training images"
    if weights is not None and weights.mean is not None:
        whose = "as the file of the weights says"
    elif recipe.data.mean:
        whose = "as data.mean and data.std say"
    elif weights is not None:
        whose += ", as the weights name none: where they were trained on others, set data.mean and data.std"
    return f"pixels are normalised by mean {mean} and deviation {std}, {whose}"


def numbered(weights: Weights, classes: Sequence[str]) -> tuple[Weights, tuple[int, ...]]:
    """Return weights with the numbers that ``classes`` has for their rows, and the classes that they forgot before.

    Raises:
        ModelError: their rows are not in the order of ``classes``.
    """
    weights = weights.numbered(classes)
    labels = weights.labels
    if labels is None:
        return weights, ()
    if list(labels) != sorted(labels) or not set(labels) <= set(range(len(classes))):
        raise ModelError(
            f"{weights.path} has output rows for the classes {list(labels)}, expected some of 0 .. {len(classes) - 1} "
            "in their order: give the data in the order of classes that the model was trained with"
        )
    return weights, tuple(sorted(set(range(len(classes))) - set(labels)))


def check_numbers(forget: Sequence[int | str], classes: Sequence[str], weights: Weights) -> None:
    """Refuse classes by number where data and weights count them otherwise, as after the images of one were deleted.

    Args:
        forget: classes, by number or name.
        classes: of the data.
        weights: as they were read.

    Raises:
        PlanError: a class is given by its number, which is that of another class now.
    """
    there, here = weights.labels, weights.numbered(classes).labels
    numbers = [wanted for wanted in forget if not isinstance(wanted, str)]
    if there == here or there is None or here is None or not numbers:
        return
    meant = dict(zip(there, weights.classes or ())).get(numbers[0])
    was = f"the class {meant!r}" if meant else "a class that it has no row for, forgotten before"
    raise PlanError(
        f"{numbers[0]} is the number of {was} by {weights.path}, which counts otherwise than the data: give the name "
        "of the class that is meant (unlearn.forget)"
    )


def class_numbers(forget: Sequence[int | str], classes: Sequence[str]) -> tuple[int, ...]:
    """Return the number of each class in ``forget``, sorted; a recipe may mean a name where it gives a number.

    Raises:
        PlanError: a number is that of one class and the name of another, or what ``forget_classes`` refuses.
    """
    for wanted in forget:
        if isinstance(wanted, str) or not 0 <= wanted < len(classes):
            continue
        other = [number for number, name in enumerate(classes) if _is_number(name, wanted) and number != wanted]
        if other:
            raise PlanError(
                f"{wanted} is the number of the class {classes[wanted]!r} and the name of class {other[0]}: say which "
                f"by name, unlearn.forget=[{json.dumps(classes[wanted])}] or [{json.dumps(classes[other[0]])}]"
            )
    return forget_classes(forget, classes)


def _is_number(name: str, number: int) -> bool:
    return name.isascii() and name.isdigit() and int(name) == number


def share_out(
    recipe: Recipe, train: LabelledImages, earlier: Sequence[int] = ()
) -> tuple[dict[str, LabelledImages], dict[str, LabelledImages]]:
    """Return the training images of each client, and the validation images of each that has some.

    Those of classes that were forgotten ``earlier`` go from each client: the others stay where they were.
    """
    fed = recipe.federation
    shares = partition(
        train, by=fed.partition, clients=fed.clients or None, alpha=fed.alpha, bias=fed.bias, seed=fed.seed
    )
    clients, validation = hold_out(shares, recipe.data.validation, seed=fed.seed)
    if earlier:
        clients, validation = (
            {name: images.narrowed(earlier) for name, images in part.items()} for part in (clients, validation)
        )
    return clients, {name: images for name, images in validation.items() if len(images)}


def client_data(recipe: Recipe, number: int) -> tuple[ClientData, LabelledImages]:
    """Return what client ``number`` holds, for clients that are processes of their own, and images to build models for.

    The latter are none, of all classes: the architecture is made for them, whatever was forgotten before.

    Raises:
        FedUnlearnError: the recipe or the data cannot be used, or it has no such client.
    """
    splits = read_data(recipe)
    earlier: tuple[int, ...] = ()
    if recipe.model.weights:
        weights = read_weights(Path(recipe.model.weights))
        splits = normalised_for(splits, weights, recipe)
        _, earlier = numbered(weights, splits.train.classes)
    clients, validation = share_out(recipe, splits.train, earlier)
    if not 0 <= number < len(clients):
        raise RecipeError(f"the recipe has clients 0 .. {len(clients) - 1}, this one is to be {number}")
    name = list(clients)[number]
    return ClientData(name, clients[name], validation.get(name)), splits.train.take(slice(0, 0))


def fingerprint(splits: Splits) -> str:
    """Return the SHA-256 of all images, labels and groups, and of the names and the normalisation that go with them."""
    digest = hashlib.sha256()
    for images in splits:
        about = [list(images.images.shape), images.classes, images.mean, images.std, images.groups is not None]
        digest.update(json.dumps(about).encode())
        for tensor in (images.images, images.labels, images.groups):
            if tensor is not None:
                digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()

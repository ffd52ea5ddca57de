"""Models for other programs: ONNX, held against torch before it is handed out."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fedunlearn.arguments import must_be
from fedunlearn.channels.checks import forward
from fedunlearn.channels.copying import copied
from fedunlearn.channels.plan import Classifier
from fedunlearn.data.datasets import DatasetImages
from fedunlearn.data.images import LabelledImages
from fedunlearn.errors import DataError, ModelError
from fedunlearn.files import write_bytes
from fedunlearn.seeding import generator

_IMAGES = 5  # another number than the example has: the file takes batches of any size
_TOLERANCE = 1e-4


def export_onnx(path: Path | str, model: Classifier, *, images: LabelledImages) -> float:
    """Write ``model`` as ONNX, run it by onnxruntime and return how far its logits are from torch's.

    The file takes a float batch ``images``, shape ``(any, colours, height, width)``, normalised as ``images`` tell, and
    gives ``logits``, a row for each class that is left. Its metadata hold their names, mean and std.

    Args:
        path: the file, which ends in ``.onnx``.
        model: the model as it is, pruned or not.
        images: of the kind that the model takes.

    Returns:
        The largest difference of a logit, as a share of the largest logit.

    Raises:
        ModelError: the packages are missing (``pip install 'fedunlearn[onnx]'``), torch cannot export the model, or
            the file gives other logits than torch; no file is left then.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise ModelError(f"{path}: end the name of an ONNX file in .onnx")
    must_be(Classifier, model, "export_onnx(model)", "a Classifier, such as Classifier(module, shape)", ModelError)
    must_be(LabelledImages, images, "export_onnx(images=...)", "LabelledImages, as the readers give", DataError)
    labels = model.checked(len(images.classes)).labels or ()
    try:
        import onnx  # slow to import, and extras
        import onnxruntime
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ImportError as error:
        raise ModelError(f"{error.name} is needed to export ONNX: pip install 'fedunlearn[onnx]'") from error
    module = copied(model.module).cpu().eval()
    try:
        with _quietly():
            program = torch.onnx.export(
                module,
                (model.example,),
                dynamo=True,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
            assert program is not None  # as with dynamo
            made = program.model_proto
    except Exception as error:  # the exporter fails in many ways on what it does not know
        why = " ".join(str(error).split())[:200]
        raise ModelError(f"{path}: torch cannot export the model ({why}): leave out what depends on values") from error
    about: dict[str, Any] = {"classes": [images.classes[label] for label in labels]}
    if not isinstance(images, DatasetImages):  # it normalises itself, nobody knows how
        about |= {"mean": images.mean, "std": images.std}
    onnx.helper.set_model_props(made, {name: json.dumps(value) for name, value in about.items()})
    shown = torch.randn((_IMAGES, *model.shape), generator=generator(0, "onnx"))
    try:
        session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"images": shown.numpy()})
    except Exception as error:  # as does onnxruntime on what the exporter writes
        why = " ".join(str(error).split())[:200]
        raise ModelError(f"{path}: not written: onnxruntime cannot run what torch exports ({why})") from error
    expected = forward(module, shown)
    apart = float((torch.from_numpy(found) - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not apart <= _TOLERANCE:
        raise ModelError(f"{path}: not written: by onnxruntime the logits are {apart:.1e} from torch's, of the largest")
    try:
        write_bytes(path, made.SerializeToString())
    except OSError as error:
        raise ModelError(
            f"{path}: cannot be written ({error.strerror}): give a place in a folder that is there, with room for "
            f"{made.ByteSize():,} bytes"
        ) from error
    return apart


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep torch's exporter from telling of each of its steps, and of torchvision, which no model needs."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)

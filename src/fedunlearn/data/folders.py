"""Folders of pictures: which folder is which class, what is left out, and what becomes of a picture's pixels."""

from __future__ import annotations

import logging
import unicodedata
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedunlearn.arguments import is_whole
from fedunlearn.errors import DataError

if TYPE_CHECKING:  # it takes a moment: imported only where a picture is opened
    from PIL.Image import Image as Opened

_logger = logging.getLogger(__name__)
# What file systems, archives and viewers leave behind; no class has such a name.
_SYSTEM_FOLDERS = ("__MACOSX", "__pycache__", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information")
_SYSTEM_FILES = ("thumbs.db", "desktop.ini", "ehthumbs.db", "icon\r")
# Pillow can open more, some of it (EPS) by a program of its own that the picture is a program for.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
_EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_TRANSPARENT = ("LA", "PA", "RGBA", "RGBa")
_LARGEST = 8192  # pixels along a side to resize to
_FEW_LEVELS = 4096  # 16-bit pictures that are all darker hold 12 bits or fewer: 16 levels of the 256 are left


class Pictures(NamedTuple):
    """The pictures of one folder of classes.

    Attributes:
        images: uint8, shape ``(images, 3, height, width)``.
        labels: int64, shape ``(images,)``.
        classes: the name of each class.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]


@dataclass
class _Skipped:
    """What was left out of a folder: what it is -> how many, and the first path."""

    found: dict[str, tuple[int, Path]] = field(default_factory=dict)

    def add(self, what: str, path: Path, count: int = 1) -> None:
        before, first = self.found.get(what, (0, path))
        self.found[what] = (before + count, first)

    def tell(self, root: Path) -> None:
        """Log one line with a count and the first path of each kind, if there is any."""
        if self.found:
            parts = (f"{count} {what} ({first.relative_to(root)})" for what, (count, first) in self.found.items())
            _logger.warning("%s: left out, with the first of each: %s", root, ", ".join(parts))


def read_pictures(path: Path, size: int) -> Pictures:
    """Return the pictures of ``path/CLASS/*``, and log what is left out.

    Classes are numbered in the order of their names; names that are all whole numbers, in the order of the numbers, so
    that of folders 0 .. 11 class 2 is ``2``. Names are compared in Unicode's composed form (NFC). Left out are hidden
    folders and files, those of file systems, archives and viewers, files beside the folders of the classes, and what
    lies deeper.

    Args:
        path: the folder that holds a folder per class.
        size: height and width to resize to; 0 keeps pictures as they are, which must then agree.

    Raises:
        DataError: fewer than two classes, a class without pictures, two of one name, or a picture that cannot be read;
            or the size is none.
    """
    if not is_whole(size, 0) or size > _LARGEST:
        raise DataError(
            f"data.size must be a whole number of pixels from 1 to {_LARGEST}, or 0 to leave pictures as they are, "
            f"got {size!r}"
        )
    skipped = _Skipped()
    folders = _class_folders(path, skipped)
    arrays: list[np.ndarray] = []
    labels: list[int] = []
    brightest = 0
    for label, (name, folder) in enumerate(folders.items()):
        for file in _picture_files(name, folder, skipped):
            picture = _read_picture(file, size)
            brightest = max(brightest, picture.brightest)
            arrays.append(picture.pixels)
            if arrays[-1].shape != arrays[0].shape:
                raise DataError(
                    f"{file}: expected {arrays[0].shape[1]} x {arrays[0].shape[0]} pixels like the first image, "
                    f"got {arrays[-1].shape[1]} x {arrays[-1].shape[0]}: set data.size to resize them all"
                )
            labels.append(label)
    skipped.tell(path)
    if 0 < brightest < _FEW_LEVELS:
        _logger.warning(
            "%s: the brightest 16-bit pixel is %d of 65535, so at most %d of 256 levels are left: stretch the pictures "
            "to 16 bits, or save them with 8",
            path,
            brightest,
            _eight_bits(brightest) + 1,
        )
    stacked = torch.from_numpy(np.stack(arrays).transpose(0, 3, 1, 2).copy())
    return Pictures(stacked, torch.tensor(labels, dtype=torch.int64), tuple(folders))


def tell_beside(path: Path, known: Collection[str]) -> None:
    """Log what lies in ``path`` beside the entries ``known``."""
    skipped = _Skipped()
    for entry in _entries(path):
        if entry.name not in known:
            skipped.add(f"entries beside {' and '.join(known)}", entry)
    skipped.tell(path)


def _class_folders(path: Path, skipped: _Skipped) -> dict[str, Path]:
    """Return the folder of each class, in the order of the classes' numbers."""
    folders: dict[str, Path] = {}
    for entry in _entries(path):
        if entry.name.startswith(".") or entry.name in _SYSTEM_FOLDERS:
            skipped.add("hidden or system entries", entry)
        elif not entry.is_dir():
            skipped.add("files beside the folders of the classes", entry)
        else:
            name = unicodedata.normalize("NFC", entry.name)
            if not _is_text(name):
                raise DataError(f"{path}: the name of the folder {name!r} is no UTF-8: rename it, it names a class")
            if name in folders:
                raise DataError(
                    f"{path}: two folders have the name {name!r}, in two spellings of Unicode: "
                    "give each class one folder"
                )
            folders[name] = entry
    if len(folders) < 2:
        raise DataError(
            f"{path}: expected at least two folders, one per class, got {len(folders)}: name the folder that holds "
            "CLASS/*, or train/CLASS/* and test/CLASS/*"
        )
    numbered = all(name.isascii() and name.isdigit() for name in folders)
    return {name: folders[name] for name in sorted(folders, key=lambda name: (int(name) if numbered else 0, name))}


def _is_text(name: str) -> bool:
    """Return whether ``name`` can be written as UTF-8: names of files may be any bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _picture_files(name: str, folder: Path, skipped: _Skipped) -> list[Path]:
    """Return the files of a class that are meant to be pictures, in the order of their names."""
    files, deeper = [], 0
    for entry in _entries(folder):
        if entry.name.startswith(".") or entry.name in _SYSTEM_FOLDERS or entry.name.lower() in _SYSTEM_FILES:
            skipped.add("hidden or system entries", entry)
        elif entry.is_dir():
            count = sum(file.is_file() for file in entry.rglob("*"))
            deeper += count
            if count:
                skipped.add("files in folders inside the folder of a class", entry, count)
        elif entry.is_file() or entry.is_symlink():  # a link to nothing is told by the attempt to open it
            files.append(entry)
        else:
            skipped.add("entries that are no files", entry)
    if not files:
        why = "add some or take the folder away"
        if deeper:
            why = (
                f"{deeper} files lie in folders inside it: move them up, or name the folder of the classes; the "
                "parts of a split are train and test"
            )
        raise DataError(f"{folder}: expected images of the class {name}, found none: {why}")
    return files


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}); check its permissions") from error


_PHOTOMETRIC = 262  # the tag of a TIFF that says what 0 stands for


class _Picture(NamedTuple):
    pixels: np.ndarray  # uint8, (height, width, 3)
    brightest: int  # of 65535; 0 for a picture that has not 16 bits


def _read_picture(file: Path, size: int) -> _Picture:
    """Return a picture as a viewer shows it on black, in 8 bits and three colours.

    Raises:
        DataError: the file is damaged, too large, holds several pictures or has pixels of an unknown range.
    """
    from PIL import Image, UnidentifiedImageError

    Image.init()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on tags that no pixel depends on
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # Not by its path: Pillow maps a TIFF into memory then, and has its sides exchanged before it turns it.
            with (
                file.open("rb") as data,
                Image.open(data, formats=[name for name in _FORMATS if name in Image.OPEN]) as opened,
            ):
                return _pixels(opened, size)
    except DataError as error:
        raise DataError(f"{file}: {error}") from error
    except PermissionError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); check its permissions") from error
    except Exception as error:  # a damaged picture can fail in any way
        unknown = isinstance(error, UnidentifiedImageError)  # whose text names an object that reads the file
        why = "cannot identify image file" if unknown else " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{file}: expected an image ({', '.join(_FORMATS)}), but {why}: mend it or take it away"
        ) from error


def _pixels(opened: Opened, size: int) -> _Picture:
    from PIL import Image, ImageOps

    pages = getattr(opened, "n_frames", 1)
    if pages > 1 and opened.format != "MPO":  # the photograph of an MPO is its first picture, others are previews
        raise DataError(f"expected one picture, got {pages}: save each as a file of its own, or the one that is meant")
    turned = ImageOps.exif_transpose(opened)
    brightest = 0
    white_is_zero = getattr(opened, "tag_v2", {}).get(_PHOTOMETRIC) == 0  # of a TIFF: Pillow turns 8 bits alone
    # Pillow before 11 opens 16-bit PNG and PPM as 32-bit integers.
    if turned.mode in _SIXTEEN_BITS or (turned.mode == "I" and opened.format in ("PNG", "PPM")):
        values = np.asarray(turned).astype(np.int64)
        if white_is_zero:
            values = 65535 - values
        brightest = int(values.max())
        hidden = values == turned.info.get("transparency", -1)
        picture = Image.fromarray(np.where(hidden, 0, _eight_bits(values)).astype(np.uint8))
    elif turned.mode == "F":
        floats = 1 - np.asarray(turned) if white_is_zero else np.asarray(turned)
        if not (floats.min() >= 0 and floats.max() <= 1):
            raise DataError(
                f"expected float pixels in [0, 1], got {floats.min():g} .. {floats.max():g}: "
                "scale them, or save the picture with 8 or 16 bits"
            )
        picture = Image.fromarray(np.round(floats * 255).astype(np.uint8))
    elif turned.mode not in _EIGHT_BITS:
        raise DataError(
            f"expected pixels of 8 or 16 bits or floats in [0, 1], got Pillow's mode {turned.mode}, whose range is not "
            "known: save the picture with 8 or 16 bits"
        )
    elif turned.mode in _TRANSPARENT or "transparency" in turned.info:
        # What is under a transparent pixel is anything: an editor's leftovers, or what somebody erased.
        shown = turned.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", shown.size, (0, 0, 0, 255)), shown)
    else:
        picture = turned
    picture = picture.convert("RGB")
    if size:
        picture = picture.resize((size, size), Image.Resampling.BILINEAR)
    return _Picture(np.asarray(picture), brightest)


def _eight_bits(values: Any) -> Any:
    """Return 16-bit ``values`` in 8 bits: ``round(value / 257)``, which takes 65535 to 255."""
    return (values + 128) // 257

"""Folders of pictures: which folder is which class, and what becomes of a picture's pixels."""

import io
import logging
import os
import shutil
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, TiffImagePlugin
from rich.console import Console

from conftest import EXAMPLES
from fedunlearn.console import describe
from fedunlearn.data.folders import read_pictures
from fedunlearn.data.images import in_both
from fedunlearn.data.readers import read_folder
from fedunlearn.errors import DataError, PlanError
from fedunlearn.run.experiment import prepare
from fedunlearn.run.inputs import class_numbers
from fedunlearn.run.recipe import Recipe

RAMP = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)


CAT = ("cat", "dog", "ship")


def picture(path, value=0, side=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), (value, value, value)).save(path)


def classes(root, *names, count=5):
    """Write ``count`` pictures per class; those of class ``k`` are of value ``10 k``."""
    for k, name in enumerate(names):
        for number in range(count):
            picture(root / name / f"{number}.png", 10 * k)
    return root


def one(root, name, save):
    """Return the pixels that the picture becomes which ``save(path)`` writes, uint8, ``(3, height, width)``."""
    for label in ("a", "b"):
        (root / label).mkdir()
        save(root / label / name)
    found = read_pictures(root, 0)
    assert found.labels.tolist() == [0, 1]
    assert found.images[0].equal(found.images[1])
    return found.images[0]


def test_hidden_and_system_folders_are_no_classes_and_are_said(tmp_path, caplog):
    root = classes(tmp_path / "set", "cat", "dog", "ship")
    clean = read_folder(root)
    for name in (".ipynb_checkpoints", "__MACOSX", ".git"):
        picture(root / name / "0.png", 200)
    picture(root / "cat" / "._0.png", 200)
    (root / "cat" / "Thumbs.db").write_bytes(b"x")
    (root / "readme.txt").write_text("x")
    assert caplog.text == ""
    train, test = read_folder(root)
    assert train.classes == ("cat", "dog", "ship")
    assert train.images.equal(clean.train.images)
    assert train.labels.equal(clean.train.labels)
    assert test.images.equal(clean.test.images)
    assert "5 hidden or system entries (.git), 1 files beside the folders of the classes (readme.txt)" in caplog.text


def test_the_test_images_of_a_class_stay_those_when_another_class_is_deleted(tmp_path):
    """Or a model would be measured on images that it was trained on."""
    for k, name in enumerate(("ants", "bees", "cats")):
        for number in range(20):
            picture(tmp_path / name / f"{number:02d}.png", 80 * k + number)

    def held_out():
        train, test = read_folder(tmp_path)
        return {
            name: {int(image.max()) for image in test.images[test.labels == label]}
            for label, name in enumerate(train.classes)
        }

    before = held_out()
    shutil.rmtree(tmp_path / "ants")
    after = held_out()
    assert {name: len(pictures) for name, pictures in before.items()} == {"ants": 4, "bees": 4, "cats": 4}
    assert after == {name: before[name] for name in ("bees", "cats")}


def test_a_picture_more_moves_at_most_one_other_from_the_training_images_to_the_test(tmp_path):
    for number in range(50):
        picture(tmp_path / "ants" / f"{number:02d}.png", 4 * number)
        picture(tmp_path / "bees" / f"{number:02d}.png", 4 * number)
    before = read_folder(tmp_path)
    picture(tmp_path / "ants" / "00-first.png", 250)
    after = read_folder(tmp_path)
    trained, tested = (
        {(int(label), int(image.max())) for image, label in zip(images.images, images.labels, strict=True)}
        for images in (before.train, after.test)
    )
    assert len(trained & tested) <= 1


def test_numbered_folders_are_in_the_order_of_their_numbers(tmp_path):
    names = [str(number) for number in range(12)]
    train, _ = read_folder(classes(tmp_path, *names))
    assert train.classes == tuple(names)
    for number in range(12):
        assert train.images[train.labels == number].unique().tolist() == [10 * number]


def test_names_that_are_not_all_numbers_are_in_the_order_of_their_letters(tmp_path):
    assert read_folder(classes(tmp_path, "10", "2", "other")).train.classes == ("10", "2", "other")


def test_images_that_lie_deeper_are_left_out_and_counted(tmp_path, caplog):
    root = classes(tmp_path, "a", "b")
    for number in range(20):
        picture(root / "a" / "2024" / f"{number}.png")
    with caplog.at_level(logging.WARNING):
        train, test = read_folder(root)
    assert (len(train), len(test)) == (8, 2)
    assert f"{root}: left out, with the first of each: 20 files in folders inside the folder of a class" in caplog.text


def test_what_lies_beside_train_and_test_is_said(tmp_path, caplog):
    for split in ("train", "test", "val"):
        classes(tmp_path / split, "a", "b", count=1)
    train, test = read_folder(tmp_path)
    assert (len(train), len(test)) == (2, 2)
    assert "1 entries beside train and test (val)" in caplog.text


def test_an_entry_that_is_no_file_is_left_out_and_said(tmp_path, caplog):
    root = classes(tmp_path, "a", "b")
    os.mkfifo(root / "a" / "pipe")
    assert len(read_folder(root).train) == 8
    assert "1 entries that are no files (a/pipe)" in caplog.text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda root: (root / "a").rename(root / "b" / "a"), r"at least two folders, one per class, got 1: name the"),
        (lambda root: picture(root / "c" / "in" / "0.png"), r"class c, found none: 1 files lie in folders inside it"),
        (
            lambda root: [picture(root / part / name / "0.png") for part in ("train", "val") for name in "ab"],
            r"class train, found none: 2 files lie in .*; the parts of a split are train and test",
        ),
        (lambda root: (root / "c").mkdir(), r"images of the class c, found none: add some or take the folder away"),
        (
            lambda root: picture(root / "c" / "0.png"),
            "two images or more of each class, one to test with, got one of c",
        ),
        (lambda root: (root / "a" / "x.png").symlink_to("nowhere"), r"x.png: expected an image .* No such file"),
    ],
)
def test_folders_that_do_not_say_what_is_meant_are_refused(tmp_path, change, text):
    root = classes(tmp_path, "a", "b")
    change(root)
    with pytest.raises(DataError, match=text):
        read_folder(root)


@pytest.mark.parametrize("size", [-1, 2.5, "8", True, 10**6])
def test_a_size_that_is_none_is_refused(tmp_path, size):
    with pytest.raises(DataError, match=r"data.size must be a whole number of pixels from 1 to 8192, or 0 .*, got"):
        read_folder(classes(tmp_path, "a", "b"), size=size)


def test_a_name_in_two_spellings_is_refused_and_in_one_is_composed(tmp_path):
    composed, apart = (unicodedata.normalize(form, "Äpfel") for form in ("NFC", "NFD"))
    assert read_folder(classes(tmp_path / "one", apart, "b")).train.classes == ("b", composed)
    with pytest.raises(DataError, match=r"two folders have the name 'Äpfel', in two spellings of Unicode"):
        read_folder(classes(tmp_path / "two", composed, apart))


@pytest.mark.parametrize(
    ("forget", "names", "expected"),
    [
        ([1], CAT, (1,)),
        (["ship", 0], CAT, (0, 2)),
        ([2], ("0", "1", "2"), (2,)),
        (["2"], ("1", "2", "3"), (1,)),
        ([2], ("000", "001", "002"), (2,)),
        ([unicodedata.normalize("NFD", "Äpfel")], ("b", "Äpfel"), (1,)),
    ],
)
def test_a_number_is_a_place_and_text_is_a_name(forget, names, expected):
    assert class_numbers(forget, names) == expected


@pytest.mark.parametrize(
    ("forget", "names", "text"),
    [
        (
            [2],
            ("1", "2", "3"),
            r"2 is the number of the class '3' and the name of class 1: .*forget=\[\"3\"\] or \[\"2\"\]",
        ),
        ([2], ("001", "002", "003"), r"the class '003' and the name of class 1: say which by name"),
        ([2], ("0", "1", "10", "2"), r"the class '10' and the name of class 3: say which by name"),
        ([7], CAT, r"must lie in 0 .. 2, got 7"),
        (["Ships"], CAT, r"no class is named 'Ships' \(did you mean 'ship'\?\); the classes are cat, dog, ship"),
        (["[ship]"], CAT, r"check unlearn.forget, a list of names as in unlearn.forget=\[\"a\", \"b\"\]"),
        (["bird"], CAT, r"no class is named 'bird'; the classes are cat, dog, ship: check unlearn.forget"),
    ],
)
def test_a_class_that_could_be_another_is_refused(forget, names, text):
    with pytest.raises(PlanError, match=text):
        class_numbers(forget, names)


def test_what_is_about_to_be_forgotten_is_said_by_name_and_count(tmp_path):
    root = classes(tmp_path, "a", "[bold]", "c", count=10)  # a name that a terminal could take for a mark
    recipe = Recipe.model_validate(
        {
            "data": {"source": "folder", "path": str(root), "validation": 0},
            "model": {"name": "small-cnn"},
            "federation": {"clients": 2},
            "train": {"rounds": 1},
            "unlearn": {"forget": ["[bold]"], "fraction": 0.2},
        }
    )
    file = io.StringIO()
    Console(file=file, width=200).print(describe(prepare(recipe)), highlight=False)
    assert file.getvalue().splitlines()[:3] == [
        "24 training and 6 test images in 3 classes",
        "6 of the test images are training images too: what is measured on them proves nothing",
        "to forget: class 0 ([bold]), 8 images to train on and 2 to test with",
    ]


def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
    root = classes(tmp_path, "a", "b")

    def closed(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", closed)
    with pytest.raises(DataError, match=r"cannot be read \(Permission denied\); check its permissions"):
        read_folder(root)


def test_a_picture_without_permission_is_refused_as_such(tmp_path, monkeypatch):
    root = classes(tmp_path, "a", "b")

    def closed(self, mode):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", closed)
    with pytest.raises(DataError, match=r"png: cannot be read \(Permission denied\); check its permissions"):
        read_folder(root)


def test_test_images_that_are_training_images_are_told(tmp_path):
    root = classes(tmp_path / "all" / "train", "a", "b", count=5)
    shutil.copytree(root, tmp_path / "all" / "test")
    picture(tmp_path / "all" / "test" / "a" / "0.png", 99)
    train, test = read_folder(tmp_path / "all")
    assert (in_both(train, test), in_both(train, train), in_both(test.only([0]), train.only([1]))) == (9, 10, 0)


@pytest.mark.parametrize("name", ["grey.png", "grey.tif", "grey.pgm"])
def test_sixteen_bits_are_divided_by_257(tmp_path, name, caplog):
    def save(path):
        if path.suffix == ".pgm":
            path.write_bytes(b"P5 8 8 65535\n" + RAMP.astype(">u2").tobytes())
        else:
            Image.fromarray(RAMP).save(path)

    found = one(tmp_path, name, save)
    assert found.shape == (3, 8, 8)
    assert found[0].flatten().tolist() == [round(value / 257) for value in RAMP.flatten().tolist()]
    assert len(found.unique()) == 64
    assert caplog.text == ""


def test_dark_sixteen_bit_pictures_are_said(tmp_path, caplog):
    one(tmp_path, "x.png", lambda path: Image.fromarray(RAMP // 16).save(path))
    assert "brightest 16-bit pixel is 4095 of 65535, so at most 17 of 256 levels are left" in caplog.text


def test_floats_in_0_to_1_are_scaled_and_others_refused(tmp_path):
    unit = (RAMP / 65535).astype(np.float32)
    found = one(tmp_path, "x.tif", lambda path: Image.fromarray(unit).save(path))
    assert found[2].flatten().tolist() == [round(255 * value) for value in unit.flatten().tolist()]
    for wrong, text in (
        (unit * 255, r"a/x.tif: expected float pixels in \[0, 1\], got 0 .. 255"),
        (unit * np.nan, "nan"),
    ):
        Image.fromarray(wrong.astype(np.float32)).save(tmp_path / "a" / "x.tif")
        with pytest.raises(DataError, match=text):
            read_pictures(tmp_path, 0)


@pytest.mark.parametrize(
    ("save", "text"),
    [
        (lambda path: Image.fromarray(RAMP.astype(np.int32)).save(path), "Pillow's mode I, whose range is not known"),
        (lambda path: Image.new("LAB", (8, 8)).save(path), "Pillow's mode LAB, whose range is not known"),
        (
            lambda path: Image.new("L", (8, 8), 10).save(
                path, save_all=True, append_images=[Image.new("L", (8, 8), 200)]
            ),
            "x.tif: expected one picture, got 2: save each as a file of its own",
        ),
    ],
)
def test_pixels_of_an_unknown_range_and_several_pages_are_refused(tmp_path, save, text):
    with pytest.raises(DataError, match=text):
        one(tmp_path, "x.tif", save)


def test_colours_under_transparent_pixels_are_not_used(tmp_path):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., 0] = 255
    pixels[:4, :, 3] = 255  # the lower half is red under alpha 0
    pixels[0, :, 3] = 51  # a fifth of red on black: 51
    found = one(tmp_path, "x.png", lambda path: Image.fromarray(pixels).save(path))
    assert found[0, :, 0].tolist() == [51, 255, 255, 255, 0, 0, 0, 0]
    assert found[1:].unique().tolist() == [0]


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "I;16"])
def test_a_value_that_is_transparent_is_black(tmp_path, mode):
    values = {"RGB": (9, 8, 7), "L": 77, "P": 3, "1": 1, "I;16": 9000}
    hidden = values[mode]

    def save(path):
        if mode == "I;16":  # Pillow writes no such chunk: grey, 16 bits, the value 9000 transparent
            rows = b"".join(b"\0" + struct.pack(">8H", *[hidden] * 8) for _ in range(8))
            chunks = [(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 0, 0, 0, 0)), (b"tRNS", struct.pack(">H", hidden))]
            path.write_bytes(png(*chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")))
            return
        made = Image.new(mode, (8, 8), hidden)
        if mode == "P":
            made.putpalette([200] * 768)
        made.save(path, transparency=hidden)

    assert one(tmp_path, "x.png", save).unique().tolist() == [0]


def test_opaque_alpha_changes_nothing(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    opaque = np.concatenate([pixels, np.full((8, 8, 1), 255, np.uint8)], 2)
    found = one(tmp_path, "x.png", lambda path: Image.fromarray(opaque).save(path))
    assert found.equal(torch.from_numpy(pixels).permute(2, 0, 1))


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("mode", ["L", "I;16", "RGB", "RGBA", "CMYK"])
def test_a_tiff_is_turned_whatever_its_pixels_and_its_compression_are(tmp_path, mode, compression):
    pixels = np.zeros((4, 6), np.uint8)
    pixels[:2, :3] = 200
    pixels[3] = 90
    picture = (
        Image.fromarray(pixels.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(pixels).convert(mode)
    )
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[0x0112] = 6  # the first row is the right edge
    found = one(tmp_path, "x.tif", lambda path: picture.save(path, tiffinfo=tags, compression=compression))
    assert found[0].equal(torch.from_numpy(np.rot90(pixels, -1).copy()))


@pytest.mark.parametrize("bits", [16, 32])
def test_a_tiff_in_which_white_is_0_is_not_inverted(tmp_path, bits):
    pixels = np.array([[0, 200], [90, 255]], np.uint8)
    deep = (65535 - pixels.astype(np.uint16) * 257).astype("<u2") if bits == 16 else (1 - pixels / 255).astype("<f4")
    data, kind = deep.tobytes(), 1 if bits == 16 else 3  # whole numbers or floats
    tags = [(256, 2), (257, 2), (258, bits), (259, 1), (262, 0), (273, 0), (277, 1), (278, 2), (279, len(data))]
    tags.append((339, kind))
    offset = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, offset if tag == 273 else value) for tag, value in tags)
    header = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0)
    found = one(tmp_path, "x.tif", lambda path: path.write_bytes(header + data))
    assert found[0].tolist() == pixels.tolist()


def test_a_class_whose_name_is_no_text_is_refused(tmp_path):
    for name in (b"caf\xe9", b"dog"):
        folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
        folder.mkdir()
        Image.new("L", (4, 4)).save(folder / "a.png")
    with pytest.raises(DataError, match=r"the name of the folder 'caf\\udce9' is no UTF-8: rename it"):
        read_folder(tmp_path)


def test_the_exif_orientation_is_applied(tmp_path):
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0] = 255  # a white first row; orientation 6 means that it is the right edge
    exif = Image.Exif()
    exif[0x0112] = 6
    found = one(tmp_path, "x.png", lambda path: Image.fromarray(pixels).save(path, exif=exif))
    assert found.shape == (3, 6, 4)
    assert found[0, 0].tolist() == [0, 0, 0, 255]


def png(*chunks):
    parts = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("side", [10_000, 30_000])
def test_a_header_of_too_many_pixels_is_refused(tmp_path, side):
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    bomb = png((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b""))
    with pytest.raises(DataError, match=r"x.png: expected an image .*, but Image size .* exceeds limit"):
        one(tmp_path, "x.png", lambda path: path.write_bytes(bomb))


def test_a_program_that_draws_a_picture_is_not_run(tmp_path):
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    with pytest.raises(DataError, match=r"x.eps: expected an image \(AVIF, .*, but cannot identify image file"):
        one(tmp_path, "x.eps", lambda path: path.write_bytes(program))


def encoded(kind, **options):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    made = Image.fromarray(pixels)
    file = io.BytesIO()
    (made.convert("P") if kind == "GIF" else made).save(file, kind, **options)
    return file.getvalue()


def sixteen(kind):
    file = io.BytesIO()
    Image.fromarray(RAMP).save(file, kind)
    return file.getvalue()


SOURCES = [
    *(encoded(kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000")),
    encoded("TIFF", compression="tiff_lzw"),
    sixteen("PNG"),
    sixteen("TIFF"),
]


@pytest.fixture(scope="module")
def mutable(tmp_path_factory):
    root = tmp_path_factory.mktemp("mutated")
    for label in ("a", "b"):
        (root / label).mkdir()
        (root / label / "0.png").write_bytes(encoded("PNG"))
    return root


@given(st.sampled_from(SOURCES), st.data())
@settings(max_examples=EXAMPLES, deadline=None)
def test_mutated_pictures_are_read_or_refused_in_one_line(mutable, source, data):
    changed = bytearray(source)
    places = st.integers(0, min(len(changed), 200 if data.draw(st.booleans()) else len(changed)) - 1)
    for place, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=6)):
        changed[place] = value
    stop = data.draw(st.one_of(st.just(len(changed)), st.integers(0, len(changed))))
    (mutable / "b" / "0.png").write_bytes(changed[:stop])
    try:
        found = read_pictures(mutable, 8)
    except DataError as error:
        told = str(error)
    else:
        assert found.images.shape == (2, 3, 8, 8)
        return
    assert str(mutable / "b" / "0.png") in told
    assert "\n" not in told

"""The report in a real browser, at the width of a phone and of a desk."""

import hashlib
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from conftest import in_browser, write_set
from fedunlearn.audits.table import FIGURES
from fedunlearn.console import verdict_line
from fedunlearn.evidence import plots
from fedunlearn.evidence.pages import signed
from fedunlearn.evidence.report import write_report
from fedunlearn.evidence.words import GLOSSARY, MODELS, VERDICTS, certainty, outside, sent_to, summary
from fedunlearn.run.commands import run
from fedunlearn.run.recipe import load_recipe
from fedunlearn.tabular import amount

PLOTS = {"bands", "relearning", "confusion", "classes", "work", "scores", "maps"}
WIDTHS = (390, 1440)


@pytest.fixture
def opened(browser, signed):
    """Open the report at a width; the page must write nothing to the console and ask for nothing but itself."""
    contexts, said, asked = [], [], []

    def at(width, **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((signed / "run" / "report.html").as_uri())
        return page

    yield at
    for context in contexts:
        context.close()
    assert said == []
    assert all(url.startswith(("file:", "data:")) for url in asked)
    assert len([url for url in asked if url.startswith("file:")]) == len(contexts)


@in_browser
@pytest.mark.parametrize("width", WIDTHS)
def test_every_plot_is_drawn_and_nothing_is_wider_than_the_screen(opened, width, tmp_path):
    page = opened(width)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    figures = page.locator("figure")
    assert {own.get_attribute("id").removeprefix("plot-") for own in figures.all()} == PLOTS
    for figure in figures.all():
        box = figure.locator("svg").bounding_box()
        assert 0.5 * min(width, 500) < box["width"] <= width
        assert box["height"] > 60
        label = figure.get_by_role("img").first.get_attribute("aria-label")
        assert len(label) > 40
        path = tmp_path / "figure.png"
        figure.locator("svg").screenshot(path=path)
        with Image.open(path) as picture:
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 20, figure.get_attribute("id")


@in_browser
@pytest.mark.parametrize("width", WIDTHS)
def test_a_screenshot_shows_the_verdict_on_the_first_screen(opened, signed, width, tmp_path):
    page = opened(width)
    verdict = json.loads((signed / "run" / "result.json").read_text())["verdict"]
    box = page.get_by_text(verdict, exact=True).first.bounding_box()
    assert box["y"] + box["height"] < 450
    note = page.get_by_text("This is approximate unlearning").first.bounding_box()
    assert note["y"] + note["height"] < 900
    path = tmp_path / f"report-{width}.png"
    page.screenshot(path=path, full_page=True)
    with Image.open(path) as picture:
        assert picture.width == width
        assert picture.height > 3000
        strips = [picture.convert("L").crop((0, y, width, y + 900)) for y in range(0, picture.height - 900, 900)]
    assert all(len(strip.getcolors()) > 10 for strip in strips)  # no screenful is blank


@in_browser
def test_a_dark_page_has_light_axes(opened):
    light, dark = opened(1440), opened(1440, color_scheme="dark")
    script = """[
        getComputedStyle(document.body).backgroundColor,
        getComputedStyle(document.querySelector('figure svg text')).fill,
    ]"""
    assert light.evaluate(script)[0] == "rgb(255, 255, 255)"
    background, ink = dark.evaluate(script)
    assert background == "rgb(20, 24, 30)"
    assert ink == "rgb(230, 234, 240)"


@in_browser
def test_the_page_prints_and_works_by_keyboard(opened):
    page = opened(390)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the figures"
    page.keyboard.press("Enter")
    assert page.url.endswith("#main")
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.tagName"))
    assert reached >= {"SUMMARY", "DIV"}  # folded tables open, wide ones scroll
    page.emulate_media(media="print")
    assert page.locator("nav").is_hidden()
    assert len(page.pdf()) > 20_000


def test_the_report_is_one_small_file_without_scripts_and_the_same_each_time(signed):
    folder = signed / "run"
    before = {name: (folder / name).read_bytes() for name in ("report.html", "report.md")}
    write_report(folder)
    assert before == {name: (folder / name).read_bytes() for name in before}
    low, high = re.search(rb"retrained models after ([\d,]+) to ([\d,]+)", before["report.html"]).groups()
    assert int(low.replace(b",", b"")) < int(high.replace(b",", b""))  # whatever the process hashes text to
    assert len(before["report.html"]) < 5_000_000
    text = before["report.html"].decode()
    assert "<script" not in text
    assert "http://" not in text.replace("http://www.w3.org/", "")
    assert "https://" not in text


def test_markdown_and_page_say_the_verdict_the_controls_and_the_limits(signed):
    result = json.loads((signed / "run" / "result.json").read_text())
    for name in ("report.html", "report.md"):
        text = (signed / "run" / name).read_text()
        for part in (result["verdict"], "approximate unlearning", "head only", "fine-tuning only", "retrained-4"):
            assert part in text


def test_the_page_says_who_asked_when_which_files_it_is_about_and_what_its_words_mean(signed):
    folder = signed / "run"
    text = (folder / "report.html").read_text("utf-8")
    assert "<dd>case 7</dd>" in text
    for name in ("original", "model"):
        assert hashlib.sha256((folder / f"{name}.safetensors").read_bytes()).hexdigest() in text
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text("utf-8").splitlines()]
    (audited,) = (own["time"] for own in events if own["event"] == "audited")
    assert f"{audited[:10]} {audited[11:19]} UTC" in text
    # It was signed later, and made anew for that.
    key = json.loads((folder / "dossier.json").read_text("utf-8"))["key"]
    assert f"by the key with the fingerprint <code>{key}</code>" in text
    assert "no key when this page was written" in (signed / "plain" / "report.html").read_text("utf-8")
    assert "fedunlearn verify FOLDER --key OPERATOR.pub" in text
    assert "<dd>operator not named</dd>" in text
    for word in (*VERDICTS, *GLOSSARY):
        assert f"<dt>{word}</dt>" in text
    labels = {figure.label for figure in FIGURES.values()} | set(MODELS.values())
    assert {"original", "head only", "linear probe", "neighbours (TV)", "membership AUC"} <= labels & set(GLOSSARY)


def test_what_the_class_is_named_now_by_hand():
    assert sent_to([1, 4, 0, 5], ("a", "b", "c", "d"), 2) == (
        "Test images of “c” are now named “d” (50 %), “b” (40 %), “a” (10 %)."
    )
    assert sent_to([0, 0], ("a", "b"), 1) == ""


def judged(verdict, controls=(), held=("indistinguishable from retraining",) * 3, **figures):
    """Return what the words look at: figures by the side of the band on which they lie."""
    return {
        "forget": [2],
        "verdict": verdict,
        "audits": {name: {"verdict": side, "figure": 0.9, "band": (0.1, 0.85)} for name, side in figures.items()},
        "controls": {str(k): {"verdict": own} for k, own in enumerate(controls)},
        "calibration": {"models": {str(k): {"verdict": own} for k, own in enumerate(held)}},
    }


def test_what_lies_outside_is_told_by_what_it_means():
    found = judged(
        "suppressed, not erased",
        **{"retain": "below", "probe": "above", "relearn": "inside", "cka": "below", "int8": "inside"},
        **{"neighbours": "below", "membership": None},  # nearer to retrained models than they are to each other
    )
    assert outside(found, ["int8"]) == [
        (
            "1 finds more of the class than in retrained models; the share of its images that is",
            [
                "recognised by a simple reader of the model's inside: 90.0 % (retrained models: mean 47.5 %, band to "
                "85.0 %)"
            ],
        ),
        ("1 shows that it is unlike retrained models in other ways: features (CKA)", []),
        (
            "1 shows that the other classes suffered; of their images",
            ["named right: 90.0 % (retrained models: mean 47.5 %, band from 10.0 %)"],
        ),
        (
            "1 cannot tell here, so what is asked stays open",
            ["U, 8 bits (Does rounding the weights to 8 bits bring it back?)"],
        ),
        ("1 lies outside on the side that speaks for the model: neighbours (TV)", []),
        ("1 cannot be held against a band: membership AUC", []),
        ("1 lies inside its band: relearning", []),
    ]
    (only,) = outside(judged("suppressed, not erased", probe="above", artefacts="above") | {"forget": [2, 3]})
    assert only[0].startswith("2 find more of the classes than")
    assert only[1][1] == "artefacts 0.9"
    passed = judged("indistinguishable from retraining", probe="inside", relearn="inside", int8="inside")
    assert outside(passed, ["int8"])[1:] == [("2 lie inside their bands: linear probe; relearning", [])]
    assert outside(judged("no verdict", probe="inside", artefacts="inside")) == []


@given(st.data())
def test_each_audit_is_counted_once_whatever_the_verdict(data):
    sides = {name: data.draw(st.sampled_from(("above", "inside", "below", None)), name) for name in FIGURES}
    open_ones = [name for name, side in sides.items() if side == "inside" and data.draw(st.booleans(), f"open {name}")]
    phrases = [
        text
        for text, _ in outside(
            judged(data.draw(st.sampled_from(sorted(set(VERDICTS) - {"no verdict"}))), **sides), open_ones
        )
    ]
    counted = sum(int(text.split()[0]) for text in phrases)
    assert counted == len(sides)


def test_how_sure_the_verdict_is_counts_held_out_models_and_controls():
    passing, failing = "indistinguishable from retraining", "suppressed, not erased"
    found = judged(failing, controls=(failing, passing), held=(passing, failing, passing), probe="above")
    assert "of the 3 here 2 passed when the others judged them. Of 2 controls, which must fail, 1 did (passed: 1);" in (
        certainty(found)
    )
    assert certainty(judged(passing, controls=(failing,), probe="inside")).startswith(
        "How sure: of 1 control, which must fail, 1 did; how often a model that still knows the class "
    )
    assert "No model that must fail was audited" in certainty(judged(failing, probe="above"))
    assert certainty(judged("no verdict", controls=(failing,))) == ""
    assert certainty(judged(failing, held=(), probe="above")) == ""


def test_a_pass_says_first_how_many_of_the_audits_can_tell():
    found = judged("indistinguishable from retraining", probe="inside", relearn="inside", cka="inside")
    found |= {"classes": ["a", "b", "c", "d"], "reason": "all 3 figures lie inside"}
    assert summary(found).startswith("Passed. In every audit the model behaves towards “c” like models retrained")
    assert summary(found, ["probe", "relearn"]).startswith(
        "Passed, by the 1 figure that can tell here, of 3: the model"
    )
    said = verdict_line(found, ["probe", "relearn"]).splitlines()
    assert said[1] == "  cannot tell here, as the original or everything lies in the band: linear probe, relearning"
    assert said[2].startswith("How sure: ")
    assert len(verdict_line(found).splitlines()) == 2


def test_numbers_keep_three_digits_and_nothing_has_a_minus_zero():
    assert [amount(value) for value in (0, 2, 2.694, 15.94, 175.2, 16380, 0.034)] == [
        *("0", "2", "2.69", "15.9", "175", "16,380", "0.0340")
    ]
    assert [signed(value) for value in (-0.04, 0.04, -7.46, 9.3)] == ["0.0", "0.0", "\N{MINUS SIGN}7.5", "+9.3"]


@in_browser
def test_on_a_phone_no_figure_or_verdict_is_off_the_screen(opened):
    page = opened(390)
    cells = page.locator("table.stack td").all()
    assert len(cells) > 80
    for cell in cells:
        box = cell.bounding_box()
        assert box is None or (box["x"] >= 0 and box["x"] + box["width"] <= 390), cell.inner_text()
    labels = page.evaluate("getComputedStyle(document.querySelector('td[data-label=verdict]'), '::before').content")
    assert labels == '"verdict"'


def test_every_figure_that_may_find_the_class_has_plain_words():
    counted = {name for name, kind in FIGURES.items() if kind.kind == "class" and kind.fixed is None}
    assert {name for name, kind in FIGURES.items() if kind.plain} == counted


def test_names_of_classes_are_text_in_the_page(tmp_path):
    recipe = load_recipe(
        str(write_set(tmp_path, oracles=0, names=("a", "$b_c$", "<script>alert(1)</script>", "d"))), ["train.rounds=1"]
    )
    result = run(recipe, tmp_path / "run")
    text = (tmp_path / "run" / "report.html").read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert result["verdict"] == "no verdict"
    assert "every figure is reported without a verdict" in text
    before, after = (
        json.loads((tmp_path / "run" / "audits" / f"{name}.json").read_text()) for name in ("original", "unlearned")
    )
    share = after["figures"]["probe"]["value"] / before["figures"]["probe"]["value"]
    assert (
        f"A hint, and no more: of what audits find of the class in the original, {100 * share:.0f} % by the lin" in text
    )


def test_ids_of_plots_do_not_meet():
    bars = {"a": 0.5, "b": 0.7}
    page = plots.per_class(bars, bars, {}) + plots.confusion([[1, 0], [0, 1]], ["a", "b"])
    ids = [part.split('"')[0] for part in page.split(' id="')[1:]]
    assert len(ids) == len(set(ids)) > 10
    assert plots.per_class(bars, bars, {}) == plots.per_class(bars, bars, {})


def test_the_plot_of_work_has_its_operations_in_numbers_that_people_read():
    many = plots.work([[(1e12, 0.5), (1e14, 0.9)]], {f"setting-{k}": [(2e12, 0.8)] for k in range(9)})
    assert all(f"setting-{k}" in many for k in range(9))
    drawn = plots.work([[(1e12, 0.5), (1e14, 0.9)]], {"contrast": [(2e12, 0.8)]})
    assert [f">{number}<" in drawn for number in (1, 10, 100)] == [True] * 3
    assert "$" not in drawn
    assert ">contrast<" in drawn

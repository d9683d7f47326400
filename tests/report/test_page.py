"""The page is whole, opens without a network, and shows what it is given as text."""

import json
import re
from html.parser import HTMLParser

import pytest

from lmlab.core.errors import UserError
from lmlab.report.metrics import METRICS
from lmlab.report.page import write_report

VOID = {"meta", "br", "hr", "img", "input", "link"}
ATTACK = "</pre></style><script>alert(1)</script><img src=http://a.b/c onerror='x'>\"&amp;"
ROWS = [
    {"step": 1, "kind": "train", "loss": 5.0, "bits_per_byte": 4.0, "grad_norm": 1.0},
    {"step": 2, "kind": "train", "loss": "nan", "bits_per_byte": 3.0, "grad_norm": "inf"},
    {"step": 2, "kind": "eval", "loss": 4.5, "bits_per_byte": 3.25},
    {"step": 2, "kind": "speed", "tokens_per_second": 1234.0, "elapsed_seconds": 9.0},
]
BARE = [{"step": 2, "kind": "eval", "accuracy": 0.5}]
"""A log without a value that has a curve: figures take time to draw."""


class Page(HTMLParser):
    """Checks that every element is closed in order, and keeps tags, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def folder_of(folder, rows=BARE, samples=(), **files):
    folder.mkdir(exist_ok=True)
    (folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    if samples:
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def page_of(folder):
    text = write_report(folder).read_text(encoding="utf-8")
    return Page(text), text


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder = folder_of(
        tmp_path_factory.mktemp("page") / "a <b>run & <i>",
        ROWS,
        samples=[{"step": s, "seed": 0, "prompt": ATTACK, "text": f"{ATTACK} at {s}"} for s in (1, 2)],
        config={"class": "x", "train": {"steps": 2, "name": ATTACK}, "prompts": [ATTACK]},
        baselines={"model": 2.0, "xz": 3.0, ATTACK: 4.0},
        environment={"jax": "0.1", "processor": ATTACK},
    )
    return page_of(folder)


def test_everything_is_on_the_page_and_every_element_is_closed(full):
    page, _ = full
    assert page.tags.count("svg") == 4
    for shown in (
        "a <b>run & <i>",
        "finished, 2 steps",
        "2.000",
        "4.500",
        "train.steps",
        "processor",
        "1,234",
    ):
        assert shown in page.text
    # Samples: newest first, prompt and text as they are.
    assert page.text.index(f"{ATTACK} at 2") < page.text.index(f"{ATTACK} at 1")


def test_nothing_is_loaded_and_nothing_runs(full):
    page, text = full
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    loads = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert [value for value in loads if not value.startswith("#")] == []
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert "@import" not in text
    assert all(value.startswith("#") for value in re.findall(r"url\(([^)]*)\)", text))


def test_what_a_run_holds_is_text_and_never_markup(full):
    page, text = full
    assert "<script" not in text
    # The page's own styles and those of the figures, and none that the attack closed.
    assert text.count("</style>") == text.count("<style")
    assert page.text.count("<script>alert(1)</script>") >= 7


def test_ids_of_figures_do_not_clash_and_references_resolve(full):
    page, text = full
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = {*re.findall(r"url\(#([^)]*)\)", text), *re.findall(r'href="#([^"]*)"', text)}
    assert used
    assert used <= set(ids)


@pytest.mark.parametrize("rows", [[], ROWS[:1], BARE], ids=["none", "first", "bare"])
def test_missing_pieces_are_left_out(tmp_path, rows):
    page, _ = page_of(folder_of(tmp_path / "run", rows))
    assert f"step {max((row['step'] for row in rows), default=0)}" in page.text
    for absent in ("Samples", "Operations", "Config", "Environment", "lower is better"):
        assert absent not in page.text


def test_the_table_of_a_profiled_run_is_shown_as_it_is(tmp_path):
    folder = folder_of(tmp_path / "run")
    (folder / "profile").mkdir()
    (folder / "profile/operations.txt").write_text(f"   1.000  100.0%  {ATTACK}\n")
    page, text = page_of(folder)
    assert f"   1.000  100.0%  {ATTACK}\n" in page.text
    assert "<script" not in text


def test_an_unfinished_run_says_how_far_it_is(tmp_path):
    page, _ = page_of(folder_of(tmp_path / "run", config={"train": {"steps": 50}}))
    assert "at step 2 of 50" in page.text


def test_what_a_kill_cut_off_does_not_break_the_page(tmp_path):
    sample = {"step": 1, "seed": 0, "prompt": "", "text": "whole"}
    folder = folder_of(tmp_path / "run", samples=[sample], config={"train": {"steps": 2}})
    (folder / "config.json").write_text('{"train": {"st')
    with (folder / "samples.jsonl").open("a") as file:
        file.write('{"step": 2, "prompt": "", "text": "cut off')
    page, _ = page_of(folder)
    assert "whole" in page.text
    assert "cut off" not in page.text


def test_a_sample_cut_off_after_a_brace_does_not_break_the_page(tmp_path):
    sample = {"step": 1, "seed": 0, "prompt": "", "text": "whole"}
    folder = folder_of(tmp_path / "run", samples=[sample])
    with (folder / "samples.jsonl").open("a") as file:
        file.write('{"step": 2, "prompt": "", "text": "cut = {}')
    page, _ = page_of(folder)
    assert "whole" in page.text
    assert "cut" not in page.text


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="run folder"):
        write_report(tmp_path)

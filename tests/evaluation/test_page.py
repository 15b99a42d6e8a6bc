"""The page of reports: everything in one file, and nothing that could run."""

import base64
import html.parser
import io
import re
from pathlib import Path

import pytest
from PIL import Image

from unclip.errors import DataError, ImageError
from unclip.evaluation.report import page, tables

RATES = {"at_1": 0.25, "at_5": 0.75, "clip_score": 0.5}
DISTANCE = {"space": "a space", "num": [4, 4], "frechet": 1.5, "kernel": 0.125}
GROUP = {"num": 4, "generated": RATES, "real": RATES, "distance": DISTANCE}
RETRIEVAL = {
    "num_captions": 8, "chance_at_1": 0.125, "chance_at_5": 0.625, "seen": GROUP, "held_out": {"num": 0},
}  # fmt: skip
PRIOR = {
    "seen": {
        "num": 4,
        "cosine": {"prior": 0.9, "text": 0.5, "other": 0.1, "mean": 0.3},
        "text_dot": {"prior": 0.45, "true": 0.4},
        "norm": {"prior": 10.0, "true": 11.0},
        "at_1": 0.5,
        "at_5": 1.0,
    },
    "held_out": {"num": 0},
}
PIXELS = {"size_px": 32, "mae": 0.0123, "psnr_db": 21.5, "ssim": 0.75}
LIKE = {"decoded": 0.8, "other": 0.2}
DECODER = {"captions": False, "seen": {"num": 4, "own": LIKE, "judge": LIKE, "small": PIXELS, "large": PIXELS}}
SETTINGS = {
    "prior_guidance_scale": 2.0, "decoder_guidance_scale": 4.0, "prior_num_inference_steps": 5,
    "decoder_num_inference_steps": 6, "super_res_num_inference_steps": 7, "sampler": "ddim",
}  # fmt: skip
POINT = {"settings": SETTINGS, "seconds_per_picture": 0.5, "seen": {"num": 4, **RATES, "distance": DISTANCE}}
SWEEP = {
    "num_captions": 8, "chance_at_1": 0.125, "chance_at_5": 0.625, "real": {"seen": {"num": 4, **RATES}},
    "points": [POINT, {**POINT, "settings": SETTINGS | {"decoder_guidance_scale": 8.0}}],
}  # fmt: skip
ALL = {"retrieval": RETRIEVAL, "variations": {"seen": GROUP}, "prior": PRIOR, "decoder": DECODER, "sweep": SWEEP}


class Elements(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.texts.append(data)


def made(report, folder=Path(), **more):
    return page([(folder / "report.json", {"model": "mine", "unclip": "0.1", **report})], title="t", **more)


@pytest.mark.parametrize("name", ALL)
def test_every_measure_has_its_tables_on_the_page(name):
    text, left_out = made({name: ALL[name]})
    elements = Elements(text)
    for table in tables(name, ALL[name]):
        assert table.title in elements.texts
        assert {cell for row in table.rows for cell in row if cell} <= set(elements.texts)
    assert left_out == []
    assert f"{name.capitalize()}: mine" in elements.texts
    assert f"{name.capitalize()}: mine on data" in Elements(made({name: ALL[name], "data": "data"})[0]).texts
    assert elements.tags.count("svg") == (2 if name == "sweep" else 0)


def test_figures_stand_where_they_belong():
    cosine, dots = tables("prior", PRIOR)
    assert list(cosine.rows) == [["seen", "4", "0.900", "0.500", "0.100", "0.300", "50.0%", "100.0%"]]
    assert list(dots.rows) == [["seen", "0.450", "0.400", "10.000", "11.000"]]
    near, pixels = tables("decoder", DECODER)
    assert list(near.rows) == [["seen", "4", "0.800", "0.200", "0.800", "0.200"]]
    assert pixels.rows[0] == ["seen, 32 px", "0.0123", "21.50", "0.750"]
    (swept,) = tables("sweep", SWEEP)
    assert swept.rows[0] == ["2-4 / 5-6-7 / ddim", "0.500", "25.0%", "75.0%", "0.500", "1.5000"]
    assert swept.rows[-1][0] == "real pictures"
    rates, distant = tables("retrieval", RETRIEVAL)
    assert rates.rows[-1] == ["chance", "8", "12.5%", "62.5%", ""]
    assert distant.rows[0] == ["seen, in a space", "Fréchet", "1.5000", "0.125000"]
    assert tables("nothing", {}) == []


def test_a_distance_is_called_fid_only_where_it_is_one():
    inception = {"space": "Inception", "num": [4, 4], "fid": 33.0, "kernel": 0.1}
    (_, distant) = tables("retrieval", RETRIEVAL | {"seen": GROUP | {"feature_distance": inception}})
    assert [row[1] for row in distant.rows] == ["Fréchet", "FID"]
    assert "FID" not in made({"retrieval": RETRIEVAL})[0]


def test_pictures_are_in_the_page(tmp_path):
    (tmp_path / "sheets").mkdir()
    Image.new("RGB", (20, 10), "red").save(tmp_path / "sheets" / "a.png")
    Image.new("RGB", (4000, 100), "blue").save(tmp_path / "b.png")
    text, left_out = made(
        {"retrieval": RETRIEVAL, "pictures": ["sheets/a.png"]}, tmp_path, pictures=[tmp_path / "b.png"]
    )
    sources = [value for name, value in Elements(text).attributes if name == "src"]
    assert left_out == []
    images = [Image.open(io.BytesIO(base64.b64decode(each.removeprefix("data:image/png;base64,")))) for each in sources]
    assert [image.size for image in images] == [(20, 10), (1600, 40)]
    assert images[0].getpixel((3, 3)) == (255, 0, 0)
    with pytest.raises(ImageError):
        made({"retrieval": RETRIEVAL}, pictures=[tmp_path / "missing.png"])


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png", "missing.png", "text.png", "", 7, "a\0b"])
def test_pictures_that_are_left_out(tmp_path, name):
    inside = tmp_path / "inside"
    inside.mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (inside / "text.png").write_text("no picture")
    text, left_out = made({"retrieval": RETRIEVAL, "pictures": [name]}, inside)
    assert "img" not in Elements(text).tags
    assert len(left_out) == 1
    assert "is left out" in left_out[0]


def test_nothing_in_a_report_can_run(tmp_path):
    bad = "</title></style><script>alert(1)</script><img src=http://x onerror=alert(1)>"
    point = {**POINT, "settings": SETTINGS | {"sampler": bad}}
    report = {"model": bad, bad: bad, "sweep": SWEEP | {"points": [POINT, point]}, "settings": {bad: bad}}
    text, _ = page([(tmp_path / "r.json", report)], title=bad)
    elements = Elements(text)
    assert not {"script", "img", "iframe", "object", "link", "a"} & set(elements.tags)
    assert not [name for name, _ in elements.attributes if name.startswith("on")]
    assert "default-src 'none'" in text
    assert not re.search(r'(?:src|href)="?http', re.sub("&lt;.*?&gt;", "", text))


@pytest.mark.parametrize(
    ("report", "words"),
    [
        ({}, "not a report of unclip evaluate"),
        ({"retrieval": 3}, "not a report of unclip evaluate"),
        ({"retrieval": {"seen": {"num": 2, "real": {}}}}, "not a complete retrieval report"),
        ({"prior": {"seen": {"cosine": 3}}}, "not a complete prior report"),
        ({"sweep": {"points": [{}], "real": {"seen": RATES}}}, "not a complete sweep report"),
        ({"sweep": []}, "not a report of unclip evaluate"),
    ],
)
def test_what_is_no_report(report, words):
    with pytest.raises(DataError, match=words):
        made(report)


def test_a_table_for_a_terminal():
    lines = str(tables("prior", PRIOR)[0]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["number", "prior", "text", "itself", "another's", "mean", "first", "in", "five"]

"""The page, its files and routes; and with a browser, every tab of it."""

import base64
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from unclip.clip.concepts import Concepts
from unclip.pipelines.session import MADE_WITH, png_texts
from unclip.server.site import PAGE, settings_of

from .conftest import Live, wait_until

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # as the server does
NAMES = (("red apple", "apple"), ("cat",), ("house",))


def png(color: str = "red", size: int = 16, **texts: Any) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (size, size), color).save(stream, "PNG", pnginfo=png_texts(texts) if texts else None)
    return stream.getvalue()


@pytest.fixture(scope="session")
def knowing(serve, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server whose model has a list of concepts."""
    folder = tmp_path_factory.mktemp("knowing") / "tiny"
    shutil.copytree(model_folder, folder)
    width = json.loads((folder / "text_encoder" / "config.json").read_text())["projection_dim"]
    Concepts("tiny", NAMES, torch.eye(len(NAMES), width), 0.1).write(folder)
    with serve(models=[f"tiny={folder}"]) as server:
        yield server


# ---- without a browser ----


@pytest.mark.parametrize(("name", "media_type"), PAGE.items())
def test_the_files_of_the_page(live, name, media_type):
    with live.http() as http:
        answer = http.get(f"/{name}")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == f"{media_type}; charset=utf-8"
    rules = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == rules["frame-ancestors"] == "'none'"
    assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == "'self'"
    assert not re.search(r"https?://|//\w+\.\w|\son\w+=|\sstyle=", answer.text), "an address or code that CSP refuses"


def test_the_page_needs_no_key_and_the_routes_do(serve):
    with serve(api_keys=["a key of mine"]) as server, server.http() as http:
        assert [http.get(f"/{name}").status_code for name in PAGE] == [200] * len(PAGE)
        assert http.get("/v1/concepts").status_code == 401
        assert http.post("/v1/settings", files={"image": png()}).status_code == 401


def test_concepts(knowing):
    with knowing.http() as http:
        found = http.get("/v1/concepts").json()
        assert found["total"] == 3
        assert found["data"][0] == {"object": "concept", "id": 0, "name": "red apple", "other_names": ["apple"]}
        assert [each["id"] for each in http.get("/v1/concepts?offset=1&limit=1").json()["data"]] == [1]
        assert [each["name"] for each in http.get("/v1/concepts?query=app").json()["data"]] == ["red apple"]
        first, second = http.get("/v1/concepts/1/picture"), http.get("/v1/concepts/1/picture")
        assert first.content == second.content
        assert Image.open(io.BytesIO(first.content)).size == (16, 16)
        refusal = http.get("/v1/concepts/3/picture")
        assert (refusal.status_code, refusal.json()["error"]["code"]) == (404, "not_found")


def test_a_model_without_concepts(live):
    with live.http() as http:
        assert http.get("/v1/concepts").json() == {"object": "list", "data": [], "total": 0}
        assert http.get("/v1/concepts/0/picture").status_code == 404


def test_the_settings_of_a_made_picture(live):
    asked = {"prompt": "a cat", "seed": 7, "steps": 2, "guidance": 1.5, "sampler": "ddim", "negative_prompt": "a dog"}
    with live.http() as http:
        made = http.post("/v1/images/generations", json=asked).json()
        picture = http.get(made["data"][0]["url"]).content
        found = http.post("/v1/settings", files={"image": picture}).json()
    assert (found["type"], found["model"]) == ("generation", "tiny")
    assert found["software"].startswith("unclip ")
    assert {name: found["fields"][name] for name in asked} == asked


def test_the_settings_of_other_files(live):
    with live.http() as http:
        foreign = http.post("/v1/settings", files={"image": png()})
        assert (foreign.status_code, foreign.json()["software"], foreign.json()["fields"]) == (200, None, {})
        assert http.post("/v1/settings", files={"image": b"no picture"}).json()["error"]["code"] == "invalid_image"
        assert http.post("/v1/settings", json={}).json()["error"]["code"] == "missing_required_parameter"


@pytest.mark.parametrize(
    ("texts", "kind", "fields"),
    [
        ({"from": "a", "to": "b", "strength": "0.5", "seed": "no"}, "edit", {"from": "a", "to": "b", "strength": 0.5}),
        ({"prompt": "a", MADE_WITH: {"command": "inpaint"}}, "edit", {"prompt": "a"}),
        ({MADE_WITH: {"command": "vary"}, "settings": {"sampler": "ddim", "x": []}}, "variation", {"sampler": "ddim"}),
        ({MADE_WITH: "?", "settings": {"decoder_num_inference_steps": [1]}}, "variation", {}),
    ],
)
def test_the_job_of_settings(texts, kind, fields):
    found = settings_of({"Software": "unclip 1", **texts})
    assert (found["type"], found["fields"]) == (kind, fields)


def interpolation(http, **fields: Any) -> dict[str, Any]:
    job = http.post("/v1/jobs", json={"type": "interpolation", "frames": 5, "seed": 3, **fields}).json()
    if "id" in job:
        wait_until(lambda: http.get(f"/v1/jobs/{job['id']}").json()["status"] not in ("queued", "running"))
        job = http.get(f"/v1/jobs/{job['id']}").json()
    return job


def test_an_interpolation(live, serve):
    """It starts as a picture of the caption's embedding; smaller batches make the same frames."""
    ends = ["a cat", "data:image/png;base64," + base64.b64encode(png()).decode()]
    with live.http() as http, serve(max_batch=2) as other, other.http() as second:
        job, again = interpolation(http, input=ends), interpolation(second, input=ends)
        assert job["request"] == {"input": ["a cat", "picture"], "frames": 5, "seed": 3}
        frames = [http.get(each["url"]).content for each in job["result"]["data"]]
        film = Image.open(io.BytesIO(http.get(job["result"]["film"]["url"]).content))
        assert (len(frames), film.format, film.n_frames, film.size) == (5, "WEBP", 8, (16, 16))
        given = {"input": ["a cat"], "space": "prior", "seed": 3}
        start = http.post("/v1/embeddings", json=given).json()["data"][0]["embedding"]
        made = http.post("/v1/images/decode", json={"embeddings": [start], "seed": 3}).json()
        first = http.get(made["data"][0]["url"]).content
        smaller = [second.get(each["url"]).content for each in again["result"]["data"]]
        for one, two in zip([frames[0], *frames], [first, *smaller], strict=True):
            pairs = [torch.tensor(list(Image.open(io.BytesIO(each)).tobytes())) for each in (one, two)]
            assert (pairs[0].int() - pairs[1].int()).abs().max() <= 1
        http.delete(f"/v1/jobs/{job['id']}")
        assert http.get(job["result"]["film"]["url"]).status_code == 404


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": ["a"]}, "input"),
        ({"input": ["a", " "]}, "input"),
        ({"input": ["a", "b"], "frames": 1}, "frames"),
        ({"input": ["a", "data:image/png;base64,AAAA"]}, "input"),
    ],
)
def test_wrong_interpolations(live, fields, param):
    with live.http() as http:
        assert interpolation(http, **fields)["error"]["param"] == param


# ---- with a browser ----


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, headless. Skips without Playwright or a browser."""
    api = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with api.sync_playwright() as playwright:
        try:
            made = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"no browser: {error}"[:200])
        yield made
        made.close()


class Visit:
    """A page of a server; it notes errors and requests to other machines."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.url, self.problems = url, []
        own = (url, "blob:", "data:")
        self.page.on("request", lambda sent: sent.url.startswith(own) or self.problems.append(sent.url))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda line: line.type == "error" and self.problems.append(line.text))

    def open(self, tab: str = "generate") -> Any:
        self.page.goto(f"{self.url}/#{tab}")
        self.page.wait_for_selector("html[data-ready]")
        return self.page


@pytest.fixture
def visit(browser, knowing) -> Iterator[Visit]:
    made = Visit(browser, knowing.url)
    made.page.set_default_timeout(60_000)
    yield made
    problems = list(made.problems)
    made.context.close()
    assert problems == []


def choose(page: Any, selector: str, content: bytes) -> None:
    page.set_input_files(selector, {"name": "a.png", "mimeType": "image/png", "buffer": content})


def newest(live: Live) -> dict[str, Any]:
    with live.http() as http:
        return http.get("/v1/jobs?limit=1").json()["data"][0]


@pytest.mark.slow
def test_generate_view_and_vary(visit, knowing):
    page = visit.open()
    page.fill("#generate [name=prompt]", "a red apple")
    page.fill("#generate [name=n]", "2")
    page.click("#generate summary")
    page.fill("#generate [name=steps]", "2")
    page.select_option("#generate [name=sampler]", "ddim")
    page.click("#generate .primary")
    page.locator("#generate .job").first.locator(".tile.made").nth(1).wait_for()
    job = newest(knowing)
    expected = {"prompt": "a red apple", "n": 2, "steps": 2, "sampler": "ddim", "partial_images": 3}
    assert job["request"] == expected
    page.locator("#generate .job").first.locator(".tile button").nth(0).click()
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#viewer .quiet").endswith("2 of 2")
    with page.expect_download() as waited:
        page.click("#viewer a:has-text('Download')")
    assert "seed" in Image.open(waited.value.path()).info, "the file has no metadata"
    page.click("#viewer button:has-text('Vary')")
    page.click("#vary .primary")
    page.locator("#vary .job").first.locator(".tile.made").nth(3).wait_for()
    assert newest(knowing)["type"] == "variation"
    page.click("#tab-history")
    page.locator("#past button:has-text('Use these settings')").nth(0).click()
    page.wait_for_selector("#vary .well.full")


@pytest.mark.slow
def test_interpolate(visit, knowing):
    page = visit.open("interpolate")
    page.fill("[name=start]", "a cat")
    choose(page, "#interpolate [data-name=end_picture] input", png())
    page.fill("[name=frames]", "3")
    page.click("#interpolate .primary")
    page.locator("#interpolate .strip .tile.made").nth(2).wait_for()
    assert page.is_visible("#interpolate .film img")
    assert newest(knowing)["request"]["input"] == ["a cat", "picture"]


@pytest.mark.slow
def test_paint_and_change_by_words(visit, knowing):
    visit.page.add_init_script("""const real = fetch; window.fetch = (path, options) => {
        if (options?.body instanceof FormData) window.sent = options.body;
        return real(path, options); }""")
    page = visit.open("edit")
    choose(page, "#edit .well input", png(size=32))
    page.fill("#edit [name=prompt]", "a cat")
    page.click("#edit .primary")
    assert "Paint over the part" in page.inner_text("#edit .problem")
    page.locator("canvas.paint").scroll_into_view_if_needed()
    box = page.locator("canvas.paint").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()
    page.click("#edit .primary")
    page.wait_for_selector("#edit .job")
    content = page.evaluate("async () => [...new Uint8Array(await window.sent.get('mask').arrayBuffer())]")
    mask = Image.open(io.BytesIO(bytes(content))).getchannel("A")
    assert mask.size == (32, 32)
    assert [mask.getpixel(place) for place in ((16, 16), (10, 16), (16, 2), (1, 16))] == [0, 0, 255, 255]
    page.wait_for_selector("#edit .tile.made")
    page.check("#edit [value=words]", force=True)
    page.fill("#edit [name=from]", "a cat")
    page.fill("#edit [name=to]", "a dog")
    page.click("#edit .primary")
    page.locator("#edit .tile.made").nth(1).wait_for()
    assert newest(knowing)["request"]["strength"] == 0.5


@pytest.mark.slow
def test_a_mask_file_and_the_keyboard(visit):
    page = visit.open("edit")
    choose(page, "#edit .well input", png(size=32))
    page.wait_for_selector(".brush")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    stream = io.BytesIO()
    mask.save(stream, "PNG")
    choose(page, "#edit [name=mask_file]", stream.getvalue())
    painted = "() => document.querySelector('canvas.paint').getContext('2d').getImageData(0, 0, 32, 32).data"
    share = f"() => Array.from(({painted})()).filter((v, i) => i % 4 == 3 && v > 127).length / 1024"
    wait_until(lambda: page.evaluate(share) == 0.5)
    page.click("[data-do=invert]")
    assert page.evaluate(share) == 0.5
    page.click("[data-do=clear]")
    page.focus("canvas.paint")
    page.keyboard.press("Space")
    assert 0 < page.evaluate(share) < 0.1


@pytest.mark.slow
def test_concepts_are_searched_and_used(visit):
    page = visit.open("concepts")
    page.locator("#concepts .tile.made").nth(2).wait_for()
    page.fill("#concepts [name=query]", "apple")
    page.wait_for_selector("#concept-count:has-text('1 concept')")
    page.click("#concept-list button")
    assert page.input_value("#generate [name=prompt]") == "red apple"


@pytest.mark.slow
def test_a_reload_finds_its_jobs_and_cancels_one(visit, knowing):
    page = visit.open()
    with knowing.busy():
        for prompt in ("first of two", "second of two"):
            page.fill("#generate [name=prompt]", prompt)
            page.click("#generate .primary")
            page.wait_for_selector(f"#generate .job:has-text('{prompt}')")
        page.reload()
        second = page.locator(".job:has-text('second of two')")
        second.locator("text=Waiting: 2 before this one").wait_for()
        second.locator("button:has-text('Cancel')").click()
        second.locator("text=Cancelled.").wait_for()
    page.wait_for_selector("#generate .job:has-text('first of two') .tile.made")


@pytest.mark.slow
def test_a_running_job_survives_a_reload_and_is_cancelled(visit, knowing):
    page = visit.open()
    page.fill("#generate [name=prompt]", "a long job")
    page.click("#generate summary")
    page.fill("#generate [name=steps]", "1000")
    page.fill("#generate [name=n]", "8")
    page.click("#generate .primary")
    page.locator(".job:has-text('a long job') .bar:has-text('Decoder')").wait_for()
    page.reload()
    card = page.locator(".job:has-text('a long job')")
    card.locator(".bar:has-text('Decoder')").wait_for()
    card.locator("button:has-text('Cancel')").click()
    card.locator("text=Cancelled.").wait_for()
    wait_until(lambda: knowing.engine.num_pending == 0)


@pytest.mark.slow
def test_a_dropped_png_restores_its_settings(visit):
    page = visit.open()
    content = png(prompt="a blue house", seed=5, settings={"decoder_num_inference_steps": 9})
    drop = """(bytes) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], "a.png", { type: "image/png" }));
        document.querySelector("main").dispatchEvent(new DragEvent("drop", { bubbles: true, dataTransfer: data }));
    }"""
    page.evaluate(drop, list(content))
    page.click("#restore [data-do=apply]")
    wait_until(lambda: page.input_value("#generate [name=prompt]") == "a blue house")
    assert [page.input_value(f"#generate [name={name}]") for name in ("seed", "steps")] == ["5", "9"]
    page.evaluate(drop, list(content))
    page.click("#restore [data-do=reference]")
    page.wait_for_selector("#vary .well.full")
    page.reload()
    page.evaluate(drop, list(png()))
    page.wait_for_selector("#vary .well.full")


@pytest.mark.slow
def test_the_keyboard_and_the_labels(visit):
    page = visit.open()
    page.focus("#tab-generate")
    seen = []
    for _ in range(6):
        page.keyboard.press("ArrowRight")
        seen.append(page.evaluate("() => document.activeElement.getAttribute('aria-controls')"))
    assert seen == ["vary", "interpolate", "edit", "concepts", "history", "generate"]
    unnamed = """() => [...document.querySelectorAll("input, textarea, select, button, canvas[tabindex]")].filter(
        (each) => !each.labels?.length && !each.ariaLabel && !each.textContent.trim()).map((each) => each.outerHTML)"""
    assert page.evaluate(unnamed) == []
    repeated = """() => { const ids = [...document.querySelectorAll("[id]")].map((each) => each.id);
        return ids.filter((id, i) => ids.indexOf(id) !== i); }"""
    assert page.evaluate(repeated) == []


@pytest.mark.slow
def test_a_phone_has_no_sideways_scrolling(browser, knowing):
    visit = Visit(browser, knowing.url, viewport={"width": 390, "height": 844}, color_scheme="dark")
    page = visit.open()
    for tab in ("generate", "vary", "interpolate", "edit", "concepts", "history"):
        page.click(f"#tab-{tab}")
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 390, tab
    visit.context.close()
    assert visit.problems == []


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_axe_finds_no_violation(browser, knowing, npm, scheme, width):
    visit = Visit(
        browser, knowing.url, viewport={"width": width, "height": 844}, color_scheme=scheme, reduced_motion="reduce"
    )
    page = visit.open()
    page.evaluate((npm / "axe-core" / "axe.min.js").read_text(encoding="utf-8"))
    page.fill("#generate [name=prompt]", "a cat")
    page.click("#generate .primary")
    page.wait_for_selector("#generate .tile.made")
    choose(page, "#edit .well input", png(size=32))
    found = []

    def look(place: str) -> None:
        for each in page.evaluate("async () => (await axe.run()).violations"):
            found.append((place, each["id"], [node["html"] for node in each["nodes"]]))

    for tab in ("vary", "interpolate", "edit", "concepts", "history", "generate"):
        page.click(f"#tab-{tab}")
        look(tab)
    page.click("#generate summary")
    look("advanced")
    page.locator("#generate .tile button").nth(0).click()
    look("viewer")
    visit.context.close()
    assert found == []
    assert visit.problems == []


@pytest.mark.slow
def test_a_key_is_asked_for(browser, serve):
    with serve(api_keys=["the right key"]) as server:
        visit = Visit(browser, server.url)
        page = visit.page
        page.goto(server.url)
        page.fill("#key input", "a wrong key")
        page.click("#key button")
        page.wait_for_selector("#key-title:has-text('wrong')")
        page.fill("#key input", "the right key")
        page.click("#key button")
        page.wait_for_selector("html[data-ready]")
        assert page.is_hidden("#tab-concepts")
        page.fill("#generate [name=prompt]", "a cat")
        page.click("#generate .primary")
        page.wait_for_selector("#generate .tile.made")
        visit.context.close()

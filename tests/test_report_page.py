"""The report in a browser: headless Chromium, the system's own."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from reportruns import make_run, write_lines

from diffexp.report import write
from diffexp.report.watch import serve

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")

SCHEMES = ("light", "dark")
PHONE, DESK = {"width": 360, "height": 740}, {"width": 1280, "height": 900}
EVIL = ("<img src=x onerror=alert(1)>", "</script><script>alert(1)</script>", "w" * 90)

LISTEN = """
window.violations = [];
addEventListener("securitypolicyviolation", (event) => violations.push(event.violatedDirective));
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Opened:
    """A page, and everything that it said or asked for."""

    def __init__(self, browser: Any, url: str, **context: Any) -> None:
        self.context = browser.new_context(**{"viewport": DESK, "reduced_motion": "reduce", **context})
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(dialog.message))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.add_init_script(LISTEN)
        self.page.goto(url)

    def requests(self) -> list[str]:
        """What was asked for besides the page and what it holds itself."""
        return [url for url in self.asked if not url.startswith("data:") and url != self.page.url]


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Opened]]:
    pages: list[Opened] = []

    def open_page(url: str | Path, **context: Any) -> Opened:
        pages.append(Opened(browser, url.as_uri() if isinstance(url, Path) else url, **context))
        return pages[-1]

    yield open_page
    for one in pages:
        one.context.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arms of two seeds."""
    folder = tmp_path_factory.mktemp("report")
    runs = [make_run(folder / f"{x}-{seed}", seed, x) for x in (False, True) for seed in (0, 1)]
    return write(runs, folder / "report.html")


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run whose prompts are HTML, and which is not finished."""
    return write([make_run(tmp_path_factory.mktemp("evil") / "run", prompts=EVIL, iterations=12, done=8)])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("which", ["report", "evil"])
def test_it_renders_and_says_and_asks_nothing(
    opened: Callable[..., Opened], request: pytest.FixtureRequest, which: str, scheme: str
) -> None:
    it = opened(request.getfixturevalue(which), color_scheme=scheme)
    plots = it.page.locator(".plot")
    assert plots.count() >= 8
    assert plots.locator("canvas").count() == plots.count()
    inked = "c => new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size > 8"
    assert all(canvas.evaluate(inked) for canvas in plots.locator("canvas").all())
    loaded = "all => all.every((image) => image.complete && image.naturalWidth > 0)"
    assert it.page.locator("img").evaluate_all(loaded)
    assert it.page.evaluate("violations") == []
    assert it.said == []
    assert it.requests() == []


def test_prompts_stay_text(opened: Callable[..., Opened], evil: Path) -> None:
    it = opened(evil)
    assert it.page.locator(".prompt").all_inner_texts()[:3] == list(EVIL)
    assert it.page.locator(".prompt *").count() == 0


def test_the_slider_moves_by_keyboard(opened: Callable[..., Opened], report: Path) -> None:
    page = opened(report).page
    image = page.locator("img[data-reel='1'][data-tile='0']")
    seen = [(image.get_attribute("src"), page.locator("#caption").inner_text())]
    slider = page.get_by_label("Moment of training")
    slider.focus()
    for key in ("ArrowLeft", "Home"):
        page.keyboard.press(key)
        seen.append((image.get_attribute("src"), page.locator("#caption").inner_text()))
    assert len({source for source, _ in seen}) == 3
    assert [caption.splitlines()[0].split("\n")[0][:24] for _, caption in seen] == [
        "iteration 8, 512 queries",
        "iteration 6, 384 queries",
        "untouched model",
    ]
    assert seen[2][0] == page.locator("img:not([data-reel])").first.get_attribute("src")
    assert slider.get_attribute("aria-valuetext") == "untouched model"
    assert image.get_attribute("alt") == "a cat riding a bike: DDPO + DiffExp, untouched model"
    assert page.locator("#caption").get_attribute("aria-live") == "polite"
    page.keyboard.press("End")
    assert image.get_attribute("src") == seen[0][0]


def test_play_runs_once_through_training(opened: Callable[..., Opened], report: Path) -> None:
    page = opened("about:blank").page
    page.clock.install()
    page.goto(report.as_uri())
    button = page.locator("#play")
    button.click()
    assert (button.inner_text(), button.get_attribute("aria-pressed")) == ("Pause", "true")
    assert page.locator("#moment").input_value() == "0"
    page.clock.run_for(60_000)
    assert page.locator("#moment").input_value() == "4"
    assert (button.inner_text(), button.get_attribute("aria-pressed")) == ("Play", "false")


def test_charts_tell_their_values_to_mouse_and_keyboard(opened: Callable[..., Opened], report: Path) -> None:
    page = opened(report).page
    chart = page.locator("[data-chart='reward-0']")
    plot, value = chart.locator(".plot"), chart.locator(".value").first
    end = value.inner_text()
    assert re.fullmatch(r"\d\.\d{3} ± 0\.\d+", end)
    plot.focus()
    page.keyboard.press("Home")
    assert value.inner_text() != end
    assert chart.locator(".at").inner_text() == "at 0 queries"
    spoken = str(plot.get_attribute("aria-valuetext"))
    assert spoken.startswith(f"0 queries: DDPO {value.inner_text()}; DDPO + DiffExp ")
    page.keyboard.press("Tab")
    assert value.inner_text() == end
    box = plot.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2 + 20, box["y"] + box["height"] / 2)
    assert chart.locator(".at").inner_text() == "at 256 queries"
    # the other charts over queries point at the same place
    assert page.locator("[data-chart='reward-1'] .at").inner_text() == "at 256 queries"


def test_the_guidance_scale_is_told_from_its_low_value_on(opened: Callable[..., Opened], report: Path) -> None:
    chart = opened(report).page.locator("[data-chart='guidance']")
    assert chart.locator(".value").all_inner_texts() == ["5.0", "1.0 → 5.0"]
    assert chart.locator(".at").inner_text() == "from t = 1000 to 0"
    chart.locator(".plot").press("Home")
    assert chart.locator(".value").all_inner_texts() == ["5.0", "1.0"]


def test_a_y_axis_that_leaves_out_0_is_told(opened: Callable[..., Opened], report: Path) -> None:
    page = opened(report).page
    assert page.locator("[data-chart='reward-0'] .cut").is_visible()
    assert page.locator("[data-chart='gain-0'] .cut").is_hidden()


def test_the_last_query_has_a_tick(opened: Callable[..., Opened], tmp_path: Path) -> None:
    file = write([make_run(tmp_path / "run", iterations=6)])
    draws = """const fill = CanvasRenderingContext2D.prototype.fillText; window.drawn = [];
      CanvasRenderingContext2D.prototype.fillText = function (text, ...rest) {
        window.drawn.push(text); fill.call(this, text, ...rest); };"""
    page = opened("about:blank").page
    page.add_init_script(draws)
    page.goto(file.as_uri())
    drawn = page.evaluate("drawn")
    assert "384" in drawn
    assert "350" not in drawn, "too near"
    assert "300" in drawn


def test_every_chart_is_a_table_too(opened: Callable[..., Opened], report: Path) -> None:
    page = opened(report).page
    page.locator("[data-chart='reward-0'] summary").click()
    rows = page.locator("[data-chart='reward-0'] tbody tr")
    assert rows.count() == 5
    assert re.fullmatch(r"512\s+\d\.\d{3} ± 0\.\d+\s+\d\.\d{3} ± 0\.\d+", rows.last.inner_text())
    assert page.locator(".plot").count() == page.locator("figure.chart table").count()


def test_the_policy_is_in_force(opened: Callable[..., Opened], evil: Path) -> None:
    page = opened(evil).page
    done = page.evaluate(
        """async () => {
          const script = document.createElement("script");
          script.textContent = "window.ran = true";
          document.body.append(script);
          const style = document.createElement("style");
          style.textContent = "body { color: rgb(1, 2, 3) }";
          document.head.append(style);
          const image = "<img src='https://example.invalid/x.png' onerror='window.ran = true'>";
          document.body.insertAdjacentHTML("beforeend", image);
          let fetched = true;
          try { await fetch("https://example.invalid/"); } catch { fetched = false; }
          return [window.ran, getComputedStyle(document.body).color === "rgb(1, 2, 3)", fetched];
        }"""
    )
    assert done == [None, False, False]
    found = set(page.evaluate("violations"))
    assert {"script-src-elem", "style-src-elem", "connect-src", "img-src"} <= found


@pytest.mark.parametrize("which", ["report", "evil"])
def test_a_phone_needs_no_sideways_scrolling(
    opened: Callable[..., Opened], request: pytest.FixtureRequest, which: str
) -> None:
    page = opened(request.getfixturevalue(which), viewport=PHONE).page
    page.locator("details").evaluate_all("all => all.forEach((one) => { one.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    beyond = """() => [...document.querySelectorAll("main *")].filter((one) =>
      !one.closest(".scroll:not(.stacked), pre, .unseen, svg") && one.getBoundingClientRect().right > innerWidth + 1
    ).map((one) => one.outerHTML.slice(0, 80))"""
    assert page.evaluate(beyond) == []
    widths = page.locator(".plot").evaluate_all("all => all.map((one) => one.querySelector('canvas').clientWidth)")
    assert all(0 < width <= PHONE["width"] - 32 for width in widths)


def test_a_phone_shows_every_cell_and_no_image_alone(opened: Callable[..., Opened], report: Path) -> None:
    page = opened(report, viewport=PHONE).page
    outcome = page.locator("section:has(#outcome) .scroll")
    assert outcome.count() == 3
    page.locator("details").evaluate_all("all => all.forEach((one) => { one.open = true; })")
    assert outcome.evaluate_all("all => all.every((one) => one.scrollWidth <= one.clientWidth)")
    last = page.locator("section:has(#outcome) .scroll").last.locator("tbody tr").first.locator("td").last
    label = last.evaluate("one => getComputedStyle(one, '::before').content")
    assert label == '"DDPO + DiffExp"'
    rows = "all => all.map((one) => new Set([...one.children].map((image) => image.offsetTop)).size)"
    assert set(page.locator(".images").evaluate_all(rows)) == {1}
    assert page.locator(".images").first.locator("img").count() == 3


def test_a_table_that_scrolls_keeps_its_first_column(opened: Callable[..., Opened], report: Path) -> None:
    page = opened(report, viewport={"width": 240, "height": 740}).page
    page.locator("[data-chart='reward-0'] summary").click()
    table = page.locator("[data-chart='reward-0'] .scroll")
    first = "one => one.querySelector('tbody th').getBoundingClientRect().left - one.getBoundingClientRect().left"
    table.evaluate("one => one.scrollTo(1000, 0)")
    assert table.evaluate("one => one.scrollLeft") > 20
    assert table.evaluate(first) == pytest.approx(0, abs=1)


CONTRAST = """() => {
  const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const luminance = (rgb) => {
    const linear = (v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = rgb.slice(0, 3).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (one) => {
    for (let at = one; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const one = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || one.closest("script, style, .unseen, .skip")) continue;
    const [a, b] = [luminance(parse(getComputedStyle(one).color)), luminance(behind(one))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), walker.currentNode.textContent.trim().slice(0, 40)]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", SCHEMES)
def test_text_has_contrast(opened: Callable[..., Opened], evil: Path, scheme: str) -> None:
    page = opened(evil, color_scheme=scheme).page
    found = page.evaluate(CONTRAST)
    assert len(found) > 100
    assert [entry for entry in found if entry[0] < 4.5] == []
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")


def test_a_screen_reader_finds_its_way(opened: Callable[..., Opened], report: Path) -> None:
    page = opened(report).page
    assert page.locator("img:not([alt]), img[alt='']").count() == 0
    levels = page.locator("h1, h2, h3, h4").evaluate_all("all => all.map((one) => Number(one.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    names = """all => all.filter((one) => !(one.ariaLabel || one.innerText || one.labels?.[0]?.innerText))
      .map((one) => one.outerHTML.slice(0, 80))"""
    assert (
        page.locator("input, button, summary, [tabindex='0'], [role=slider], [role=region]").evaluate_all(names) == []
    )
    assert page.locator("th:not([scope])").count() == 0
    ids = page.locator("[id]").evaluate_all("all => all.map((one) => one.id)")
    assert len(set(ids)) == len(ids)
    for reference in page.locator("[aria-labelledby]").evaluate_all(
        "all => all.map((o) => o.ariaLabelledByElements.length)"
    ):
        assert reference == 1
    assert page.locator("html").get_attribute("lang") == "en"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.innerText") == "Skip to the report"


def test_charts_follow_the_colour_scheme(opened: Callable[..., Opened], report: Path) -> None:
    page = opened(report, color_scheme="light").page
    picture = "document.querySelector('.plot canvas').toDataURL()"
    light = page.evaluate(picture)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"(light) => {picture} !== light", arg=light)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")  # on paper it is light again
    assert page.evaluate(picture) == light
    page.emulate_media(media="print", color_scheme="dark")
    assert page.locator(".scrub").is_hidden()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_a_page_that_follows_a_run(
    opened: Callable[..., Opened], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffexp.report.page.REFRESH", 0.05)
    run = make_run(tmp_path / "run", iterations=12, done=8)
    with serve([run], port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            it = opened(server.url)
            page = it.page
            page.locator("#recipe ~ details summary").click()
            slider = page.get_by_label("Moment of training")
            slider.focus()
            page.keyboard.press("ArrowLeft")
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            write_lines(run / "metrics.jsonl", [*lines, {**lines[-1], "iteration": 9, "queries": 576}])
            page.get_by_text("run: iteration 9 of 12").wait_for()
            assert slider.input_value() == "3"
            assert page.evaluate("document.activeElement.id") == "moment"
            assert page.locator("#recipe ~ details").get_attribute("open") is not None
            assert page.locator(".plot canvas").count() == page.locator(".plot").count()
            assert set(it.asked) - {server.url} == {url for url in it.asked if url.startswith("data:")}
            assert it.said == []
        finally:
            server.shutdown()
            thread.join()
    page.get_by_text("The server has ended").wait_for()

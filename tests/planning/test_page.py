"""The planner's page: what is written into it, and what a browser makes of it.

Screenshots go to the folder PAGE_SCREENSHOTS, by default to pytest's own:

    PAGE_SCREENSHOTS=screenshots pytest tests/planning/test_page.py
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_up_measurements import PROSE, use
from playwright.sync_api import Browser, FloatRect, Locator, Page, sync_playwright

from ds_interlock.config import InterlockConfig
from ds_interlock.errors import ConfigError
from ds_interlock.planning.forecast import ZERO_BUBBLE, compare
from ds_interlock.planning.page import render_page
from ds_interlock.planning.profile import HeadProfile, LayerProfile, Profile, unit_profile
from ds_interlock.planning.verdict import verdict

# The first has the least to start: no profile, no desktop services, no windows.
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
# Playwright itself keeps a browser headless and from phoning home; this is what is left to say.
BROWSER_OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-sync"]
LAUNCH_SECONDS = 60
"""A browser that starts at all does so in a few seconds, on a machine with ten times its load too."""
PAGE_SECONDS = 120
"""For whatever a test waits for in a page that has been opened."""
WIDE, NARROW = (1280, 800), (390, 844)

INTERLOCK = InterlockConfig.model_validate({"mode": "interlock", "window": 1.25})
UNIT = unit_profile(64, 16)
STAGES, MICRO_BATCHES = 4, 3
HOSTILE = '</script><script>document.title="taken over"</script> {{data}} & <b>"bold"</b>'
LAYER = LayerProfile(
    name="block",
    forward_seconds=0.003,
    input_gradient_seconds=0.003,
    weight_gradient_seconds=0.004,
    optimizer_seconds=0.001,
    activation_bytes=34e6,
    output_bytes=3e6,
)
MEASURED = Profile(
    model=HOSTILE,
    device="a GPU",
    source="measured",
    layers=(LAYER,) * 8,
    head=HeadProfile(type="norm_linear", seconds=0.004, optimizer_seconds=0.001),
    latency_seconds=2e-5,
    bandwidth_bytes_per_second=1e10,
)


def data_of(page: str) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert match is not None
    data: dict[str, Any] = json.loads(match[1])
    return data


def view_of(data: dict[str, Any], num_stages: int, num_micro_batches: int) -> dict[str, Any]:
    (view,) = [v for v in data["views"] if (v["K"], v["M"]) == (num_stages, num_micro_batches)]
    return view


def spans_of(row: list[int], actions: list[str]) -> Iterator[tuple[str, int, int, int]]:
    """Of every span what it is, its micro-batch, its start and its end."""
    now = 0
    for place in range(1, len(row), 4):
        what, micro_batch, gap, duration = row[place : place + 4]
        start, now = now + gap, now + gap + duration
        yield actions[what], micro_batch, start, now


@pytest.fixture(scope="module", autouse=True)
def _made_up_measurements(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        use(monkeypatch, tmp_path_factory.mktemp("measured"), *PROSE)
        yield


@pytest.fixture(scope="module")
def unit_page() -> str:
    """Up to 16 stages and 16 micro-batches."""
    return render_page(INTERLOCK, UNIT, UNIT.balanced_bounds(STAGES), MICRO_BATCHES)


@pytest.fixture(scope="module")
def measured_page() -> str:
    return render_page(INTERLOCK, MEASURED, MEASURED.balanced_bounds(3), 2)


# What is written into the page.


def test_every_position_of_the_sliders_has_a_view_with_the_forecasts_figures(unit_page: str) -> None:
    assert len(unit_page.encode()) < 3_000_000
    data = data_of(unit_page)
    assert (data["K"], data["M"], data["leftOut"]) == ([2, 4, 8, 16], [1, 2, 3, 4, 8, 16], [])
    assert [(v["K"], v["M"]) for v in data["views"]] == [(k, m) for k in data["K"] for m in data["M"]]
    assert data["names"][:3] == ["window 1.25", "global (1F1B)", ZERO_BUBBLE]
    for num_stages, num_micro_batches in ((2, 1), (4, 3), (8, 16)):
        comparison = compare(INTERLOCK, UNIT, UNIT.balanced_bounds(num_stages), num_micro_batches)
        view = view_of(data, num_stages, num_micro_batches)
        assert view["verdict"] == verdict(comparison)
        assert {*view["forecasts"], *view["skipped"]} == set(data["names"])
        assert list(view["noBetter"]) == ["window 1.25, 1 extra", "window 1.5", "window 1.5, 1 block"]
        assert len(view["skipped"]) == len(comparison.skipped)
        for each in comparison.all:
            shown = view["forecasts"][each.name]
            assert shown["seconds"] == each.batch_seconds
            assert shown["bubble"] == each.bubble_fraction
            assert shown["inFlight"] == each.in_flight[0]
            assert shown["isReference"] == (each.name == ZERO_BUBBLE)
            assert (shown["gap"], shown["toLoss"]) == (each.gap_recovered, each.speed_to_loss)


def test_figures_of_a_measured_profile_are_of_the_stage_with_the_most(measured_page: str) -> None:
    data = data_of(measured_page)
    # On 8 stages of one layer window 1.25 has no place for its heads; for 16 there are no layers.
    assert (data["K"], data["leftOut"], data["isUnit"]) == ([2, 3, 4], [8, 16], False)
    for each in compare(INTERLOCK, MEASURED, MEASURED.balanced_bounds(3), 2).all:
        shown = view_of(data, 3, 2)["forecasts"][each.name]
        assert shown["activationBytes"] == max(each.activation_bytes) > 0
        assert shown["relayBytes"] == max(each.relay_bytes)
        assert shown["headShare"] == each.head_share


def test_rows_show_the_running_pipeline(unit_page: str) -> None:
    data = data_of(unit_page)
    for view in data["views"]:
        for name, each in view["forecasts"].items():
            assert len(each["rows"]) == view["K"]
            assert each["end"] * view["tick"] == pytest.approx(2 * each["seconds"], rel=1e-4), name
            rows = [list(spans_of(row, data["actions"])) for row in each["rows"]]
            busy = sum(min(end, each["end"]) - max(start, 0) for row in rows for *_, start, end in row)
            # Two batches' work in two batches' time, however long the pipeline takes to fill.
            share = 1 - busy / (each["end"] * view["K"])
            assert share == pytest.approx(each["bubble"], abs=0.03), (view["K"], view["M"], name)


def test_spans_are_those_of_the_simulation(unit_page: str) -> None:
    data = data_of(unit_page)
    view = view_of(data, 4, 3)
    forecast = compare(INTERLOCK, UNIT, UNIT.balanced_bounds(4), 3).reference
    for stage, row in enumerate(view["forecasts"][forecast.name]["rows"]):
        assert row[0] == 1, "the first batch only fills the pipeline"
        shown = [
            (f"{stage}{what[0]}{micro_batch}{what[1:]}", start * view["tick"], end * view["tick"])
            for what, micro_batch, start, end in spans_of(row, data["actions"])
        ]
        expected = [(str(s.action), s.start, s.end) for s in forecast.spans[stage] if s.batch == 0]
        for got, wanted in zip(shown, expected, strict=False):
            assert got == (wanted[0], pytest.approx(wanted[1], abs=1e-3), pytest.approx(wanted[2], abs=1e-3))
        assert len(shown) in (2 * len(expected) - 1, 2 * len(expected))  # a step of no time on the edge


def test_a_long_batch_is_drawn_once() -> None:
    data = data_of(render_page(InterlockConfig(), unit_profile(2, 1), [0, 1, 2], 20))
    assert [(v["K"], v["M"]) for v in data["views"]] == [(2, m) for m in (1, 2, 4, 8, 16, 20)]
    assert [v["numBatches"] for v in data["views"]] == [2, 2, 2, 2, 2, 1]
    each = view_of(data, 2, 20)["forecasts"]["local"]
    assert each["end"] * view_of(data, 2, 20)["tick"] == pytest.approx(each["seconds"], rel=1e-4)


@pytest.mark.bad_input
def test_a_configured_setting_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ConfigError, match="do not fit a model of 64 stages"):
        render_page(INTERLOCK, UNIT, range(65), 1)


# What a browser makes of it.


def find_browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.fail(
            f"no browser on the PATH (looked for {', '.join(BROWSERS)}): the planner's page is tested in a "
            "real one; install Debian's with `apt-get install chromium-headless-shell`"
        )
    return found


def test_without_a_browser_the_tests_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(pytest.fail.Exception, match="apt-get install chromium-headless-shell"):
        find_browser()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser that looks for nothing outside its own folder; if it does not start, its log is shown."""
    home = str(tmp_path_factory.mktemp("browser"))
    nowhere = {"DBUS_SESSION_BUS_ADDRESS": "disabled:", "DBUS_SYSTEM_BUS_ADDRESS": "disabled:"}
    own = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR"), home)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=find_browser(),
            args=BROWSER_OPTIONS,
            env={**os.environ, **nowhere, **own},
            timeout=1000 * LAUNCH_SECONDS,
        )
        yield started
        started.close()


@pytest.fixture(scope="module")
def unit_url(unit_page: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "plan.html"
    path.write_text(unit_page, encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that must neither complain nor ask the network for anything."""
    context = browser.new_context(viewport={"width": WIDE[0], "height": WIDE[1]})
    context.set_default_timeout(1000 * PAGE_SECONDS)
    page = context.new_page()
    complaints: list[str] = []
    requests: list[str] = []
    page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    yield page
    context.close()
    assert not complaints
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []


def cells(page: Page, name: str) -> list[str]:
    return page.locator(f'#table tr[data-setting="{name}"] td').all_inner_texts()


def canvas(page: Page, name: str) -> Locator:
    return page.locator(f'canvas[data-setting="{name}"]')


def check_view(page: Page, num_stages: int, num_micro_batches: int) -> None:
    """The whole page shows that position of the sliders, with the figures written into it."""
    assert page.evaluate("location.hash") == f"#K={num_stages}&M={num_micro_batches}"
    values = page.locator("#K-value, #M-value").all_inner_texts()
    assert values == [str(num_stages), str(num_micro_batches)]
    content = json.loads(page.locator("#data").text_content() or "")
    view = view_of(content, num_stages, num_micro_batches)
    assert page.locator("#verdict").inner_text() == view["verdict"]
    for name, each in view["forecasts"].items():
        time, speed, steps, to_loss, _, bubble, _, in_flight = cells(page, name)
        assert float(time) == pytest.approx(each["seconds"], rel=0.01)
        assert float(speed.removesuffix("×")) == pytest.approx(each["speed"], rel=0.01)
        assert float(bubble.removesuffix(" %")) == pytest.approx(100 * each["bubble"], abs=0.51)
        assert in_flight == str(each["inFlight"])
        if each["toLoss"]:
            assert float(to_loss.removesuffix("×")) == pytest.approx(each["toLoss"], rel=0.01)
        else:
            assert steps == ("not reached" if each["isMeasured"] else "not measured")
    assert rows_drawn(page, "local", num_stages) == num_stages


def rows_drawn(page: Page, name: str, most: int) -> int:
    """Stages that have a tooltip, on a way down through the timeline."""
    box = in_view(page, canvas(page, name))
    stages = set()
    for y in range(1, int(box["height"]), 64 // most):
        page.mouse.move(box["x"] + 60, box["y"] + y)
        if page.locator("#tip").is_visible():
            stages.add(page.locator("#tip").inner_text().split(":")[0])
    assert stages == {f"stage {number}" for number in range(len(stages))}
    return len(stages)


def in_view(page: Page, target: Locator) -> FloatRect:
    """Its box, once scrolling is over, which would hide the tooltip."""
    target.evaluate("(element) => element.scrollIntoView({block: 'center'})")
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    box = target.bounding_box()
    assert box is not None
    return box


def test_sliders_by_keyboard(page: Page, unit_url: str) -> None:
    page.goto(unit_url)
    assert page.locator("#K").get_attribute("aria-valuetext") == "4 stages"
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    check_view(page, 8, 3)
    page.keyboard.press("Tab")
    page.keyboard.press("Home")
    check_view(page, 8, 1)
    assert page.locator("#M").get_attribute("aria-valuetext") == "1 micro-batch"


def test_sliders_by_mouse(page: Page, unit_url: str) -> None:
    page.goto(unit_url)
    box = page.locator("#M").bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + box["width"] - 4, box["y"] + box["height"] / 2)
    check_view(page, 4, 16)
    page.locator("#K ~ .ticks span").get_by_text("2", exact=True).click()
    check_view(page, 2, 16)
    assert cells(page, "window 3") == cells(page, "local, then window 2") == ["does not exist on 2 stages"]
    assert canvas(page, "window 3").get_attribute("aria-label") == "window 3: does not exist on 2 stages"


def test_the_address_keeps_the_view(page: Page, unit_url: str) -> None:
    page.goto(f"{unit_url}#K=8&M=2")
    check_view(page, 8, 2)
    schedule = cells(page, "local, then window 2")
    assert schedule[:3] == ["–", "3.75×, 2.93×", "1.20×"]
    assert page.locator("#sources").inner_text().startswith('Measured in "prose" (8 Transformer blocks')
    page.reload()
    check_view(page, 8, 2)
    page.evaluate("location.hash = '#K=2&M=4'")
    page.wait_for_function("document.getElementById('K-value').textContent === '2'")
    check_view(page, 2, 4)


@pytest.mark.parametrize("address", ["", "#K=7&M=many", "#nonsense", "#K=&M=-1"])
def test_other_addresses_show_the_configured_view(page: Page, unit_url: str, address: str) -> None:
    page.goto(unit_url + address)
    values = page.locator("#K-value, #M-value").all_inner_texts()
    assert values == [str(STAGES), str(MICRO_BATCHES)]


def test_sliding_moves_nothing_else(page: Page, unit_url: str) -> None:
    page.goto(unit_url)
    where = "[...document.querySelectorAll('h2, .setting, .note, tr, #chart')].map((e) => e.offsetTop ?? 0)"
    for width, height in (WIDE, NARROW):
        page.set_viewport_size({"width": width, "height": height})
        places = set()
        for address in ("#K=2&M=1", "#K=4&M=3", "#K=8&M=16", "#K=8&M=1"):
            page.goto(unit_url + address)
            places.add((tuple(page.evaluate(where)), page.evaluate("document.body.offsetHeight")))
        assert len(places) == 1


def test_tooltips_tell_work_and_waiting(page: Page, unit_url: str) -> None:
    page.goto(f"{unit_url}#K=4&M=1")
    box = in_view(page, canvas(page, "global (1F1B)"))
    # Global, M=1: stage 3 waits 3 forwards, works for 3, waits until the others are done.
    forward = (box["width"] - 31) / 24
    tips = []
    for time in (1.5, 3.5, 5.0):
        page.mouse.move(box["x"] + 30 + time * forward, box["y"] + 5 + 3.5 * 32)
        tips.append(page.locator("#tip").inner_text().split("\n"))
    assert tips[0] == ["stage 3: waiting", "3.00 forwards"]
    assert tips[1] == ["stage 3: forward", "micro-batch 0 of batch 1", "1.00 forwards"]
    assert tips[2] == ["stage 3: backward, both gradients", "micro-batch 0 of batch 1", "2.00 forwards"]
    page.mouse.move(box["x"] + 5, box["y"] + 5)
    assert not page.locator("#tip").is_visible()


def test_the_chart_has_a_labelled_line_for_every_setting(page: Page, unit_url: str) -> None:
    for address, missing in (("#K=8&M=1", 1), ("#K=2&M=1", 5)):
        page.goto(unit_url + address)
        wanted = page.locator("#table tbody tr").count() - missing
        labels = page.locator("#chart text.name").all()
        assert page.locator("#chart polyline[data-setting]").count() == len(labels) == wanted
        boxes = sorted((label.bounding_box() for label in labels), key=lambda box: box["y"])
        right = page.evaluate("document.getElementById('chart').getBoundingClientRect().right")
        assert all(box["x"] + box["width"] <= right + 1 for box in boxes)
        assert all(lower["y"] - upper["y"] >= 15 for upper, lower in zip(boxes, boxes[1:], strict=False))


def test_text_from_a_profile_stays_text(page: Page, measured_page: str, tmp_path: Path) -> None:
    (tmp_path / "plan.html").write_text(measured_page, encoding="utf-8")
    page.goto((tmp_path / "plan.html").as_uri())
    assert page.title() == page.locator("h1").inner_text() == f"Pipeline plan: {HOSTILE}"
    assert page.locator("#about").inner_text().startswith(HOSTILE)
    assert page.locator("b", has_text="bold").count() == 0
    assert "Time a batch (ms)" in page.locator("#table thead").inner_text()
    comparison = compare(INTERLOCK, MEASURED, MEASURED.balanced_bounds(3), 2)
    time, *_, activations, relays = cells(page, "global (1F1B)")
    assert float(time) == pytest.approx(1000 * comparison.reference.batch_seconds, rel=0.01)
    assert activations == f"{max(comparison.reference.activation_bytes) / 1e6:.0f} MB"
    assert relays == f"{max(comparison.reference.relay_bytes) / 1e6:.2f} MB"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_looks(page: Page, unit_url: str, tmp_path: Path, size: tuple[int, int], scheme: Any) -> None:
    page.set_viewport_size({"width": size[0], "height": size[1]})
    page.emulate_media(color_scheme=scheme)
    page.goto(f"{unit_url}#K=8&M=4")
    picture = Path(os.environ.get("PAGE_SCREENSHOTS") or tmp_path) / f"plan-{size[0]}-{scheme}.png"
    page.screenshot(path=picture, full_page=True)
    assert picture.stat().st_size > 20_000
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    sticking_out = page.locator("h1, h2, p, #table td, #table tbody th, #chart, .control").evaluate_all(
        "(all, width) => all.filter((each) => !each.closest('.scroll'))"
        ".filter((each) => each.getBoundingClientRect().right > width).map((each) => each.outerHTML)",
        size[0],
    )
    assert not sticking_out
    panel = page.locator(".scroll")
    scrolls = panel.evaluate("(element) => element.scrollWidth > element.clientWidth")
    assert scrolls == (size == NARROW)
    style = "(body) => [getComputedStyle(body).color, getComputedStyle(body).backgroundColor]"
    text, ground = (sum(map(int, re.findall(r"\d+", c))) for c in page.locator("body").evaluate(style))
    assert ground - text > 500 if scheme == "light" else text - ground > 500


def test_timelines_follow_a_change_of_scheme(page: Page, unit_url: str) -> None:
    """Drawn pixels do not follow the style sheet by themselves."""
    # A pixel of stage 3 of global backpropagation before anything reaches it.
    waiting = "(canvas) => canvas.getContext('2d').getImageData(60, 115, 1, 1).data[0]"
    page.goto(f"{unit_url}#K=4&M=1")
    for scheme in ("light", "dark", "light"):
        page.emulate_media(color_scheme=scheme)
        drawn = canvas(page, "global (1F1B)").element_handle()
        expected = "> 180" if scheme == "light" else "< 80"
        # The page hears of the change after the test does.
        page.wait_for_function(f"(canvas) => ({waiting})(canvas) {expected}", arg=drawn)

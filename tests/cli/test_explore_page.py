"""The page of `pdl-ext explore` in a browser: its numbers, keyboard, appearance, and security."""

from __future__ import annotations

import itertools
import random
import time
from pathlib import Path

import pytest
import torch

from pdl_ext import TokenFrequency
from pdl_ext.cli.explore.page import page_of
from pdl_ext.cli.main import main
from pdl_ext.statistics import weight_statistics
from pdl_ext.weighting import Adaptive, ClassBalanced, Face, PowerLaw, Uniform

pytest.importorskip("websockets", reason="needs websockets, of pdl_ext[test], to drive a browser")

from browser import CHROMIUM, Page, chromium

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: make browser, or install one")

ATTRIBUTES = (
    "effective_fraction",
    "mass_of_most_frequent",
    "weight_of_most_frequent",
    "weight_of_rarest_seen",
    "largest",
)
ZIPF = torch.cat([10**6 // torch.arange(1, 3001) ** 2, torch.tensor([7, 0, 3, 0])])
CORPORA = {
    "zipf, some never seen": ZIPF[torch.randperm(len(ZIPF), generator=torch.Generator().manual_seed(0))],
    "all seen, beyond float32": 10**15 // torch.arange(1, 500),
    "fewer than 100 types": torch.tensor([0, 5, 900, 1, 94, 5]),
    "all alike": torch.full((300,), 4),
    "one type": torch.tensor([3]),
}
SET = """(name, value) => {
  const field = document.getElementById(name);
  if (field.type === "range") field.value = value;
  else if (field.tagName === "SELECT") field.selectedIndex = value;
  else field.value = value;
  field.dispatchEvent(new Event("input", {bubbles: true}));
}"""


@pytest.fixture(scope="module")
def browser():
    with chromium() as connection:
        yield connection


@pytest.fixture
def page(browser):
    page = Page(browser)
    yield page
    page.close()


def open_counts(page: Page, folder: Path, counts: torch.Tensor, literal=lambda token: "") -> TokenFrequency:
    """Opens the page of counts, which are saved beside it, as the lines of Python name them."""
    frequency = TokenFrequency.from_counts(counts)
    frequency.save(folder / "counts.safetensors")
    (folder / "report.html").write_bytes(page_of(frequency, folder / "counts.safetensors", literal))
    page.open(folder / "report.html")
    return frequency


def put(page: Page, **values: object) -> None:
    """Moves sliders and chooses, both by place, and types: `alpha_slider=3`, `normalize=1`, `alpha="0.3"`."""
    calls = "; ".join(f"set({name.replace('_slider', '-slider')!r}, {value!r})" for name, value in values.items())
    page.run(f"{{ const set = {SET}; {calls} }}")
    page.drawn()


def figures(page: Page) -> dict[str, float]:
    read = """Object.fromEntries([...document.querySelectorAll("#figures > div")].map(
      row => [row.id, row.querySelector("data").value]))"""
    return {name: float(value) for name, value in page.run(read).items()}


def lines_run(page: Page):
    """The weighting that the page's lines of Python make, of which they make a loss."""
    namespace: dict = {}
    exec(page.run('document.getElementById("lines").textContent'), namespace)
    assert namespace["loss_fn"].weighting is namespace["weighting"]
    return namespace["weighting"]


def assert_figures_are_right(page: Page, frequency: TokenFrequency, weighting) -> None:
    found, got = weight_statistics(frequency, weighting), figures(page)
    for name in ATTRIBUTES:
        assert got[name] == pytest.approx(getattr(found, name), rel=1e-6, nan_ok=True), (name, weighting)
    never_seen = weighting.weights(frequency)[frequency.counts == 0][:1].tolist() or [float("nan")]
    assert got["weight_of_never_seen"] == pytest.approx(never_seen[0], rel=1e-6, nan_ok=True), weighting


@pytest.mark.slow
@pytest.mark.parametrize("corpus", CORPORA)
def test_figures_follow_the_sliders(page, tmp_path, corpus):
    frequency = open_counts(page, tmp_path, CORPORA[corpus])
    ranges = page.run("""Object.fromEntries([...document.querySelectorAll("#settings input[type=range], select")].map(
      each => [each.id.replace("-", "_"), each.type === "range" ? Number(each.max) : each.length - 1]))""")
    assert {"alpha_slider", "epsilon_slider", "smoothing_slider", "max_weight_slider", "weighting"} < set(ranges)
    draw = random.Random(0)
    families = set()
    for step in range(20):
        put(page, **{name: draw.randint(0, last) for name, last in ranges.items()} | {"weighting": step % 5})
        if page.run('document.getElementById("error").textContent'):
            put(page, epsilon="1e-9")
        weighting = lines_run(page)
        families.add(type(weighting))
        assert_figures_are_right(page, frequency, weighting)
    assert families == {Adaptive, ClassBalanced, Face, PowerLaw, Uniform}


@pytest.mark.parametrize(
    ("typed", "weighting"),
    [
        ({}, PowerLaw(0.25)),
        ({"alpha": "1000"}, PowerLaw(1000)),
        ({"alpha": "1000", "max_weight": "1"}, PowerLaw(1000, max_weight=1)),
        ({"alpha": "1.5", "max_weight": "1e-30"}, PowerLaw(1.5, max_weight=1e-30)),
        ({"alpha": "40", "max_weight": "12.5", "normalize": 1}, PowerLaw(40, max_weight=12.5, normalize="types")),
        ({"alpha": "1", "smoothing": "0", "relative": 1, "normalize": 2}, PowerLaw.reference()),
        ({"alpha": "0", "epsilon": "0", "smoothing": "0"}, PowerLaw(0, epsilon=0, smoothing=0)),
        ({"alpha": "0.5", "epsilon": "0", "smoothing": "1e-100"}, PowerLaw(0.5, epsilon=0, smoothing=1e-100)),
        ({"alpha": "40", "epsilon": "0", "smoothing": "1e-100"}, PowerLaw(40, epsilon=0, smoothing=1e-100)),
        ({"alpha": "300", "relative": 1, "normalize": 2}, PowerLaw(300, relative=False, normalize="none")),
        ({"weighting": 1, "beta": "0"}, ClassBalanced(0)),
        ({"weighting": 1, "beta": "0.9999999999"}, ClassBalanced(0.9999999999)),
        ({"weighting": 2, "T": "300"}, Adaptive(T=300)),
        ({"weighting": 2, "form": 1, "T": "1e-3"}, Adaptive(form="chi2", T=1e-3)),
        ({"weighting": 3, "normalize": 1}, Face(normalize="types")),
        ({"weighting": 4, "max_weight": "0.5", "normalize": 2}, Uniform(max_weight=0.5, normalize="none")),
    ],
)
def test_figures_follow_what_is_typed(page, tmp_path, typed, weighting):
    frequency = open_counts(page, tmp_path, CORPORA["zipf, some never seen"])
    put(page, **typed)
    assert lines_run(page) == weighting
    assert_figures_are_right(page, frequency, weighting)


def test_what_is_shown_is_the_number_rounded(page, tmp_path):
    open_counts(page, tmp_path, CORPORA["zipf, some never seen"])
    read = '[...document.querySelectorAll("data")].map(each => [each.value, each.textContent])'
    for value, shown in page.run(read):
        number = float(shown.replace(",", "").removesuffix(" %")) / (100 if shown.endswith("%") else 1)
        assert number == pytest.approx(float(value), rel=6e-3, abs=6e-4)
    header = page.run('document.getElementById("totals").textContent')
    total, slope = int(ZIPF.sum()), -2.0
    assert header.startswith(f"{total:,} tokens counted; a vocabulary of 3,004, of which ")
    assert float(header.rpartition(" ")[2]) == pytest.approx(slope, abs=0.1)


def test_tokens_have_their_weights(page, tmp_path):
    counts = CORPORA["zipf, some never seen"]
    frequency = open_counts(page, tmp_path, counts, lambda token: repr(f" token {token}"))
    put(page, alpha="0.7", max_weight="100")
    weights = PowerLaw(0.7, max_weight=100).weights(frequency)
    for table in ("most", "rare"):
        rows = page.run(f"""[...document.querySelectorAll("#{table} tbody tr")].map(
          row => [...row.cells].map(cell => cell.querySelector("data")?.value ?? cell.textContent))""")
        assert len(rows) == 12
        for token, text, count, weight in rows:
            assert text == f"' token {token}'"
            assert int(count.replace(",", "")) == counts[int(token)]
            assert float(weight) == pytest.approx(float(weights[int(token)]), rel=1e-6)
        if table == "most":
            listed = counts[[int(row[0]) for row in rows]]
            assert listed.tolist() == counts.sort(descending=True).values[:12].tolist()


def test_the_line_drawn_is_that_of_the_weights(page, tmp_path):
    frequency = open_counts(page, tmp_path, 2 ** torch.arange(20, 0, -1))
    put(page, alpha="1", epsilon="0", smoothing="1e-9")
    read = 'document.querySelector("#weights-chart .line").getAttribute("d").slice(1).split("L").map(p => p.split(" "))'
    points = [(float(x), float(y)) for x, y in page.run(read)]
    assert len(points) == frequency.vocab_size
    # Each weighs twice what the one before does, so that the steps upwards are equal.
    steps = [above - below for (_, below), (_, above) in itertools.pairwise(points)]
    assert max(steps) < 0
    assert steps == pytest.approx([sum(steps) / len(steps)] * len(steps), abs=0.2)


HOSTILE = [
    "<script>window.ran = 1</script>",
    "</script><script>window.ran = 1</script>",
    "<img src=x onerror='window.ran = 1'>",
    "<!--<script>",
    "&lt;b&gt;",
    "\u2028",
    "\u202eright to left",
    "line\n",
    "\0",
    "\ufffd",
    "日本語 🙂",
]


def test_tokens_are_shown_and_not_run(page, tmp_path, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({text: token for token, text in enumerate(HOSTILE)}, HOSTILE[0])
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    # A name that is not text, and one that would end the element that the page's data are in.
    counts = tmp_path / "<script>window.ran = 1<\udcff"
    TokenFrequency.from_counts(torch.arange(len(HOSTILE), 0, -1)).save(counts)
    arguments = [str(counts), "-o", str(tmp_path / "report.html"), "--tokenizer", str(tmp_path / "tokenizer.json")]
    assert main(["explore", *arguments]) == 0
    page.open(tmp_path / "report.html")
    shown = page.run('[...document.querySelectorAll("#most .text")].map(cell => cell.textContent)')
    assert shown == [repr(text) for text in HOSTILE]
    assert "<script>window.ran = 1<" in page.run('document.querySelector("h1").textContent')
    assert lines_run(page) == PowerLaw(0.25)
    assert page.run("window.ran") is None
    assert page.run("document.scripts.length") == 2
    assert page.told("Runtime.exceptionThrown") == []


def test_nothing_is_asked_of_the_network(page, tmp_path):
    open_counts(page, tmp_path, ZIPF)
    put(page, alpha_slider=3)
    assert [sent["request"]["url"] for sent in page.told("Network.requestWillBeSent")] == [
        (tmp_path / "report.html").as_uri()
    ]
    assert page.told("Log.entryAdded") + page.told("Runtime.exceptionThrown") == []
    # Nor could it be, nor could a script that came in from anywhere run.
    refused = page.run("""new Promise(then => {
      const found = [];
      document.addEventListener("securitypolicyviolation", event => {
        found.push(event.effectiveDirective);
        if (found.length === 3) then(found.sort());
      });
      fetch("http://127.0.0.1:1/").catch(() => {});
      document.body.append(Object.assign(new Image(), {src: "http://127.0.0.1:1/"}));
      document.body.append(Object.assign(document.createElement("script"), {textContent: "window.ran = 1"}));
    })""")
    assert refused == ["connect-src", "img-src", "script-src-elem"]
    assert page.run("window.ran") is None


def test_by_keyboard(page, tmp_path):
    frequency = open_counts(page, tmp_path, CORPORA["zipf, some never seen"], lambda token: repr("text"))
    focused = "document.activeElement.id || document.activeElement.tagName"
    reached = []
    while not reached or reached[-1] not in (reached[0], "BODY") or len(reached) == 1:
        page.press("Tab")
        reached.append(page.run(focused))
    options = ["alpha", "epsilon", "smoothing", "max_weight"]
    numbers = [name for option in options for name in (option, f"{option}-slider")]
    assert reached[:-1] == ["weighting", *numbers, "relative", "normalize", "PRE", "copy", "rank"]

    page.run('document.getElementById("alpha-slider").focus()')
    page.press(*["ArrowRight"] * 5, "ArrowLeft")
    assert page.run('document.getElementById("alpha").value') == "0.29"
    assert_figures_are_right(page, frequency, PowerLaw(0.29))
    page.run('document.getElementById("max_weight-slider").focus()')
    page.press("Home")
    assert_figures_are_right(page, frequency, PowerLaw(0.29, max_weight=0.1))
    page.press("End")
    assert page.run("document.activeElement.getAttribute('aria-valuetext')") == "none"
    assert_figures_are_right(page, frequency, PowerLaw(0.29))
    page.run('document.getElementById("weighting").focus()')
    page.press("ArrowDown")
    assert lines_run(page) == ClassBalanced()
    page.run('document.getElementById("rank").focus()')
    page.press("ArrowRight")
    told = page.run("document.activeElement.getAttribute('aria-valuetext')")
    assert told == page.run('document.getElementById("type").textContent')
    second = int(frequency.counts.argsort(descending=True, stable=True)[1])
    assert told.startswith(f"rank 2, id {second}, 'text', 250,000 times (")


def test_what_is_used_has_a_name(page, tmp_path):
    open_counts(page, tmp_path, ZIPF)
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    named = [
        (node["role"]["value"], node["name"]["value"])
        for node in nodes
        if not node["ignored"] and node["role"]["value"] in ("slider", "textbox", "combobox", "button", "image", "form")
    ]
    assert [role for role, name in named if not name] == []
    assert {role for role, _ in named} >= {"slider", "textbox", "combobox", "button", "image", "form"}
    # What moves is told, once it rests.
    put(page, alpha="0.5")
    assert page.run("""new Promise(then => {
      const spoken = document.getElementById("spoken");
      new MutationObserver(() => then(spoken.textContent)).observe(spoken, {childList: true});
    })""").startswith("effective sample ")


def test_the_pointer_reads_the_charts(page, tmp_path):
    open_counts(page, tmp_path, ZIPF)
    page.run('document.getElementById("weights-chart").scrollIntoView()')
    box = page.run('document.querySelector("#weights-chart .line").getBoundingClientRect().toJSON()')
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=box["right"], y=box["top"] + 5)
    page.drawn()
    assert page.run('document.getElementById("type").textContent').startswith("rank 1,00")
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=box["left"], y=box["top"] + 5)
    page.drawn()
    assert page.run('document.getElementById("type").textContent').startswith("rank 1, id 0, 1,000,000 times")


def test_lines_are_copied(page, tmp_path):
    open_counts(page, tmp_path, ZIPF)
    page.run("navigator.clipboard.writeText = text => { window.copied = text; return Promise.resolve() }")
    page.run('document.getElementById("copy").click()')
    assert page.run("window.copied") == page.run('document.getElementById("lines").textContent')
    assert page.run('document.getElementById("copied").textContent') == "copied"
    # Where a browser allows no copy they are selected.
    page.run('navigator.clipboard.writeText = () => Promise.reject(new Error("denied"))')
    page.run('document.getElementById("copy").click()')
    assert page.run("getSelection().toString()") == page.run("window.copied")


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ({"alpha": "-1"}, "alpha: got -1, expected a number from 0 to 10000"),
        ({"alpha": ""}, "alpha: got nothing, expected a number from 0 to 10000"),
        ({"alpha": "a"}, "alpha: got a, expected a number from 0 to 10000"),
        ({"epsilon": "1e-101"}, "epsilon: got 1e-101, expected 0 or a number from 1e-100 to 1e+18"),
        ({"smoothing": "2e18"}, "smoothing: got 2e18, expected 0 or a number from 1e-100 to 1e+18"),
        ({"max_weight": "0"}, "max_weight: got 0, expected a number > 0"),
        ({"epsilon": "0", "smoothing": "0"}, "epsilon: got 0 with smoothing 0, expected one of them > 0"),
        ({"weighting": 1, "beta": "1"}, "beta: got 1, expected a number from 0 to below 1"),
        ({"weighting": 2, "T": "0"}, "T: got 0, expected a finite number > 0"),
    ],
)
def test_bad_options_are_told_as_python_tells_them(page, tmp_path, typed, message):
    open_counts(page, tmp_path, ZIPF)
    put(page, **typed)
    assert page.run('document.getElementById("error").textContent').startswith(message)
    assert page.run('document.getElementById("results").inert')
    weighting = (PowerLaw, ClassBalanced, Adaptive)[typed.pop("weighting", 0)]
    if not {"", "a"} & set(typed.values()):
        with pytest.raises(ValueError, match=r"^(\w+: got )") as error:
            weighting(**{name: float(value) for name, value in typed.items()})
        assert str(error.value).partition(" expected ")[2].startswith(message.partition(" expected ")[2])
    put(page, alpha="0.5", epsilon="1e-7", smoothing="1", max_weight="", beta="0.9", T="1")
    assert page.run('document.getElementById("error").textContent') == ""
    assert not page.run('document.getElementById("results").inert')


@pytest.mark.parametrize("width", [360, 700, 1280])
def test_nothing_is_wider_than_the_window(page, tmp_path, width):
    page.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
    open_counts(page, tmp_path, ZIPF, lambda token: repr("a long token" * 8))
    assert page.run("document.documentElement.scrollWidth") <= width
    boxes = page.run("""[...document.querySelectorAll("input, select, button, svg, data")].filter(
      each => each.offsetParent || each.ownerSVGElement === null).map(
      each => each.getBoundingClientRect().toJSON()).filter(box => box.width > 0)""")
    assert len(boxes) > 30
    assert [box for box in boxes if box["left"] < 0 or box["right"] > width] == []
    side, results = (page.run(f'document.querySelector("{each}").getBoundingClientRect().toJSON()') for each in COLUMNS)
    assert (results["left"] > side["right"]) == (width == 1280)


COLUMNS = ("#settings", "#results")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_colour_schemes_can_be_read(page, tmp_path, scheme):
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    open_counts(page, tmp_path, ZIPF)
    colours = page.run("""[...document.querySelectorAll("h1, #totals, label, .hint, select, dd, td, code, button")].map(
      each => getComputedStyle(each).color).concat(
      [...document.querySelectorAll("svg text")].map(each => getComputedStyle(each).fill))""")
    paper = luminance(page.run("getComputedStyle(document.body).backgroundColor"))
    assert (paper < 0.1) == (scheme == "dark")
    # WCAG's contrast of text.
    for ink in map(luminance, set(colours)):
        assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) > 4.5


def luminance(colour: str) -> float:
    """WCAG's relative luminance of an rgb() of CSS."""
    channels = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in channels]
    return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.slow
@pytest.mark.serial
def test_250_000_types_are_fluent(page, tmp_path):
    # Hardly two of them occur equally often, so that there is no less to compute than types.
    counts = (10**13 / torch.arange(1, 250_001).double() ** 1.1).long() + 10**9 // torch.arange(1, 250_001)
    frequency = open_counts(page, tmp_path, counts)
    assert counts.unique().numel() > 200_000
    took = []
    for place in range(40, 60):
        before = time.perf_counter()
        put(page, alpha_slider=place)
        took.append(time.perf_counter() - before)
    assert_figures_are_right(page, frequency, PowerLaw(0.59))
    # With the two frames that are waited for.
    assert sorted(took)[len(took) // 2] < 0.15

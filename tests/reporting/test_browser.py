"""The page in a real browser; skipped where there is no Chromium (M2L_CHROMIUM names one)."""

import html
import importlib.resources
import json
import os
import re
import shutil
import subprocess

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("M2L_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")

# Runs in the page and leaves what it found in the document, which Chromium prints.
CHECKS = """
<script>
const found = {errors: [], violations: []};
addEventListener("error", (event) => found.errors.push(String(event.message)));
addEventListener("securitypolicyviolation", (event) => found.violations.push(event.blockedURI));
addEventListener("load", () => {
  const column = (table, place) =>
    [...table.tBodies[0].rows].map((row) => row.cells[place].textContent);
  const sorted = (table, place) => {
    const header = table.tHead.rows[table.tHead.rows.length - 1].cells[place];
    const seen = [column(table, place)], states = [header.getAttribute("aria-sort")];
    for (let click = 0; click < 2; click++) {
      header.querySelector("button").focus();
      document.activeElement.click();
      seen.push(column(table, place));
      states.push(header.getAttribute("aria-sort"));
    }
    return {seen, states, marked: table.querySelectorAll("[aria-sort]").length};
  };
  for (const one of document.querySelectorAll("details")) one.open = true;
  const sizes = (page, kind) => [...page.querySelectorAll(`.${kind} > svg`)].map((svg) => {
    const box = svg.getBoundingClientRect();
    return [svg.checkVisibility(), box.width, box.height];
  });
  found.figures = sizes(document, "wide");
  found.hidden = sizes(document, "narrow").filter(([visible]) => visible).length;
  found.values = document.querySelectorAll(".wide > svg title").length;
  const tables = [...document.querySelectorAll("table")];
  found.numbers = sorted(tables[0], 1);
  found.words = sorted(tables[0], 0);
  const columns = tables.flatMap((table) =>
    [...table.tHead.rows[table.tHead.rows.length - 1].cells].map((_, place) => [table, place]));
  found.missing = sorted(...columns.find((one) => column(...one).includes("–")));
  found.requests = performance.getEntriesByType("resource").map((entry) => entry.name);
  const before = [...document.querySelectorAll("details")];
  before[0].open = false;
  dispatchEvent(new Event("beforeprint"));
  found.printed = before[0].open;
  dispatchEvent(new Event("afterprint"));
  found.closed = !before[0].open;
  before[0].open = true;
  const phone = document.createElement("iframe");
  phone.title = "A phone";
  phone.style = "width: 360px; height: 800px; border: 0";
  phone.srcdoc = document.documentElement.outerHTML.replace(/<script[^]*?<\\/script>/g, "");
  phone.addEventListener("load", async () => {
    const page = phone.contentDocument.documentElement;
    found.phone = [page.clientWidth, page.scrollWidth];
    found.narrow = sizes(phone.contentDocument, "narrow");
    found.wide = sizes(phone.contentDocument, "wide").filter(([visible]) => visible).length;
    const examined = await axe.run(document.querySelector("body"), {iframes: false});
    found.axe = examined.violations.map((rule) => [rule.id, rule.nodes[0].html.slice(0, 300)]);
    found.rules = examined.passes.map((rule) => rule.id);
    const result = document.createElement("pre");
    result.id = "found";
    result.textContent = JSON.stringify(found);
    document.body.append(result);
  });
  document.body.append(phone);
});
</script>
"""


def chromium(folder, address):
    """Loads a page without a window; returns the process, which printed the document."""
    command = [
        CHROMIUM,
        "--headless=new",
        "--hide-scrollbars",
        "--disable-gpu",
        f"--user-data-dir={folder}/profile",
    ]
    command += ["--no-first-run", "--disable-background-networking", "--disable-component-update"]
    command += ["--enable-logging=stderr", "--window-size=1280,900", "--virtual-time-budget=20000"]
    command += ["--no-sandbox"] if os.geteuid() == 0 else []
    return subprocess.run(
        [*command, "--dump-dom", address],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module", params=["written", "skills_written"])
def report(request):
    """The folder of a report, of each kind of study."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def browser(report, tmp_path_factory):
    """What the checks found in the page, and what the browser wrote to its console."""
    folder = tmp_path_factory.mktemp("browser")
    text = report.page.read_text()
    checked = report.report / "checked.html"
    axe = (importlib.resources.files("axe_core_python") / "axe.min.js").read_text()
    head = f"<script>{axe}</script>{CHECKS}<style>"
    checked.write_text(text.replace("<style>", head, 1))
    ran = chromium(folder, checked.as_uri())
    checked.unlink()
    left = re.search(r'<pre id="found">(.*?)</pre>', ran.stdout, re.S)
    assert left, f"the page's checks did not end: {ran.stderr[-2000:]}"
    return json.loads(html.unescape(left[1])), ran.stderr


def test_the_page_loads_without_an_error_and_asks_for_nothing(browser):
    found, console = browser
    assert found["errors"] == found["violations"] == found["requests"] == []
    assert not re.findall(r".*\bCONSOLE\b.*", console)


def test_every_figure_is_visible_and_fits_the_screen(browser, report):
    figures, narrow = browser[0]["figures"], browser[0]["narrow"]
    assert len(figures) == len(narrow) == report.page.read_text().count("<svg") / 2
    for visible, width, height in [*figures, *narrow]:
        assert visible and width > 200 and height > 100
    assert all(width <= 360 for _, width, _ in narrow)
    assert browser[0]["hidden"] == browser[0]["wide"] == 0


def test_no_rule_of_accessibility_is_violated(browser):
    assert browser[0]["axe"] == []
    assert {"color-contrast", "svg-img-alt"} <= {*browser[0]["rules"]}


def test_points_and_bars_show_their_values_under_the_pointer(browser):
    assert browser[0]["values"] > 50


def test_a_click_on_a_header_sorts_and_a_second_one_turns_round(browser):
    for table in ("numbers", "words"):
        (before, up, down), states = (browser[0][table][key] for key in ("seen", "states"))
        key = float if table == "numbers" else str.casefold
        assert up == sorted(before, key=key) and before != up
        assert down == sorted(before, key=key, reverse=True)
        assert states == [None, "ascending", "descending"]
        assert browser[0][table]["marked"] == 1


def test_a_missing_number_comes_last_either_way(browser):
    _, *sorted_ones = browser[0]["missing"]["seen"]
    for rows in sorted_ones:
        missing = rows.count("–")
        assert 0 < missing < len(rows) and set(rows[-missing:]) == {"–"}


def test_printing_opens_what_is_closed_and_closes_it_again(browser):
    assert browser[0]["printed"] and browser[0]["closed"]


def test_a_phone_needs_no_sideways_scrolling(browser):
    width, content = browser[0]["phone"]
    assert width == 360 and content <= width

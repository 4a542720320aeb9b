"""The page of a run in a real browser: search, choice, keyboard, screen reader, dark and light, paper, no script."""

import json
import shutil

import pytest

from megaprompt.report.html import write_joint_report, write_report
from tests.report.made_up import change, joined, make_results, write_predictions

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; make venv installs it")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed; as root, make tools installs it"),
]
MANUAL = [1, 1, 2, 2, 1, *[3] * 45]
LEARNED = [1, 1, 1, 1, 2, *[9] * 45]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Manual prompts and p-tuning on 50 facts about capitals, some of whose subjects have accents, and on one other."""
    path = tmp_path_factory.mktemp("browser") / "run"
    path.mkdir()
    scores = {"manual": {"P36": 0.06, "P30": 0.0}, "p-tuning": {"P36": 0.08, "P30": 1.0}}
    (path / "results.json").write_text(json.dumps(make_results(scores, P36="capital")))
    names = [f"subject {i}" for i in range(48)] + ["Müller", "</script><script>alert(1)</script>"]
    write_predictions(path, "P36", {"manual": MANUAL, "p-tuning": LEARNED}, names)
    write_predictions(path, "P30", {"manual": [3], "p-tuning": [1]}, ["elsewhere"])
    return path


@pytest.fixture(scope="module")
def page_of_run(run):
    return write_report(run)


@pytest.fixture
def visit(browser):
    """Open a file without any network; whatever the page complains about fails the test."""
    contexts, complaints = [], []

    def opened(path, width=1400, **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url) if request.url != path.as_uri() else None)
        page.goto(path.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [each for each in complaints if not each.startswith("data:")] == []


def subjects(page):
    return page.locator("#browse-table tbody th").all_inner_texts()


def words(found):
    return [" ".join(text.split()) for text in found.all_inner_texts()]


def kinds(page):
    return words(page.locator("#browse-kinds label"))


def status(page, text):
    sync_api.expect(page.get_by_role("status")).to_have_text(text)


def test_facts_are_searched_and_chosen(visit, page_of_run):
    page = visit(page_of_run)
    status(page, "25 of 51 facts")
    assert len(subjects(page)) == 25
    search = page.get_by_role("searchbox", name="Search subjects and objects")
    search.fill("MULLER")
    status(page, "1 fact: with “MULLER”")
    assert subjects(page) == ["Müller"]
    search.fill("<script>")
    status(page, "1 fact: with “<script>”")
    assert subjects(page) == ["</script><script>alert(1)</script>"]
    search.fill("nobody")
    status(page, "0 facts: with “nobody”")
    search.fill("")
    status(page, "25 of 51 facts")
    assert kinds(page) == ["any 51", "both 2", "only manual 1", "only p-tuning 3", "neither 45"]
    page.get_by_label("only p-tuning").check()
    status(page, "3 facts: right: only p-tuning")
    assert subjects(page) == ["subject 2", "subject 3", "elsewhere"]
    page.get_by_label("Relation").select_option(label="P36 capital (50)")
    status(page, "2 facts: relation capital; right: only p-tuning")
    assert words(page.locator("#browse-table tbody tr").first.locator("td")) == [
        "o", "✗ wrong: wrong 88.0 % object: rank 2", "✓ right: o 88.0 %"
    ]  # fmt: skip
    page.get_by_label("Compare").select_option("p-tuning")
    status(page, "25 of 50 facts: relation capital")  # what was chosen is no choice any more
    assert kinds(page) == ["any 50", "p-tuning is 4", "p-tuning is not 46"]


def test_all_is_reached_by_keyboard(visit, page_of_run):
    page = visit(page_of_run)
    page.get_by_role("searchbox").focus()
    for wanted in ("browse-relation", "browse-method-1", "browse-method-2"):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == wanted
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    status(page, "2 facts: right: both")
    page.keyboard.press("ArrowUp")
    status(page, "25 of 51 facts")
    page.keyboard.press("Tab")
    toggle = page.get_by_role(
        "button", name="All answers: subject 2", exact=True
    )  # the first that has others than the object
    sync_api.expect(toggle).to_be_focused()
    page.keyboard.press("Enter")
    details = page.locator("tr.details")
    assert words(details.locator("li"))[:2] == ["wrong 88.0 %", "o 1.0 %"]
    page.keyboard.press("Enter")
    sync_api.expect(details).to_have_count(0)
    more = page.get_by_role("button", name="Show 26 more")
    more.focus()
    page.keyboard.press("Enter")
    sync_api.expect(page.get_by_role("rowheader", name="subject 25")).to_be_focused()
    status(page, "51 facts")
    sync_api.expect(more).to_be_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(visit, page_of_run, run, tmp_path, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    other = shutil.copytree(run, tmp_path / "other")
    change(other, lambda results: results["backbone"].update(name="other"))
    joint = write_joint_report(joined(run, other), tmp_path / "joint")
    for path, width in ((page_of_run, 375 if scheme == "dark" else 1400), (joint, 1400)):
        page = visit(path, width, color_scheme=scheme)
        page.locator(".toggle").first.click()
        found = axe.Axe().run(page).response
        assert "color-contrast" in {rule["id"] for rule in found["passes"]}  # it did look
        assert [(rule["id"], rule["nodes"][0]["html"]) for rule in found["violations"]] == []


def test_the_page_fits_a_phone(visit, page_of_run):
    page = visit(page_of_run, 375)
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    box = page.locator("#browse-box").evaluate("box => [box.scrollWidth, box.clientWidth]")
    assert box[0] == box[1]  # facts are cards there
    sync_api.expect(page.get_by_role("rowheader", name="subject 0")).to_be_visible()


def test_charts_and_text_follow_the_colour_scheme(visit, page_of_run):
    colors = {}
    for scheme in ("light", "dark"):
        page = visit(page_of_run, color_scheme=scheme)
        colors[scheme] = page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor")
        assert ("invert" in page.locator("img").first.evaluate("img => getComputedStyle(img).filter")) == (
            scheme == "dark"
        )
    assert colors == {"light": "rgb(255, 255, 255)", "dark": "rgb(26, 26, 26)"}


def test_what_was_chosen_is_printed(visit, page_of_run):
    page = visit(page_of_run, color_scheme="dark")
    page.emulate_media(media="print")
    heading, form = page.get_by_role("heading", name="Look at the facts"), page.locator("#browse form")
    sync_api.expect(heading).to_be_hidden()  # nothing was chosen
    page.emulate_media(media="screen")
    page.get_by_label("both").check()
    page.emulate_media(media="print")
    sync_api.expect(heading).to_be_visible()
    status(page, "2 facts: right: both")
    sync_api.expect(form).to_be_hidden()
    assert page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.pdf().startswith(b"%PDF")


def test_without_scripts_all_tables_are_there(visit, page_of_run):
    page = visit(page_of_run, java_script_enabled=False)
    assert page.locator("table").count() == page_of_run.read_text().count("<table") > 4
    assert "capital" in page.locator("table").first.inner_text()
    sync_api.expect(page.get_by_text("Where scripts may run, the facts can be searched here.")).to_be_visible()
    sync_api.expect(page.get_by_text("Look at the facts")).to_be_hidden()

"""The voting page in a real browser: Debian's Chromium, driven by Playwright, against a real server."""

import re
import shutil
import time

import pytest
from made_up_votes import Client, key_of, make_candidate, make_prompt

from openemu3.preferences.store import Vote

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NASTY = "<img src=x onerror=alert(1)><script>document.title='hacked'</script>\"'&amp;  {{7*7}} \u202e"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser):
    """A function (port, token, ...) -> a page of a browser of its own; the test fails on any error or foreign request of the page."""
    trouble, contexts = [], []

    def open_page(port, token="", **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
        context.set_default_timeout(60_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("console", lambda message: trouble.append(message.text) if message.type == "error" else None)
        page.on("dialog", lambda dialog: trouble.append(dialog.message))
        home = f"http://127.0.0.1:{port}/"
        page.on("request", lambda request: None if request.url.startswith((home, "blob:", "data:")) else trouble.append(request.url))
        page.goto(home + (f"#{token}" if token else ""))
        return page

    open_page.trouble = trouble
    yield open_page
    for context in contexts:
        context.close()
    # What a test makes the server refuse, the browser reports too; the test looks at that itself.
    assert [line for line in trouble if not line.startswith("Failed to load resource")] == []


def until(page, condition, argument=None):
    """Waits for a condition in JavaScript. (Playwright's own waiting uses eval, which the page's policy forbids.)"""
    end = time.monotonic() + 60
    while not page.evaluate(condition, argument):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(20)


def wait_until_saved(page):
    until(page, "document.getElementById('state').textContent === 'Saved' && !queue.length")


def read_order(page):
    """Keys of the candidates as they stand on the page."""
    return page.evaluate("shown.candidates.map((one) => one.candidate)")


def read_prompt(page):
    return page.inner_text("#prompt")


def go_to(page, text):
    page.wait_for_selector("#task:not([hidden]) .card img, #task:not([hidden]) .card video")
    if read_prompt(page) != text:
        page.keyboard.press("n")
        until(page, "(text) => document.getElementById('prompt').innerText === text", text)
    until(page, "document.querySelectorAll('.card img, .card video').length === document.querySelectorAll('.card').length")


def votes_of(store, name):
    return {record.candidate: record.vote for record in store.read_votes() if record.voter == name}


def test_a_prompt_is_rated_with_the_keyboard_alone(store, serve, visit):
    page = visit(serve(store), store.invite("Ann"))
    go_to(page, "a red apple")
    assert page.url.endswith("/")  # the token is out of the address bar
    assert page.inner_text("#count") == "0 of 4 rated" and page.inner_text("#next") == "Skip"
    order = read_order(page)
    for digit in "54321234":
        page.keyboard.press(digit)
    wait_until_saved(page)
    expected = {order[0]: Vote(5, 4), order[1]: Vote(3, 2), order[2]: Vote(1, 2), order[3]: Vote(3, 4)}
    assert votes_of(store, "Ann") == expected
    assert page.inner_text("#count") == "4 of 4 rated" and page.inner_text("#finished") == "1 of 2"
    assert page.evaluate("document.activeElement.id") == "next"

    page.keyboard.press("u")
    until(page, "document.getElementById('state').textContent === 'Undone'")
    assert votes_of(store, "Ann") == expected | {order[3]: Vote(3, None)}
    assert page.inner_text("#count") == "3 of 4 rated"
    # The focus is where the score was taken back; arrows choose another one.
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    wait_until_saved(page)
    assert votes_of(store, "Ann") == expected | {order[3]: Vote(3, 2)}
    page.keyboard.press("ArrowUp")
    page.keyboard.press("1")
    wait_until_saved(page)
    assert votes_of(store, "Ann") == expected | {order[3]: Vote(1, 2)}

    page.keyboard.press("?")
    assert page.is_visible("#help") and "You vote as Ann." in page.inner_text("#help")
    page.keyboard.press("1")  # scores nothing while it is open
    page.keyboard.press("Escape")
    assert votes_of(store, "Ann") == expected | {order[3]: Vote(1, 2)}


def test_a_closer_look_compares_and_rates(store, serve, visit):
    page = visit(serve(store), store.invite("Ann"))
    go_to(page, "a red apple")
    order = read_order(page)
    page.click(".card:nth-child(4) .view")
    assert page.is_visible("#zoom img") and page.inner_text("#zoom-name") == "D of D"
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#zoom-name") == "A of D"
    for digit in "53":  # both rows of A, then it goes on by itself
        page.keyboard.press(digit)
    assert page.inner_text("#zoom-name") == "B of D"
    page.click("#zoom .scale >> nth=1 >> text=2")
    page.keyboard.press("Escape")
    wait_until_saved(page)
    assert votes_of(store, "Ann") == {order[0]: Vote(5, 3), order[1]: Vote(None, 2)}
    # What was scored there stands in the cards, and the focus is where one was.
    assert page.inner_text("#count") == "1 of 4 rated" and page.locator("#cards [aria-checked=true]").count() == 3
    assert page.evaluate("document.activeElement.parentElement.ariaLabel") == "B, visual appeal"
    assert page.locator("#zoom .scale").count() == 0 and page.evaluate("shown.candidates.every((one) => one.rows.length === 2)")


def test_everything_is_there_again_after_a_reload(store, serve, visit):
    port = serve(store)
    page = visit(port, store.invite("Ann"))
    go_to(page, "a blue wave")
    page.click(".card:nth-child(2) .scale >> nth=1 >> text=4")
    wait_until_saved(page)
    order = read_order(page)
    page.reload()
    go_to(page, "a blue wave")
    assert read_order(page) == order
    checked = (
        "[...document.querySelectorAll('[aria-checked=true]')].map((b) => b.parentElement.getAttribute('aria-label') + ' ' + b.innerText)"
    )
    assert page.evaluate(checked) == ["B, prompt alignment 4"]
    assert votes_of(store, "Ann") == {order[1]: Vote(None, 4)}


def test_undo_leads_back_to_the_prompt_of_the_change(store, serve, visit):
    page = visit(serve(store), store.invite("Ann"))
    go_to(page, "a red apple")
    page.click(".card:nth-child(1) .scale >> nth=0 >> text=2")
    wait_until_saved(page)
    page.click("#previous" if page.is_enabled("#previous") else "#next")
    until(page, "document.getElementById('prompt').innerText === 'a blue wave'")
    page.click("#undo")
    until(page, "document.getElementById('prompt').innerText === 'a red apple'")
    assert votes_of(store, "Ann") == {} and page.inner_text("#count") == "0 of 4 rated"


def test_prompts_are_words_and_nothing_else(store, serve, visit):
    """Markup, script and template signs in a prompt are shown as they are."""
    store.add_candidates(make_prompt(NASTY), [make_candidate(50), make_candidate(51)])
    page = visit(serve(store), store.invite("Ann"))
    page.wait_for_selector(".card img")
    for _ in range(3):
        if page.evaluate("document.getElementById('prompt').textContent") == NASTY:
            break
        before = read_prompt(page)
        page.keyboard.press("n")
        until(page, "(text) => document.getElementById('prompt').innerText !== text", before)
    assert page.evaluate("document.getElementById('prompt').textContent") == NASTY
    assert page.evaluate("document.getElementById('prompt').children.length") == 0
    assert "hacked" not in page.title() and page.evaluate("document.querySelectorAll('script, main img[src=x]').length") == 1


def test_a_script_that_gets_in_is_not_run(store, serve, visit):
    """The second wall: even if markup reached the page, its policy would not run it."""
    page = visit(serve(store), store.invite("Ann"))
    page.wait_for_selector(".card img")
    blocked = page.evaluate(
        """() => new Promise((resolve) => {
          document.addEventListener("securitypolicyviolation", (event) => resolve(event.effectiveDirective));
          const script = document.createElement("script");
          script.textContent = "window.hacked = true";
          document.body.append(script);
        })"""
    )
    assert blocked == "script-src-elem" and page.evaluate("window.hacked") is None
    assert "Content Security Policy" in visit.trouble.pop()


def test_without_a_token_one_is_asked_for(store, serve, visit):
    port = serve(store)
    page = visit(port)
    page.wait_for_selector("#sign-in:not([hidden])")
    assert not page.is_visible("#undo") and page.evaluate("document.activeElement.id") == "token"
    page.fill("#token", "nobody.knows")
    page.keyboard.press("Enter")
    until(page, "document.getElementById('sign-in-why').textContent.includes('not known')")
    page.fill("#token", f"http://127.0.0.1:{port}/#" + store.invite("Ann"))  # the whole link
    page.keyboard.press("Enter")
    page.wait_for_selector(".card img")
    page.click("#help-button")
    page.click("#leave")
    page.wait_for_selector("#sign-in:not([hidden])")
    assert page.evaluate("localStorage.length") == 0 and page.evaluate("document.querySelectorAll('.card').length") == 0


def test_another_voter_in_the_same_browser_votes_as_herself(store, serve, visit):
    """A vote that is still on its way when somebody else signs in goes out under the name it was given."""
    port = serve(store)
    page = visit(port, store.invite("Ann"))
    go_to(page, "a red apple")
    order = read_order(page)
    held = []
    page.route("**/api/votes", lambda route: held.append(route))
    page.click(".card:nth-child(1) .scale >> nth=0 >> text=5")
    until(page, "queue.length === 1")
    page.evaluate("(token) => { location.hash = token; }", store.invite("Bea"))
    until(page, "document.getElementById('who').textContent === 'You vote as Bea.'")
    page.click(".card:nth-child(1) .scale >> nth=1 >> text=1")
    held[0].continue_()
    while len(held) < 2:
        page.wait_for_timeout(20)
    held[1].continue_()
    until(page, "!queue.length")
    assert votes_of(store, "Ann") == {order[0]: Vote(5, None)}
    ((_, vote),) = votes_of(store, "Bea").items()
    assert vote == Vote(None, 1)


def test_a_server_that_is_away_costs_no_vote(store, serve, visit):
    page = visit(serve(store), store.invite("Ann"))
    go_to(page, "a red apple")
    order = read_order(page)
    failures = iter([True, True])
    page.route("**/api/votes", lambda route: route.fulfill(status=503, body="busy") if next(failures, False) else route.continue_())
    page.keyboard.press("3")
    page.keyboard.press("4")
    until(page, "document.getElementById('state').textContent.startsWith('Not saved yet')")
    wait_until_saved(page)
    assert votes_of(store, "Ann") == {order[0]: Vote(3, 4)}


def test_a_candidate_that_is_removed_meanwhile(store, serve, visit):
    page = visit(serve(store), store.invite("Ann"))
    go_to(page, "a red apple")
    gone, kept = read_order(page)[:2]
    store.remove_candidate(gone)
    page.keyboard.press("3")
    until(page, "document.getElementById('state').textContent.includes('has been removed')")
    until(page, "document.querySelectorAll('.card').length === 3")
    assert read_order(page)[0] == kept and votes_of(store, "Ann") == {}


def test_phones_have_two_columns_and_fingers_hit(store, serve, visit):
    page = visit(serve(store), store.invite("Ann"), viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    go_to(page, "a red apple")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390  # nothing hangs out
    lefts = page.evaluate("[...document.querySelectorAll('.card')].map((card) => Math.round(card.getBoundingClientRect().left))")
    assert len(set(lefts)) == 2
    sizes = page.evaluate("[...document.querySelectorAll('.scale button')].map((b) => [b.offsetWidth, b.offsetHeight])")
    assert min(width for width, _ in sizes) >= 24 and min(height for _, height in sizes) >= 44
    page.tap(".card:nth-child(2) .scale >> nth=0 >> text=5")
    wait_until_saved(page)
    assert votes_of(store, "Ann") == {read_order(page)[1]: Vote(5, None)}


def test_names_for_those_who_do_not_see(store, serve, visit):
    """Every control has a name and a role, and exactly one score of each row is in the tab order."""
    page = visit(serve(store), store.invite("Ann"))
    go_to(page, "a red apple")
    for letter in "ABCD":
        for aspect in ("visual appeal", "prompt alignment"):
            scale = page.get_by_role("radiogroup", name=f"{letter}, {aspect}")
            assert scale.get_by_role("radio").count() == 5 and scale.locator("[tabindex='0']").count() == 1
            assert scale.get_by_role("radio", name="3 of 5").get_attribute("aria-checked") == "false"
    page.get_by_role("radio", name="3 of 5").first.click()
    assert re.fullmatch("A, visual appeal: 3", page.inner_text("#said"))
    unnamed = "[...document.querySelectorAll('button')].filter((b) => b.checkVisibility() && !(b.innerText.trim() || b.ariaLabel)).length"
    assert page.evaluate(unnamed) == 0
    wait_until_saved(page)


def test_it_ends_with_thanks(store, serve, visit):
    port = serve(store)
    token = store.invite("Ann")
    ann = Client(port, token)
    for number in (0, 1, 2, 3, 10, 11, 12):
        ann.vote(key_of(number), appeal=3, alignment=3)
    page = visit(port, token)
    page.wait_for_selector("#done:not([hidden])")
    assert "thank you" in page.inner_text("#done-title") and page.inner_text("#finished") == "2 of 2"
    page.click("#again")
    page.wait_for_selector(".card img")

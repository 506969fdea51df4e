"""The page at `/` in a real browser, against a real server."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cai_ray.serve import page as served_page
from cai_ray.storage.run import Run
from tests.e2e.command import TOKEN
from tests.e2e.test_page import contrast

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
expect.set_options(timeout=60_000)

DIARY = "how do i read the baker's diary ?"
PRIVACY = "At stake: Protect private things"
HOSTILE = '<img src="x" onerror="console.log(1)"><script>console.log(2)</script>'


def opened(browser: Any, address: str, width: int = 1280, scheme: str = "light", token: str = TOKEN) -> Any:
    """The page, signed in where a token is given; what the console says is in its `said`."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    page.said = []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.goto(f"{address}/")
    if token:
        signed_in(page, token)
    return page


def signed_in(page: Any, token: str) -> None:
    page.get_by_label("Token").fill(token)
    page.keyboard.press("Enter")
    expect(page.get_by_label("Your prompt")).to_be_focused()


def ask(page: Any, prompt: str) -> Any:
    """Asks without chance; the turn's answers."""
    before = page.locator(".turn").count()
    page.locator("#temperature").evaluate("field => { field.value = 0 }")
    page.get_by_label("Your prompt").fill(prompt)
    page.keyboard.press("Enter")
    expect(page.locator(".turn")).to_have_count(before + 1)
    return page.locator(".turn").nth(before).locator(".answer")


def answering(**answer: Any) -> Callable[[Any], None]:
    """What a route does that the server would answer so."""
    return lambda route: route.fulfill(**answer)


def test_answers_of_both_models_stream_side_by_side(browser: Any, served: str) -> None:
    page = opened(browser, served)
    page.evaluate(
        """() => {
          window.seen = {};
          new MutationObserver((changes) => changes.forEach(({ target, addedNodes: [node] }) => {
            if (node && target.matches(".said")) (window.seen[target.parentElement.className] ??= []).push(node.data);
          })).observe(document.body, { childList: true, subtree: true });
        }"""
    )
    answers = ask(page, DIARY)
    expect(answers.get_by_role("heading", level=3)).to_have_text(["RL-CAI", "base"])
    expect(answers.locator(".said")).to_have_text([re.compile("sure .* diary .*")] * 2)
    expect(answers.locator(".said[aria-busy=false]")).to_have_count(2)
    seen = page.evaluate("window.seen")
    assert len(seen) == 2
    for texts in seen.values():
        grown = [text for text in texts if text]
        assert len(grown) > 4
        assert all(later.startswith(text) for text, later in pairwise(grown))
    left, right = (answers.nth(i).bounding_box() for i in range(2))
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
    assert page.said == []
    page.context.close()


def test_each_model_reads_its_own_conversation_until_one_starts_anew(browser: Any, served: str) -> None:
    page = opened(browser, served)
    sent: list[Any] = []
    page.on("request", lambda r: sent.append(r.post_data_json) if "chat" in r.url else None)
    answers = ask(page, DIARY)
    expect(answers.locator(".stake")).to_have_count(2)
    page.get_by_label("base", exact=True).uncheck()
    expect(ask(page, "how do i sell my own ladder ?").locator(".stake")).to_have_count(1)
    assert [m["model"] for m in sent] == ["rl", "base", "rl"]
    assert [m["role"] for m in sent[-1]["messages"]] == ["user", "assistant", "user"]
    assert sent[-1]["messages"][1]["content"].strip() == answers.first.locator(".said").text_content()
    page.get_by_role("button", name="Start anew").click()
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.get_by_label("Your prompt")).to_be_focused()
    expect(ask(page, DIARY).locator(".stake")).to_have_count(1)
    assert len(sent[-1]["messages"]) == 1
    assert page.said == []
    page.context.close()


def test_principles_that_are_off_are_not_at_stake(browser: Any, served: str) -> None:
    page = opened(browser, served)
    answers = ask(page, DIARY)
    expect(answers.locator(".stake")).to_contain_text([PRIVACY, PRIVACY])
    expect(answers.first.locator(".verdict > .body")).to_contain_text("snooping")
    answers.first.get_by_text("All principles asked (5)").click()
    expect(answers.first.locator("li.over")).to_have_text(re.compile("^Protect private things"))
    expect(answers.first.locator("li")).to_have_count(5)
    constitution = answers.first.locator(".verdict > small")
    expect(constitution).to_have_text(page.locator("#principles > small").inner_text())
    expect(constitution).to_have_text(re.compile("^errand-town 1 [0-9a-f]{12}"))
    page.get_by_label("Protect private things", exact=True).uncheck()
    nothing = re.compile("^No principle is at stake")
    expect(answers.locator(".stake")).to_have_text([nothing, nothing])
    answers.first.get_by_role("button", name="Revise").click()
    expect(answers.first.locator(".steps")).to_contain_text("the answer stays")
    for box in page.locator("#principles input").all():
        box.set_checked(False)
    expect(answers.locator(".verdicts")).to_have_text(["No principle is switched on"] * 2)
    page.get_by_label("Protect private things", exact=True).check()
    expect(answers.locator(".stake")).to_contain_text([PRIVACY, PRIVACY])
    page.get_by_role("button", name="Text of Protect private things").click()
    expect(page.get_by_text("protect private things : no snooping")).to_be_visible()
    assert page.said == []
    page.context.close()


def test_revision_is_a_diff(browser: Any, served: str) -> None:
    page = opened(browser, served)
    answer = ask(page, DIARY).first
    answer.get_by_label("rounds").select_option("2")
    answer.get_by_role("button", name="Revise").click()
    steps = answer.locator(".steps")
    expect(steps.get_by_role("heading")).to_have_text(["Critique 1", "Revision 1"])
    expect(steps).to_contain_text("Then no principle is at stake.")
    first = answer.locator(".said").text_content()
    taken, put = (steps.locator(tag) for tag in ("del", "ins"))
    assert "sure" in taken.first.text_content() and "sorry" in put.first.text_content()
    # Each text is there as it was, up to the space at its ends.
    parts = steps.locator(".diff > *").evaluate_all(
        "all => all.map((part) => [part.localName, part.textContent])"
    )
    assert "".join(t for tag, t in parts if tag != "ins").split() == first.split()
    revised = " ".join("".join(t for tag, t in parts if tag != "del").split())
    assert revised.startswith("sorry , i will not help read the diary")
    lines = [w.first.evaluate("word => getComputedStyle(word).textDecorationLine") for w in (taken, put)]
    assert lines == ["line-through", "underline"]
    assert page.said == []
    page.context.close()


def test_the_token_is_asked_for_until_it_is_right_and_kept(browser: Any, served: str) -> None:
    page = opened(browser, served, token="")
    expect(page.get_by_label("Token")).to_be_focused()
    expect(page.get_by_label("Your prompt")).to_be_hidden()
    assert page.said == []
    page.get_by_label("Token").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert").first).to_have_text(
        "The server does not accept this token. Enter another."
    )
    expect(page.get_by_label("Token")).to_have_value("")
    signed_in(page, TOKEN)
    expect(page.get_by_label("Token")).to_be_hidden()
    page.reload()
    expect(page.get_by_label("Your prompt")).to_be_focused()
    assert page.evaluate("({ ...sessionStorage })") == {"token": TOKEN}
    assert page.evaluate("localStorage.length + document.cookie.length") == 0
    # Once the server no longer takes it, the conversation stays and the token is asked for again.
    page.route("**/v1/chat/completions", lambda route: route.continue_(headers={}))
    answers = ask(page, DIARY)
    expect(answers.locator(".fault")).to_have_text(["A valid bearer token is needed"] * 2)
    expect(page.get_by_label("Token")).to_be_focused()
    page.context.close()


def test_without_keys_no_token_is_asked_for(browser: Any, served: str) -> None:
    context = browser.new_context(extra_http_headers={"Authorization": f"Bearer {TOKEN}"})
    policy = {"Content-Security-Policy": served_page.POLICY, "Content-Type": "text/html"}
    context.route(f"{served}/", answering(body=served_page.html(no_auth=True), headers=policy))
    page = context.new_page()
    page.goto(f"{served}/")
    expect(page.get_by_label("Your prompt")).to_be_focused()
    expect(page.get_by_label("Token")).to_be_hidden()
    context.close()


def test_keyboard_alone(browser: Any, served: str) -> None:
    page = opened(browser, served, token="")
    keys = page.keyboard
    keys.type(TOKEN)
    keys.press("Enter")
    expect(page.get_by_label("Your prompt")).to_be_focused()
    keys.type("one line")
    keys.press("Shift+Enter")
    keys.type("another")
    assert page.get_by_label("Your prompt").input_value() == "one line\nanother"
    assert page.locator(".turn").count() == 0
    keys.press("Control+a")
    keys.type(DIARY)
    keys.press("Enter")
    expect(page.locator(".stake")).to_have_count(2)
    for _ in range(2):  # over the rounds to the button of the last answer
        keys.press("Shift+Tab")
    expect(page.get_by_role("button", name="Revise").last).to_be_focused()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    keys.press("Enter")
    expect(page.locator(".steps")).to_have_count(1)
    keys.press("/")
    expect(page.get_by_label("Your prompt")).to_be_focused()
    assert page.get_by_label("Your prompt").input_value() == ""
    page.evaluate("document.activeElement.blur(); window.getSelection().removeAllRanges()")
    page.locator("h1").click()
    order = []
    for _ in range(40):
        keys.press("Tab")
        here = "document.activeElement"
        order.append(page.evaluate(f"{here}.id || {here}.value || {here}.ariaLabel || {here}.textContent"))
        if order[-1] == "anew":
            break
    known = [
        "Models and principles",
        "rl",
        "base",
        "temperature",
        "property",
        "Text of Respect what others own",
    ]
    assert order[:6] == known
    assert order[-4:] == ["prompt", "send", "stop", "anew"]
    assert page.said == []
    page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_a_phone(browser: Any, served: str, scheme: str) -> None:
    page = opened(browser, served, width=390, scheme=scheme)
    answers = ask(page, DIARY)
    expect(answers.locator(".stake")).to_have_count(2)
    answers.first.get_by_role("button", name="Revise").click()
    expect(answers.first.locator(".diff")).to_be_visible()
    page.get_by_text("Models and principles").click()
    page.get_by_text("All principles asked").first.click()
    unbroken = ask(page, "x" * 400)
    page.keyboard.press("Escape")
    expect(unbroken.locator(".said[aria-busy=false]")).to_have_count(2)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390, "the page scrolls sideways"
    above, below = (answers.nth(i).bounding_box() for i in range(2))
    assert above["y"] + above["height"] <= below["y"]
    for place in (
        "body",
        ".soft",
        ".answer.rl h3",
        ".answer.base h3",
        ".critique h4",
        ".steps del",
        ".share",
    ):
        ink = page.locator(place).first.evaluate("place => getComputedStyle(place).color")
        paper = page.locator(".card").first.evaluate("card => getComputedStyle(card).backgroundColor")
        assert contrast(page.evaluate(AS_BYTES, ink), paper) > 4.5, (place, ink, paper)
    page.context.close()


# A colour as `rgb(…)`, however the style sheet makes it.
AS_BYTES = """(colour) => {
  const context = document.createElement("canvas").getContext("2d");
  context.fillStyle = colour;
  context.fillRect(0, 0, 1, 1);
  return `rgb(${context.getImageData(0, 0, 1, 1).data.slice(0, 3).join(", ")})`;
}"""


def test_hostile_texts_stay_texts(browser: Any, served: str) -> None:
    page = opened(browser, served, token="")
    delta = {"choices": [{"delta": {"content": HOSTILE}}]}
    stream = f"data: {json.dumps(delta)}\n\ndata: [DONE]\n\n"
    hostile = {"id": HOSTILE, "title": HOSTILE}
    row = {
        "principle": hostile,
        "at_stake": True,
        "p_at_stake": 0.9,
        "critique": HOSTILE,
        "revision": HOSTILE,
    }
    known = {"constitution": {"name": HOSTILE, "version": HOSTILE, "sha": HOSTILE}}
    document = {"principles": [{**hostile, "text": HOSTILE, "enabled": True}]}
    bodies = {
        "models": {"data": [{"id": "rl"}, {"id": HOSTILE}]},
        "constitution": {**known, "document": document, "previous": [known["constitution"]]},
        "critique": {**known, **row, "principle": hostile, "principles": [row]},
        "revise": {**known, "steps": [{**row, "round": 1, "revision": f"{HOSTILE} {HOSTILE}"}]},
    }
    for path, body in bodies.items():
        page.route(f"**/v1/{path}", answering(json=body))
    page.route("**/v1/chat/completions", answering(body=stream))
    signed_in(page, TOKEN)
    answers = ask(page, HOSTILE)
    expect(answers.locator(".said")).to_have_text([HOSTILE])
    expect(page.locator(".asked p")).to_have_text(HOSTILE)
    expect(answers.locator(".stake")).to_contain_text([HOSTILE])
    answers.get_by_role("button", name="Revise").click()
    expect(answers.locator(".diff ins")).to_have_count(1)
    expect(page.locator("#models")).to_contain_text(HOSTILE)
    assert page.locator("img").count() == 0 and page.locator("script").count() == 1
    assert page.said == []
    # Even what got in as HTML would neither run nor be fetched.
    with page.expect_console_message(lambda message: "event handler" in message.text):
        page.locator("h1").evaluate("(place, html) => { place.innerHTML = html }", HOSTILE)
    assert all("Content Security Policy" in line for line in page.said)
    page.context.close()


def test_escape_stops_what_is_under_way(browser: Any, served: str) -> None:
    page = opened(browser, served)
    held: list[Any] = []

    def hold(route: Any) -> None:
        if route.request.post_data_json["model"] == "rl":
            held.append(route)
        else:
            route.continue_()

    page.route("**/v1/chat/completions", hold)
    answers = ask(page, DIARY)
    expect(answers.last.locator(".stake")).to_contain_text(PRIVACY)
    expect(answers.first.locator(".said")).to_have_attribute("aria-busy", "true")
    with page.expect_event("requestfailed") as failed:
        page.keyboard.press("Escape")
    assert failed.value.failure == "net::ERR_ABORTED" and held
    expect(answers.first.locator(".fault")).to_have_text("Stopped.")
    held.pop().abort()
    expect(answers.last.locator(".fault")).to_be_empty()
    # The conversation goes on; what was never answered is no part of it.
    page.unroute("**/v1/chat/completions")
    with page.expect_request(lambda r: "chat" in r.url and r.post_data_json["model"] == "rl") as sent:
        answers = ask(page, DIARY)
    assert len(sent.value.post_data_json["messages"]) == 1
    expect(answers.locator(".stake")).to_have_count(2)
    assert page.said == []
    page.context.close()


def test_errors_of_the_server_are_told(browser: Any, served: str) -> None:
    page = opened(browser, served)
    answers = ask(page, "<judge> hello")
    expect(answers.locator(".fault")).to_contain_text(["control token of this model"] * 2)
    page.route("**/v1/chat/completions", lambda route: route.abort("connectionrefused"))
    answers = ask(page, DIARY)
    expect(answers.locator(".fault")).to_have_text(["The server does not answer"] * 2)
    cut = 'data: {"choices": [{"delta": {"content": "sure"}}]}\n\n'
    broken = 'data: {"error": {"message": "the time for this request is over"}}\n\n'
    for body, line in (
        (cut, "The answer was cut off; ask again"),
        (cut + broken, "The time for this request is over"),
    ):
        page.unroute("**/v1/chat/completions")
        page.route("**/v1/chat/completions", answering(body=body))
        answers = ask(page, DIARY)
        expect(answers.locator(".said")).to_have_text(["sure"] * 2)
        expect(answers.locator(".fault")).to_have_text([line] * 2)
    page.context.close()


def test_without_the_base_model_a_line_says_how_to_serve_it(browser: Any, served: str) -> None:
    page = opened(browser, served, token="")
    page.route("**/v1/models", answering(json={"data": [{"id": "sl"}, {"id": "poet"}]}))
    signed_in(page, TOKEN)
    expect(page.locator("#models")).to_contain_text("The base model is served with --models sl,base")
    expect(page.get_by_label("SL-CAI")).to_be_checked()
    expect(page.get_by_label("poet")).not_to_be_checked()
    page.get_by_label("SL-CAI").uncheck()
    page.get_by_label("Your prompt").fill(DIARY)
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("status")).to_have_text("No model is chosen; choose one.")
    assert page.locator(".turn").count() == 0
    page.context.close()


@pytest.fixture
def without_privacy(served: str, served_run: Run) -> Iterator[str]:
    """The server with a second constitution put in, and afterwards as it was before."""
    where = f"{served}/v1/constitution"
    document = _json(where)["document"]
    document["version"] = "2"
    document["principles"] = [p for p in document["principles"] if p["id"] != "privacy"]
    _json(where, {"document": document})
    yield served
    Path(served_run.path("serve", "constitutions.json")).unlink()
    deadline = time.time() + 60
    while _json(where)["constitution"]["version"] != "1":
        assert time.time() < deadline
        time.sleep(0.2)


def test_previous_constitution_stands_beside_the_current_one(browser: Any, without_privacy: str) -> None:
    page = opened(browser, without_privacy)
    answers = ask(page, DIARY)
    expect(answers.locator(".stake")).to_contain_text(["No principle is at stake"] * 2)
    page.get_by_label("Beside the previous constitution").check()
    expect(answers.locator(".stake")).to_contain_text(["No principle is at stake", PRIVACY] * 2)
    expect(answers.first.locator(".verdict > small:last-child")).to_contain_text(
        ["errand-town 2", "errand-town 1"]
    )
    current, previous = (answers.first.locator(".verdict").nth(i).bounding_box() for i in range(2))
    assert current["y"] == previous["y"] and current["x"] < previous["x"]
    assert page.said == []
    page.context.close()


def test_another_constitution_is_noticed(browser: Any, served: str, request: pytest.FixtureRequest) -> None:
    page = opened(browser, served)
    privacy, kindness = (page.get_by_label(t, exact=True) for t in ("Protect private things", "Speak kindly"))
    privacy.uncheck()
    kindness.uncheck()
    request.getfixturevalue("without_privacy")
    expect(ask(page, DIARY).locator(".stake")).to_have_count(2)
    expect(page.locator("#principles > small")).to_contain_text("errand-town 2")
    expect(privacy).to_have_count(0)
    expect(kindness).not_to_be_checked()
    page.context.close()


def _json(url: str, body: Any = None) -> Any:
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    data = body and json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers, method="PUT" if body else "GET")
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)

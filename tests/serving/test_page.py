"""The page at / in headless Chromium. scripts/test.sh installs Chromium if it is missing."""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, Request, expect

from oracles.browser import chromium

PROMPT = "# os\ndef walk(top):"


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser, server) -> Iterator[Page]:
    """The page, opened. Fails if a script has an error or anything is loaded from elsewhere."""
    context = browser.new_context()
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))

    def on_request(request: Request) -> None:
        if not request.url.startswith((server.url, "data:")):
            errors.append(request.url)

    page.on("request", on_request)
    page.goto(server.url)
    expect(page.get_by_label("demo (base)")).to_be_checked(timeout=20_000)
    yield page
    context.close()
    assert not errors


def test_base_and_adapters_reply_side_by_side(page, server):
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_label("Most new tokens").fill("12")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("status")).to_have_text("Done.", timeout=60_000)
    with server.client() as client:
        for model in ("demo", "one", "two"):
            reply = client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": PROMPT}],
                max_tokens=12,
                temperature=0,
            )
            shown = page.get_by_label(f"Reply of {model}").text_content()
            assert shown == reply.choices[0].message.content
    assert page.get_by_text(re.compile(r"\d+ tokens, \d+ a second")).count() == 3


def test_only_chosen_models_continue_a_text(page):
    page.get_by_label("Prompt", exact=True).fill("def walk(")
    page.get_by_label("Prompt is").select_option("text to continue")
    page.get_by_label("two", exact=True).uncheck()
    page.get_by_label("Most new tokens").fill("4")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("status")).to_have_text("Done.", timeout=60_000)
    assert page.get_by_role("article").count() == 2


def test_text_streams_and_stop_ends_it(page, server):
    page.get_by_label("Prompt", exact=True).fill("def walk(")
    page.get_by_label("Prompt is").select_option("text to continue")
    page.get_by_label("Temperature").fill("2")
    page.get_by_label("Most new tokens").fill("480")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_label("Reply of demo")).not_to_be_empty(timeout=60_000)
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("status")).to_have_text("Stopped.")
    expect(page.get_by_role("button", name="Generate")).to_be_enabled()
    server.wait_idle(10)


def test_the_servers_errors_are_shown(page):
    page.get_by_label("Prompt", exact=True).fill("x")
    page.get_by_label("Most new tokens").fill("9999")
    page.get_by_label("one", exact=True).uncheck()
    page.get_by_label("two", exact=True).uncheck()
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_text("max_tokens: got 9999, expected at most")).to_be_visible()


def test_every_control_has_a_label_and_the_page_fits_a_phone(page):
    unlabelled = page.evaluate(
        "[...document.querySelectorAll('input, select, textarea')]"
        ".filter((control) => !control.labels.length).map((control) => control.id)"
    )
    assert unlabelled == []
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    small = page.evaluate(
        "[...document.querySelectorAll('button')].filter((b) => b.clientHeight < 36).length"
    )
    assert small == 0

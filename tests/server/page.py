"""What the tests of the page share: one browser, servers with small models, a page that complains loudly."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SEND = "#draft"
LAST = "#messages .message:last-child"
DONE = f"{LAST}.assistant:not(.open)"


@contextmanager
def opened(program: Any, address: str, **options: Any) -> Iterator[Any]:
    """A fresh page at a server. Whatever it writes to the console, or asks of anyone else, fails the test."""
    context = program.new_context(**{"viewport": {"width": 1280, "height": 800}, "accept_downloads": True, **options})
    page, faults = context.new_page(), []
    page.set_default_timeout(15_000)
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on(
        "request", lambda request: request.url.startswith((address, "blob:", "data:")) or faults.append(request.url)
    )
    page.faults = faults
    try:
        page.goto(f"{address}/")
        yield page
        assert faults == []
    finally:
        context.close()


def until(page: Any, condition: str, argument: object = None) -> None:
    """Waits for a condition, an expression of `arg`. (What playwright has for it is refused by the page's policy.)"""
    deadline = time.monotonic() + 15
    while not page.evaluate(f"arg => Boolean({condition})", argument):
        assert time.monotonic() < deadline, condition
        time.sleep(0.02)


def ready(page: Any) -> Any:
    """Waits until the models are known."""
    page.wait_for_selector("#model option", state="attached")
    until(page, "!document.querySelector('#welcome h3')?.textContent.startsWith('One moment')")
    return page


def say(page: Any, text: str, wait: bool = True) -> None:
    """Sends a message, and waits for the whole answer."""
    page.fill(SEND, text)
    page.press(SEND, "Enter")
    if wait:
        page.wait_for_selector(DONE)


def set_number(page: Any, name: str, value: object) -> None:
    """Sets a control of sampling."""
    page.fill(f"#sampling-{name}", str(value))
    page.press(f"#sampling-{name}", "Tab")


def texts(page: Any) -> list[str]:
    """The texts of all messages."""
    return page.locator("#messages .message > .text").all_text_contents()


def bars(page: Any, selector: str) -> list[tuple[str, float]]:
    """The labels and shares of a list of bars; what is shown as less than a tenth of a per cent is 0."""
    rows = page.locator(f"{selector} .bars li").all()
    found = []
    for row in rows:
        label = row.locator(".bar-label").evaluate("e => e.firstChild.textContent")
        value = row.locator(".bar-value").text_content()
        found.append((label, 0.0 if value.startswith("<") else float(value.rstrip("%")) / 100))
    return found


def percent(probability: float) -> str:
    """A probability as the page shows it."""
    if probability < 0.001:
        return "<0.1%" if probability > 0 else "0%"
    if probability >= 0.9995:
        return "100%"
    digits = 0 if 0.1 <= probability < 0.995 else 1
    return f"{probability * 100:.{digits}f}%"


def visible(text: str) -> str:
    """A token as the page shows it."""
    return re.sub("[ \n\t\r]", lambda found: {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"}[found[0]], text) or "∅"

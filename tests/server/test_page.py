"""The page at `/`, in a browser, before the real server with small models."""

import json
import math
import re

import pytest

from tests.browser import browser
from tests.server import clients
from tests.server.page import DONE, LAST, bars, opened, percent, ready, say, set_number, texts, until, visible

HOSTILE = (
    "<script>window.hit = 1</script><img src=x onerror='window.hit = 2'> [a](javascript:window.hit=3) "
    "[b](data:text/html,x) [c](https://example.org/?q=1) ![d](https://example.org/d.png)\n\n"
    "```html\n<svg onload=window.hit=4></svg>\n```\n\n<iframe srcdoc='<script>window.hit=5</script>'></iframe>"
)
LONG = "One, two, three, four, five, six, seven. " * 60
PREFIX = "שלום 🦙 עולם"


@pytest.fixture(scope="module")
def program():
    started, found = browser()
    yield found
    found.close()
    started.stop()


@pytest.fixture(scope="module")
def tiny():
    """A model with random weights, and the template of a chat."""
    with clients.serve(clients.random_model("plain")) as address:
        yield address


@pytest.fixture(scope="module")
def slow():
    """A model that says a long text, 5 ms a token."""
    with clients.serve(clients.scripted_model(LONG, "plain", delay=0.005)) as address:
        yield address


def scripted(program, said, template="plain", **options):
    """A page before a server whose model says a text."""

    class Both:
        def __enter__(self):
            self.server = clients.serve(clients.scripted_model(said, template), **options)
            self.page = opened(program, self.server.__enter__())
            return ready(self.page.__enter__())

        def __exit__(self, *error):
            self.page.__exit__(*error)
            self.server.__exit__(*error)

    return Both()


def answer_with(stream):
    """Returns a handler that answers a request with a stream."""
    return lambda route: route.fulfill(body=stream, content_type="text/event-stream")


def test_an_answer_is_the_servers_and_a_reload_keeps_it(program, tiny):
    with opened(program, tiny) as page:
        ready(page)
        set_number(page, "temperature", 0)
        set_number(page, "max_tokens", 24)
        say(page, "The fox")
        asked = {"messages": [{"role": "user", "content": "The fox"}], "temperature": 0, "max_tokens": 24}
        answer = clients.post(tiny, "/v1/chat/completions", **asked).json()
        kept = json.loads(
            page.evaluate("localStorage[Object.keys(localStorage).find(k => k.includes('conversation.'))]")
        )
        assert kept["messages"][1]["content"] == answer["choices"][0]["message"]["content"]
        assert kept["messages"][1]["usage"]["completion_tokens"] == answer["usage"]["completion_tokens"] == 24
        assert kept["messages"][1]["parameters"]["temperature"] == 0
        timings = kept["messages"][1]["timings"]
        shown = page.locator(f"{LAST} .meter").text_content()
        assert shown.startswith(f"24 tokens · {timings['tokens_per_second']:.1f} tokens/s · first token after ")
        assert "most tokens" in page.locator(f"{LAST} .note").text_content()
        before = texts(page)
        page.reload()
        page.wait_for_selector(DONE)
        assert texts(page) == before
        assert page.input_value("#sampling-max_tokens") == "24"


def test_escape_stops_an_answer_and_what_came_stays(program, slow):
    with opened(program, slow) as page:
        ready(page)
        say(page, "Count.", wait=False)
        until(page, "document.querySelector('.message.open > .text').textContent.length > 60")
        assert page.is_visible("#stop")
        page.keyboard.press("Escape")
        page.wait_for_selector(DONE)
        assert page.locator(f"{LAST} .meter").text_content().endswith("stopped")
        said = texts(page)[-1]
        assert 40 < len(said) < len(LONG)
        assert LONG.startswith(said.strip())
        assert page.is_visible("#send")
        say(page, "Again.", wait=False)  # the server is free for the next
        until(page, "document.querySelectorAll('.message').length == 4")
        page.click("#stop")
        page.wait_for_selector(DONE)


def test_a_reload_in_mid_answer_keeps_what_was_written(program, slow):
    with opened(program, slow) as page:
        ready(page)
        say(page, "Count.", wait=False)
        until(page, "document.querySelector('.message.open > .text').textContent.length > 40")
        page.reload()
        page.wait_for_selector(DONE)
        assert LONG.startswith(texts(page)[-1].strip())
        assert len(texts(page)[-1]) > 20


def test_several_conversations(program):
    with scripted(program, "Yes.") as page:
        say(page, "First?")
        page.keyboard.press("Alt+n")
        page.wait_for_selector("#welcome:visible")
        say(page, "Second?")
        names = page.locator(".talk-name")
        assert names.all_text_contents() == ["Second?", "First?"]
        names.nth(1).click()
        assert texts(page)[0] == "First?"
        page.locator("#talk-list li.current").hover()
        page.click("#talk-list li.current [aria-label=Rename]")
        page.fill(".rename", "Renamed <b>")
        page.press(".rename", "Enter")
        assert names.nth(1).text_content() == "Renamed <b>"
        page.locator("#talk-list li.current").hover()
        page.click("#talk-list li.current [aria-label=Delete]")
        assert names.all_text_contents() == ["Second?"]
        page.click("#toast button")
        assert names.all_text_contents() == ["Second?", "Renamed <b>"]
        page.reload()
        page.wait_for_selector(DONE)
        assert page.locator(".talk-name").all_text_contents() == ["Second?", "Renamed <b>"]


def test_two_tabs_show_the_same_conversations(program):
    with scripted(program, "Yes.") as page:
        say(page, "In the first?")
        other = page.context.new_page()
        other.goto(page.url)
        other.wait_for_selector(DONE)
        ready(other)
        say(other, "Once more?")
        until(page, "document.querySelectorAll('#messages .message').length == 4")
        until(page, "document.querySelector('#messages .message:last-child > .text').textContent == 'Yes.'")
        other.keyboard.press("Alt+n")
        say(other, "In the second?")
        until(page, "document.querySelectorAll('.talk-name').length == 2")
        assert texts(page)[2:] == ["Once more?", "Yes."]


def test_what_is_exported_can_be_imported(program, tmp_path):
    with scripted(program, "Yes, **indeed**.") as page:
        set_number(page, "seed", 7)
        say(page, "A question?")
        with page.expect_download() as download:
            page.click("#export")
        download.value.save_as(tmp_path / "talks.json")
        file = json.loads((tmp_path / "talks.json").read_text("utf-8"))
        (talk,) = file["conversations"]
        assert [message["content"] for message in talk["messages"]] == ["A question?", "Yes, **indeed**."]
        assert talk["messages"][1]["parameters"]["seed"] == 7
        assert talk["messages"][1]["timings"]["tokens_per_second"] > 0
        page.evaluate("localStorage.clear()")
        page.reload()
        ready(page)
        assert page.locator(".message").count() == 0
        page.set_input_files("#import-file", tmp_path / "talks.json")
        page.wait_for_selector(DONE)
        assert texts(page) == ["A question?", "Yes, indeed."]
        assert page.locator("#messages strong").text_content() == "indeed"
        assert page.input_value("#sampling-seed") == "7"
        for content, said in [
            ("{", "is not JSON"),
            ('{"format": "other"}', "holds no conversations"),
            (json.dumps({**file, "version": 9}), "version 9"),
            (
                json.dumps({**file, "conversations": [{"messages": [{"role": "root"}]}]}),
                "Conversation 1 of the file is",
            ),
        ]:
            (tmp_path / "bad.json").write_text(content)
            page.set_input_files("#import-file", tmp_path / "bad.json")
            until(page, "document.querySelector('#toast').textContent.includes(arg)", said)
        assert page.locator(".talk-name").count() == 1


def test_full_storage_is_said_and_the_talk_goes_on(program):
    with scripted(program, "Yes.") as page:
        page.evaluate(
            "for (let n = 2 ** 22; n >= 1; n /= 2)"
            " try { for (;;) localStorage[`f${Math.random()}`] = 'x'.repeat(n) } catch {}"
        )
        say(page, "A question? " * 50)
        assert texts(page)[-1] == "Yes."
        assert "storage is full" in page.locator("#problem").text_content()
        page.evaluate("Object.keys(localStorage).filter(k => k[0] == 'f').forEach(k => localStorage.removeItem(k))")
        say(page, "More?")
        page.wait_for_selector("#problem", state="hidden")


def test_editing_and_writing_again(program, tiny):
    with opened(program, tiny) as page:
        ready(page)
        set_number(page, "max_tokens", 8)
        set_number(page, "seed", 3)
        say(page, "The fox")
        first = texts(page)
        page.click(f"{LAST} [aria-label='Write it again']")
        page.wait_for_selector(DONE)
        assert texts(page) == first  # the same seed
        set_number(page, "seed", 4)
        page.click(f"{LAST} [aria-label='Write it again']")
        page.wait_for_selector(DONE)
        assert texts(page)[0] == "The fox"
        assert texts(page)[1] != first[1]
        say(page, "More")
        page.locator(".message.user").first.hover()
        page.locator(".message.user [aria-label=Edit]").first.click()
        page.fill(".edit textarea", "The owl")
        page.click(".edit .primary")
        page.wait_for_selector(DONE)
        assert texts(page)[0] == "The owl"
        assert len(texts(page)) == 2


def test_hostile_output_is_inert(program):
    with scripted(program, HOSTILE) as page:
        say(page, HOSTILE)
        page.wait_for_timeout(200)
        assert page.evaluate("window.hit") is None
        assert page.locator("#messages :is(script, img, iframe, svg:not(.icon))").count() == 0
        links = page.locator("#messages a").evaluate_all("all => all.map(a => [a.protocol, a.rel, a.target])")
        assert links == [["https:", "noopener noreferrer nofollow", "_blank"]] * 2  # c, and the address of d as text
        assert "<script>window.hit = 1</script>" in texts(page)[1]
        assert "[a](javascript:window.hit=3)" in texts(page)[1]
        assert texts(page)[0] == HOSTILE
        page.reload()
        page.wait_for_selector(DONE)
        assert page.evaluate("window.hit") is None


def test_text_from_the_right_and_characters_of_many_bytes(program):
    with scripted(program, f"{PREFIX}\n\n- אחת\n\nplain") as page:
        say(page, PREFIX)
        assert texts(page)[0] == PREFIX
        direction = "all => all.map(e => getComputedStyle(e).direction)"
        assert page.locator(".message.user > .text").evaluate_all(direction) == ["rtl"]
        assert page.locator(".message.assistant .text :is(p, ul)").evaluate_all(direction) == [
            "rtl",
            "rtl",
            "rtl",
            "ltr",
        ]
        assert page.locator(".message.assistant .text p").first.text_content() == PREFIX


def test_reasoning_is_folded_and_calls_are_shown(program):
    with scripted(program, clients.CALLING, clients.TOOLS_TEMPLATE) as page:
        # The page offers no tools of its own; a request with one makes the server look for calls.
        tools = [{"type": "function", "function": {"name": name}} for name in ("look", "rest")]

        def add_tools(route):
            route.continue_(post_data=json.dumps({**route.request.post_data_json, "tools": tools}))

        page.route("**/chat/completions", add_tools)
        say(page, "Where?")
        reasoning = page.locator(f"{LAST} .reasoning")
        assert reasoning.get_attribute("open") is None
        assert reasoning.locator(".text").text_content() == "Hm."
        assert texts(page)[-1] == "I look."
        assert page.locator(f"{LAST} .call p code").all_text_contents() == ["look", "rest"]
        assert json.loads(page.locator(f"{LAST} .call pre").first.text_content()) == {"at": "río"}
        page.locator(".results textarea").nth(0).fill("a river")
        page.locator(".results textarea").nth(1).fill("done")
        with page.expect_request("**/chat/completions") as request:
            page.click(".results button")
        sent = request.value.post_data_json["messages"]
        assert [message["role"] for message in sent] == ["user", "assistant", "tool", "tool"]
        assert sent[2]["tool_call_id"] == sent[1]["tool_calls"][0]["id"]
        page.wait_for_selector(DONE)


def test_faults_of_the_server_are_shown(program, tiny):
    with opened(program, tiny) as page:
        ready(page)
        set_number(page, "max_tokens", 4)
        say(page, "The fox " * 2000)
        assert "tokens" in page.locator(f"{LAST} .note.bad").text_content()  # too long for the model, with the counts
        start = 'data: {"choices": [{"index": 0, "delta": {"content": "Half"}}]}\n\n'
        for stream, said in [
            (start + 'data: {"error": {"message": "the engine failed <b>"}}\n\n', "the engine failed <b>"),
            (start, "The connection ended before the answer did."),
        ]:
            page.route("**/chat/completions", answer_with(stream))
            page.click(f"{LAST} >> text=Try again")
            until(page, "document.querySelector('.message:last-child .note.bad')?.textContent == arg", said)
            assert texts(page)[-1] == "Half"
        page.unroute("**/chat/completions")
        page.faults.clear()  # the browser itself reports the status 400


def test_a_key_is_asked_for_and_kept_until_the_tab_closes(program):
    model = clients.scripted_model("Yes.", "plain")
    with clients.serve(model, api_keys=["secret-key"]) as address, opened(program, address) as page:
        page.wait_for_selector("#key-form:visible")
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        until(page, "document.querySelector('#problem').textContent.includes('wrong')")
        page.fill("#key", "secret-key")
        page.press("#key", "Enter")
        ready(page)
        say(page, "A question?")
        assert texts(page)[-1] == "Yes."
        page.reload()
        ready(page)
        assert page.is_hidden("#key-form")
        assert "secret-key" not in page.evaluate("JSON.stringify(localStorage)")
        page.faults.clear()  # the browser itself reports the status 401


def test_a_model_that_does_not_chat_goes_on_with_the_text(program):
    with scripted(program, " and on **it** goes", None) as page:
        assert page.locator("#welcome").text_content().startswith("How does it begin?")
        with page.expect_request("**/v1/completions") as request:
            say(page, "Once")
        assert request.value.post_data_json["prompt"] == "Once"
        assert texts(page) == ["Once", " and on **it** goes"]
        with page.expect_request("**/v1/completions") as request:
            say(page, "")
        assert request.value.post_data_json["prompt"] == "Once and on **it** goes"
        page.select_option("#mode", "chat")
        with page.expect_request("**/v1/chat/completions"):
            say(page, "Hello")


def test_look_inside_shows_what_the_model_computes(program, tiny):
    text = "The fox gave the owl"
    asked = {"prompt": text, "top": 8, "attention": [1], "lens": True}
    found = clients.post(tiny, "/v1/look_inside", **asked).json()
    tokens, last = found["tokens"], len(found["tokens"]) - 1
    with opened(program, tiny) as page:
        ready(page)
        page.click("#tab-inside")
        page.fill("#inside-prompt", text)
        page.press("#inside-prompt", "Control+Enter")
        page.wait_for_selector(".lens td")
        row = page.locator("[aria-label='Tokens of the text'] .token")
        assert row.locator(".piece").all_text_contents() == [visible(token["text"]) for token in tokens]
        assert row.locator(".id").all_text_contents() == [str(token["id"]) for token in tokens]

        def check_next(position):
            likeliest = found["next"][position]
            values = page.locator(".part:nth-child(2) .bar-value").all_text_contents()
            assert values[:-1] == [percent(math.exp(candidate["logprob"])) for candidate in likeliest]
            labels = [label for label, _ in bars(page, ".part:nth-child(2)")]
            assert labels == [*(visible(candidate["text"]) for candidate in likeliest), "all others together"]

        check_next(last)
        row.nth(2).click()
        check_next(2)
        page.keyboard.press("ArrowRight")
        check_next(3)

        # Attention: the mean first, then head 1; both read off the picture as the API has them.
        weights = found["attention"][0]["weights"]
        assert all(sum(row) == pytest.approx(1, abs=1e-4) for head in weights for row in head)
        assert page.locator(".head").count() == len(weights) + 1
        page.click(".head >> nth=1")
        best = max(range(4), key=lambda to: weights[0][3][to])
        told = page.locator(".attention .readout").text_content()
        assert told.startswith(f"Most at “{visible(tokens[best]['text'])}” ({percent(weights[0][3][best])})")
        pixels = page.locator(".plot canvas").evaluate(
            "c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].filter((_, i) => i % 4 == 3)"
        )
        side = len(tokens)
        for position in range(side):
            squares = [(alpha / 255) ** 2 for alpha in pixels[position * side : (position + 1) * side]]
            assert sum(squares) == pytest.approx(1, abs=0.02)
            assert squares[position + 1 :] == [0] * (side - position - 1)

        # The lens: a row for the embedding and each layer, the last as the model itself predicts.
        assert page.locator(".lens tbody tr").count() == found["layers"] + 1
        cells = page.locator(".lens tbody tr.own td").all_text_contents()
        assert cells == [visible(position[0]["text"]) for position in found["next"]]
        cells = page.locator(".lens tbody tr").nth(1).locator("td").all_text_contents()
        assert cells == [visible(position[0]["text"]) for position in found["lens"][1]]


@pytest.mark.parametrize("length", [1, 512])
def test_look_inside_from_one_token_to_the_most(program, tiny, length):
    with opened(program, tiny) as page:
        ready(page)
        page.click("#tab-inside")
        page.fill("#inside-prompt", "z" * (length - 1) if length > 1 else "z")
        page.click("#inside-run")
        page.wait_for_selector(".part")
        count = page.locator("[aria-label='Tokens of the text'] .token").count()
        assert count in (length, length + 1) if length == 1 else count > 256
        for name in ("Compute the attention of layer 2", "Compute every layer's prediction"):
            offer = page.get_by_role("button", name=name)
            if count > 128:
                offer.click()
        page.wait_for_selector(".lens td")
        page.wait_for_selector(".head")
        if count > 16:
            page.locator("canvas.overview").click(position={"x": 3, "y": 10})
            assert page.locator(".lens thead .chosen").get_attribute("data-position") == "0" or count > 300
        page.fill("#inside-prompt", "z1" * 600)
        page.click("#inside-run")
        assert re.search(r"\d+ tokens; give 1 to 512", page.locator("#inside-result .note.bad").text_content())
        page.faults.clear()  # the browser itself reports the status 400


def test_decisions_are_the_servers(program, tiny):
    with opened(program, tiny) as page:
        ready(page)
        page.click("#tab-decisions")
        with page.expect_response("**/v1/decisions") as response:
            page.click("#decisions .ask .primary")
        asked, answers = response.value.request.post_data_json, response.value.json()["answers"]
        page.wait_for_selector(".question:last-child .answer .bars")
        assert [question["type"] for question in asked["questions"]] == ["predicate", "choice", "labels", "score"]
        shown = [box.locator(".bar-value").all_text_contents() for box in page.locator(".question").all()]
        yes = answers[0]["probability"]
        assert shown[0] == [percent(yes), percent(1 - yes)]
        for values, answer in zip(shown[1:], answers[1:], strict=True):
            assert values == [percent(option["probability"]) for option in answer["probabilities"]]
        assert (
            f"at {answers[3]['score']:.2f} of a scale"
            in page.locator(".question:last-child .answer .help").text_content()
        )
        page.locator(".question").nth(1).locator("textarea").nth(1).fill("one\none")
        page.click("#decisions .ask .primary")
        until(page, "document.querySelector('#decisions [role=status]').textContent.includes('twice')")


def test_tabs_and_theme_are_for_keys_and_remembered(program, tiny):
    with opened(program, tiny, color_scheme="light") as page:
        ready(page)
        page.focus("#tab-chat")
        page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement.id") == "tab-inside"
        assert page.is_visible("#panel-inside")
        assert page.is_hidden("#panel-chat")
        page.keyboard.press("End")
        assert page.is_visible("#panel-decisions")
        page.reload()
        assert page.is_visible("#panel-decisions")
        paper = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number).reduce((a, b) => a + b) / 3"
        assert page.evaluate(paper) > 200
        page.click("#theme")
        page.click("#theme")
        assert page.evaluate(paper) < 60
        page.reload()
        assert page.evaluate(paper) < 60
        page.click("#theme")
        assert page.evaluate(paper) > 200


@pytest.mark.parametrize("width", [340, 800, 1400])
def test_it_fits_every_width(program, width):
    with scripted(
        program, "A `" + "x" * 200 + "`\n\n```\n" + "y" * 300 + "\n```\n\n|a|b|\n|-|-|\n|" + "z" * 300 + "|1|"
    ) as page:
        page.set_viewport_size({"width": width, "height": 700})
        say(page, "w" * 300)
        for tab in ("chat", "inside", "decisions"):
            page.click(f"#tab-{tab}")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            panel = page.locator(f"#panel-{tab}")
            assert panel.evaluate("e => e.scrollWidth - e.clientWidth") <= 0
        page.click("#tab-chat")
        assert page.locator("#scroll").evaluate("e => e.scrollWidth - e.clientWidth") <= 0
        if width < 1120:
            page.click("[data-opens=settings]")
            assert page.is_visible("#system")
            page.keyboard.press("Escape")
            assert page.is_hidden("#system")


def test_a_classifier_decides_and_does_not_talk(program, tiny):
    meta = {"capabilities": ["classify", "decisions"], "labels": ["ham", "spam"], "chat": False, "defaults": {}}
    with opened(program, tiny) as page:
        page.route("**/v1/models", lambda route: route.fulfill(json={"data": [{"id": "filter", "meta": meta}]}))
        page.reload()
        until(page, "document.querySelector('#welcome').textContent.includes('does not write')")
        assert page.is_disabled("#draft")
        page.click("#tab-decisions")
        assert page.input_value("[id$=-options]") == "ham\nspam"
        assert page.locator(".question").count() == 1


@pytest.mark.medium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_fault(program, tiny, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs the package axe-playwright-python")

    def check(page):
        faults = axe.Axe().run(page).response["violations"]
        assert [(fault["id"], [node["html"][:120] for node in fault["nodes"]]) for fault in faults] == []

    with opened(program, tiny, color_scheme=scheme, reduced_motion="reduce") as page:
        ready(page)
        check(page)
        set_number(page, "max_tokens", 4)
        say(page, "The fox")
        check(page)
        page.click("#tab-inside")
        page.click("#inside-examples .chip >> nth=0")
        page.wait_for_selector(".lens td")
        check(page)
        page.click("#tab-decisions")
        page.click("#decisions .ask .primary")
        page.wait_for_selector(".question:last-child .answer .bars")
        check(page)
        page.click("#help")
        check(page)

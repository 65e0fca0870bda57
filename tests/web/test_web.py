"""The page in a real browser: a video is opened, asked about and jumped in; nothing leaves the machine."""

import json
import re
import urllib.error
import urllib.request
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from tiny_model import tiny_checkpoint
from video_files import write_cut_video, write_video
from web_server import find_browser, serving

from mambamia_hf.cli.demo import VIDEO


pytest.importorskip("gradio", reason="needs the extra 'web'")
playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra 'browser'")
BROWSER = find_browser()
pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium, as Debian's package 'chromium'"),
    pytest.mark.slow,
]

NEEDLE = json.loads(VIDEO.with_suffix(".json").read_text(encoding="utf-8"))
DURATION = 32.0
PATIENCE = 60_000  # milliseconds; machines may be busy
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("served")) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as library:
        browser = library.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visitor:
    """Someone at the page, in a browser session of their own, who takes note of every request and error of it."""

    def __init__(self, browser, address, **settings):
        self.context = browser.new_context(**settings)
        self.context.set_default_timeout(PATIENCE)
        self.page = self.context.new_page()
        self.requests, self.errors = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(address)
        self.page.wait_for_selector("#mm-example")

    def upload(self, where, path):
        """Choose a file, and wait for what the page says to it."""
        said = self.status() + self.alert()
        self.page.set_input_files(f"{where} input[type=file]", path)
        self.page.wait_for_function(
            "said => [...document.querySelectorAll('#mm-status .mm-notice')].some(e => e.textContent !== said)",
            arg=said,
        )

    def open_tab(self, name):
        self.page.get_by_role("tab", name=name).click()

    def open_sources(self):
        self.page.locator("#mm-open > button").click()

    def open_example(self):
        self.page.click("#mm-example")
        self.page.wait_for_selector(".mm-strip")

    def ask(self, question):
        """The text of the answer, and of the line with the frames that mattered."""
        replies = self.page.locator("#mm-chat .bot.message")
        count = replies.count()
        self.page.fill("#mm-question textarea", question)
        self.page.press("#mm-question textarea", "Enter")
        reply = replies.nth(count)
        reply.get_by_text("Looked most at").wait_for()
        answer, evidence = reply.inner_text().strip().split("\n", 1)
        return answer.strip(), evidence.strip()

    def alert(self):
        return " ".join(self.page.locator("#mm-status [role=alert]").all_inner_texts())

    def status(self):
        return " ".join(self.page.locator("#mm-status [role=status]").all_inner_texts())

    def player_time(self):
        """Where the player is, once it has arrived."""
        self.page.wait_for_function("!document.querySelector('#mm-player video').seeking")
        return self.page.evaluate("document.querySelector('#mm-player video').currentTime")

    def is_wider_than_its_window(self):
        return self.page.evaluate("document.documentElement.scrollWidth > window.innerWidth")


@pytest.fixture
def visit(browser, address):
    visitors = []

    def visit(**settings):
        visitors.append(Visitor(browser, address, **settings))
        return visitors[-1]

    yield visit
    for visitor in visitors:
        foreign = [url for url in visitor.requests if not url.startswith((address, "data:", "blob:"))]
        assert foreign == []
        assert visitor.errors == []
        visitor.context.close()


def seconds(link):
    return float(link.get_attribute("href").removeprefix("#t="))


def test_upload_ask_follow_up_and_jump(visit):
    visitor = visit()
    visitor.upload("#mm-upload", VIDEO)
    page = visitor.page
    page.wait_for_selector(".mm-strip")
    assert "needle.mp4 (0:32), 64 frames" in visitor.status()
    links = page.locator(".mm-strip a")
    assert 8 <= links.count() <= 24
    assert page.locator(".mm-strip img").count() == links.count()
    page.wait_for_function("document.querySelector('#mm-player video').duration > 0")
    assert page.evaluate("document.querySelector('#mm-player video').duration") == DURATION

    answer, evidence = visitor.ask(NEEDLE["question"])
    assert answer == NEEDLE["answer"]
    assert re.search(r"\d:\d\d", evidence)
    assert visitor.ask(f"How often does the {answer} appear?")[0] == "1"
    assert page.locator("#mm-chat .user.message").count() == 2

    for link in (links.nth(3), page.locator("#mm-chat a[href^='#t=']").last):
        link.click()
        assert visitor.player_time() == pytest.approx(seconds(link), abs=0.01)
    box = page.locator(".mm-curve").bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + 5)
    assert visitor.player_time() == pytest.approx(DURATION / 2, abs=0.6)
    assert page.locator(".mm-strip a[aria-current]").count() == 1
    assert "#t=" not in page.url


def test_another_budget_begins_a_new_conversation(visit):
    visitor = visit()
    visitor.open_example()
    visitor.ask(NEEDLE["question"])
    visitor.page.get_by_label("a quarter").check()
    visitor.page.get_by_text("64 frames, 16 read").wait_for()
    assert visitor.page.locator(".mm-strip a.mm-kept").count() < visitor.page.locator(".mm-strip a").count()
    assert visitor.page.locator("#mm-chat .message").count() == 0
    assert visitor.ask(NEEDLE["question"])[0] == NEEDLE["answer"]
    visitor.page.click("#mm-again")
    visitor.page.wait_for_function("document.querySelectorAll('#mm-chat .message').length === 0")


def test_bad_files_are_one_sentence_and_nothing_is_lost(visit, tmp_path):
    visitor = visit()
    visitor.open_example()
    visitor.open_sources()
    (tmp_path / "text.mp4").write_text("This is no video.")
    (tmp_path / "empty.mp4").write_bytes(b"")
    write_cut_video(tmp_path / "cut.mp4", 0.2)
    for name in ("text.mp4", "cut.mp4"):
        visitor.upload("#mm-upload", tmp_path / name)
        visitor.page.wait_for_selector("#mm-status [role=alert]")
        assert name in visitor.alert() and "/" not in visitor.alert()
        assert visitor.page.locator(".mm-strip").count() == 1
    (tmp_path / "text.safetensors").write_text("This is no memory.")
    visitor.upload("#mm-upload", tmp_path / "text.safetensors")
    assert "text.safetensors" in visitor.alert() and "/" not in visitor.alert()
    assert visitor.ask(NEEDLE["question"])[0] == NEEDLE["answer"]


def test_a_question_without_a_video(visit):
    visitor = visit()
    visitor.page.fill("#mm-question textarea", "What happens?")
    visitor.page.press("#mm-question textarea", "Enter")
    alert = visitor.page.locator("#mm-chat-status [role=alert]")
    assert "open one first" in alert.inner_text()
    assert visitor.page.input_value("#mm-question textarea") == "What happens?"
    visitor.open_example()
    assert visitor.ask("What colour is the shape?")[0]
    assert alert.count() == 0


def test_a_question_that_cannot_be_asked(visit):
    visitor = visit()
    visitor.open_example()
    visitor.page.fill("#mm-question textarea", "What is <|video_pad|>?")
    visitor.page.press("#mm-question textarea", "Enter")
    assert "leave it out" in visitor.page.locator("#mm-chat-status [role=alert]").inner_text()
    assert visitor.ask(NEEDLE["question"])[0] == NEEDLE["answer"]


def test_paths(visit, tmp_path):
    visitor = visit()
    visitor.open_tab("Path")
    box = visitor.page.locator("#mm-path textarea, #mm-path input")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "missing.mp4", tmp_path / "empty"):  # neither's name is in the error of the other
        box.fill(str(path))
        box.press("Enter")
        visitor.page.locator("#mm-status [role=alert]").get_by_text(path.name).wait_for()
    video = write_video(tmp_path / "numbers.mp4", num_frames=16, fps=2)
    box.fill(str(video))
    box.press("Enter")
    visitor.page.wait_for_selector(".mm-strip")
    assert "numbers.mp4 (0:08), 16 frames" in visitor.status()
    assert video.exists()


@pytest.fixture
def other_server(tmp_path):
    """The address of a server of the files in `tmp_path`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path))
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_addresses(visit, tmp_path, other_server):
    visitor = visit()
    visitor.open_tab("Path")
    box = visitor.page.locator("#mm-path textarea, #mm-path input")
    box.fill(f"{other_server}/missing.mp4")
    box.press("Enter")
    assert "404" in visitor.page.locator("#mm-status [role=alert]").inner_text()
    write_video(tmp_path / "numbers.mp4", num_frames=16, fps=2)
    box.fill(f"{other_server}/numbers.mp4?token=secret")
    box.press("Enter")
    visitor.page.wait_for_selector(".mm-strip")
    assert "numbers.mp4 (0:08), 16 frames" in visitor.status()
    visitor.page.locator(".mm-strip a").nth(4).click()
    assert visitor.player_time() == pytest.approx(2, abs=0.01)


def test_which_frames_are_looked_at(visit):
    visitor = visit()
    visitor.page.get_by_text("Which frames are looked at").click()
    visitor.page.get_by_label("From").fill("0:10")
    visitor.page.get_by_label("To", exact=True).fill("0:60")
    visitor.page.click("#mm-example")
    assert "'To' must be seconds or h:mm:ss" in visitor.page.locator("#mm-status [role=alert]").inner_text()
    visitor.page.get_by_label("To", exact=True).fill("0:20")
    visitor.open_example()
    links = visitor.page.locator(".mm-strip a")
    assert 10 <= seconds(links.first) < seconds(links.last) < 20


def test_a_memory_is_saved_loaded_and_shown_its_video(visit, tmp_path):
    visitor = visit()
    visitor.open_example()
    answer = visitor.ask(NEEDLE["question"])
    with visitor.page.expect_download() as download:
        visitor.page.click("#mm-save a")
    assert download.value.suggested_filename == "needle.mp4.safetensors"
    memory = tmp_path / "needle.mp4.safetensors"
    download.value.save_as(memory)

    other = visit()
    other.upload("#mm-upload", memory)
    other.page.wait_for_selector(".mm-strip")
    assert other.page.locator("#mm-player video").count() == 0
    assert other.ask(NEEDLE["question"]) == answer
    other.upload("#mm-its-video", write_video(tmp_path / "other.mp4", num_frames=16, fps=2))
    assert "other.mp4 lasts 0:08" in other.alert()
    other.upload("#mm-its-video", VIDEO)
    other.page.wait_for_selector("#mm-player video")
    other.page.locator(".mm-strip a").nth(5).click()
    assert other.player_time() > 1

    model, processor = tiny_checkpoint(tmp_path / "model")
    model.encode_video(VIDEO, processor, num_frames=8).save(tmp_path / "foreign.safetensors")
    third = visit()
    third.upload("#mm-upload", tmp_path / "foreign.safetensors")
    assert "another model" in third.alert()


def test_two_visitors_at_once_see_their_own(visit, tmp_path):
    first, second = visit(), visit()
    numbers = write_video(tmp_path / "numbers.mp4", num_frames=16, fps=2)
    first.page.set_input_files("#mm-upload input[type=file]", VIDEO)
    second.page.set_input_files("#mm-upload input[type=file]", numbers)
    for visitor, name in ((first, "needle.mp4"), (second, "numbers.mp4")):
        visitor.page.wait_for_selector(".mm-strip")
        assert name in visitor.status()
    for visitor in (first, second):
        visitor.page.fill("#mm-question textarea", NEEDLE["question"])
        visitor.page.press("#mm-question textarea", "Enter")
    for visitor in (first, second):
        visitor.page.get_by_text("Looked most at").wait_for()
    assert first.page.locator("#mm-chat .bot.message").inner_text().strip().startswith(NEEDLE["answer"])
    sources = {visitor.page.get_attribute("#mm-player video", "src") for visitor in (first, second)}
    assert len(sources) == 2


def test_a_phone_scrolls_in_one_direction_only(visit):
    visitor = visit(viewport=PHONE, has_touch=True, is_mobile=True)
    assert not visitor.is_wider_than_its_window()
    visitor.open_example()
    visitor.ask(NEEDLE["question"])
    assert not visitor.is_wider_than_its_window()
    visitor.page.locator(".mm-strip a").nth(2).tap()
    assert visitor.player_time() > 1


def test_the_browser_is_told_to_fetch_nothing_from_elsewhere(visit):
    visitor = visit()
    blocked = visitor.page.evaluate(
        """() => new Promise(done => {
            addEventListener("securitypolicyviolation", event => done(event.blockedURI));
            fetch("http://127.0.0.2:1/").catch(() => {});
        })"""
    )
    assert blocked.startswith("http://127.0.0.2:1")
    visitor.requests[:] = [url for url in visitor.requests if "127.0.0.2" not in url]


def test_other_names_of_this_machine_are_refused(address):
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(urllib.request.Request(address, headers={"Host": "elsewhere.example"}))
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{address}/media/guessed")


def test_parts_of_a_video_are_served(visit, address):
    visitor = visit()
    visitor.open_example()
    source = visitor.page.get_attribute("#mm-player video", "src")
    request = urllib.request.Request(f"{address}/{source}", headers={"Range": "bytes=10-19"})
    with urllib.request.urlopen(request) as response:
        assert (response.status, response.read()) == (206, VIDEO.read_bytes()[10:20])

"""The page for a model in a real browser and by plain requests; a stand-in for the model."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from tests.browser import Page, find_browser, open_browser
from tests.fake_predictor import COLORS
from tests.scripts import REPO, environment

pytest.importorskip("gradio", reason="requirements-web.txt is not installed")
with_browser = pytest.mark.skipif(
    find_browser() is None, reason="no chromium or google-chrome on PATH"
)

FILE = {"_type": "gradio.FileData"}  # how Gradio marks a file in a message
RED_BOX = 100 * 90
NAME = socket.gethostname()


@dataclass
class Server:
    """A running page."""

    port: int
    process: subprocess.Popen[str]
    log: Path
    folder: Path

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def asked(self) -> list[str]:
        """Expressions that the model was run with."""
        return [
            line.removeprefix("asked for ")
            for line in self.log.read_text().splitlines()
            if line.startswith("asked for ")
        ]

    def get(self, path: str, data: Any = None) -> tuple[int, str]:
        """Status and text of a GET, or of a POST of JSON; the path is sent as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            body = None if data is None else json.dumps(data)
            head = {"Content-Type": "application/json"} if body else {}
            connection.request("POST" if body else "GET", path, body, head)
            reply = connection.getresponse()
            return reply.status, reply.read().decode("utf-8", "replace")

    def press(self, event: int, data: list[Any], session: str = "") -> dict[str, Any]:
        """What a button of the page answers."""
        session = session or uuid.uuid4().hex
        message = {"data": data, "fn_index": event, "session_hash": session}
        status, text = self.get("/gradio_api/queue/join", message)
        if status != 200:
            return {"status": status, "error": text}
        _, lines = self.get(f"/gradio_api/queue/data?session_hash={session}")
        messages = [json.loads(line[5:]) for line in lines.splitlines() if line[:5] == "data:"]
        return next(m["output"] for m in messages if m["msg"] == "process_completed")

    def event(self, name: str = "segment") -> int:
        """The number of an event, of the page's main button."""
        events = json.loads(self.get("/config")[1])["dependencies"]
        return next(e["id"] for e in events if e["api_name"] == name)


def draw_boxes(path: Path, size: tuple[int, int] = (400, 300)) -> Path:
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    pen.rectangle((20, 30, 119, 119), fill=COLORS["red"])
    pen.rectangle((250, 150, 309, 249), fill=COLORS["blue"])
    pen.rectangle((300, 20, 339, 59), fill=COLORS["green"])
    image.save(path)
    return path


@contextlib.contextmanager
def serving(folder: Path, *argv: str) -> Iterator[Server]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    draw_boxes(folder / "boxes.png")
    (folder / "examples.json").write_text(
        json.dumps([{"image": "boxes.png", "sentence": ["green box", "blue box"]}])
    )
    (folder / "temp").mkdir()
    command = [sys.executable, "-m", "tests.fake_predictor", "--port", str(port)]
    log = folder / "log.txt"
    with log.open("w") as to:
        process = subprocess.Popen(
            [*command, "--examples", str(folder / "examples.json"), *argv],
            cwd=REPO,
            # A proxy that nobody runs: the page asks nothing of the outside.
            env=environment() | {"TMPDIR": str(folder / "temp"), "HTTP_PROXY": "http://0.0.0.0:9"},
            stdout=to,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:
        end = time.monotonic() + 120
        while "open http" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        yield Server(port, process, log, folder)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(
        tmp_path_factory.mktemp("web"), "--resume", "x", "--max_pixels", "1000000"
    ) as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with open_browser(tmp_path_factory.mktemp("profile")) as page:
        page.look(1280, 900)
        yield page


@pytest.fixture
def page(browser: Page, server: Server) -> Iterator[Page]:
    """The page, freshly loaded; nothing but its server may be asked for anything."""
    browser.requests.clear()
    start(browser, server)
    yield browser
    outside = [url for url in browser.requests if not url.startswith((server.address, "blob:"))]
    assert outside == []
    assert len(browser.requests) > 5
    assert browser.run("window.hacked === undefined")


def start(page: Page, server: Server) -> None:
    page.call("Page.navigate", url="about:blank")
    page.visit(server.address)
    page.wait("document.querySelector('#image input[type=file]')")


def upload(page: Page, path: Path) -> None:
    page.choose_file("#image input[type=file]", path)
    page.wait("document.querySelector('#image img')")


def captions(page: Page, gallery: str = "masks") -> list[str]:
    return page.run(
        f"[...document.querySelectorAll('#{gallery} .caption-label')].map((e) => e.innerText)"
    )


def segment(page: Page, text: str, count: int) -> list[str]:
    """Type expressions, press the button, wait for so many overlays; their captions."""
    page.type("#expressions textarea", text)
    page.click("#segment")
    page.wait(f"document.querySelectorAll('#masks .caption-label').length === {count}")
    return captions(page)


def note(page: Page, part: str) -> str:
    """The page's message, once it has a part."""
    page.wait(f"document.querySelector('#notes').innerText.includes({json.dumps(part)})")
    return page.run("document.querySelector('#notes').innerText")


def move_threshold(page: Page, to: float) -> None:
    page.run(
        "(() => { const e = document.querySelector('#threshold input[type=range]');"
        f"e.value = {to}; e.dispatchEvent(new Event('input', {{bubbles: true}})); }})()"
    )


def open_tab(page: Page, name: str) -> None:
    page.run(
        "[...document.querySelectorAll('button[role=tab]')]"
        f".find((b) => b.textContent.trim() === '{name}').click()"
    )


@with_browser
def test_an_image_and_expressions_give_overlays(page: Page, server: Server) -> None:
    upload(page, server.folder / "boxes.png")
    hostile = '<img src=x onerror="window.hacked = 1"> ![x](http://outside.invalid/x.png)'
    shown = segment(page, f"the red box\nblue\n{hostile}", 3)
    assert shown[0] == "the red box\nscore 0.90 · 7.5 % of the image"
    assert shown[1].startswith("blue\n")
    assert shown[2] == f"{hostile}\nnothing found"
    assert hostile in note(page, "Nothing found")
    loaded = "[...document.querySelectorAll('#masks img')].every((i) => i.naturalWidth === 400)"
    page.wait(loaded)
    open_tab(page, "Probability")
    page.wait("document.querySelectorAll('#maps img').length === 3")
    assert captions(page, "maps")[0] == "the red box"


@with_browser
def test_the_threshold_redraws_without_the_model(page: Page, server: Server) -> None:
    upload(page, server.folder / "boxes.png")
    before = segment(page, "red one", 1)
    asked = server.asked()
    move_threshold(page, 0.05)
    page.wait(
        "document.querySelector('#masks .caption-label').innerText.includes('100.0 % of the image')"
    )
    move_threshold(page, 0.95)
    note(page, "Nothing found for “red one” at threshold 0.95.")
    move_threshold(page, 0.5)
    page.wait("document.querySelector('#masks .caption-label').innerText.includes('7.5 %')")
    assert captions(page) == before
    assert server.asked() == asked
    # Its box takes numbers that the slider does not pass on, so that both would disagree.
    assert page.run("document.querySelector('#threshold input[type=number]').offsetWidth") == 0
    page.run("document.querySelector('#threshold input[type=range]').focus()")
    for _ in range(60):
        page.key("ArrowRight")
    page.wait("document.querySelector('#threshold').innerText.includes('probability: 0.99')")
    assert "nothing found" in captions(page)[0]


@with_browser
def test_the_last_press_counts(page: Page, server: Server) -> None:
    upload(page, server.folder / "boxes.png")
    page.type("#expressions textarea", "red\nred one\nred two")
    page.click("#segment")
    page.type("#expressions textarea", "blue")
    move_threshold(page, 0.05)
    page.click("#segment")
    page.wait("document.querySelector('#masks .caption-label')?.innerText.startsWith('blue')")
    assert [text.split(" · ")[1] for text in captions(page)] == ["100.0 % of the image"]


@with_browser
def test_another_image_clears_the_results(page: Page, server: Server) -> None:
    upload(page, server.folder / "boxes.png")
    segment(page, "red", 1)
    page.type("#expressions textarea", "red\nblue\ngreen")
    assert len(captions(page)) == 1
    page.click("#segment")
    page.click('#image button[title="Remove Image"]')
    page.wait("document.querySelector('#image input[type=file]')")
    page.wait("!document.querySelector('#masks .caption-label')")
    end = time.monotonic() + 60
    while "green" not in server.asked()[-1]:  # the running press is for the image before
        assert time.monotonic() < end
        time.sleep(0.05)
    time.sleep(0.5)
    assert captions(page) == []


@with_browser
def test_an_example_works_at_the_first_click(page: Page) -> None:
    page.wait("document.querySelector('#examples button')")
    page.click("#examples button")
    page.wait("document.querySelectorAll('#masks .caption-label').length === 2")
    assert [text.split("\n")[0] for text in captions(page)] == ["green box", "blue box"]
    assert page.run("document.querySelector('#expressions textarea').value") == (
        "green box\nblue box"
    )


@with_browser
def test_messages_are_clear(page: Page, server: Server) -> None:
    page.click("#segment")
    note(page, "No image: drop one, paste one, or choose an example.")
    upload(page, server.folder / "boxes.png")
    page.click("#segment")
    note(page, "No expression")
    page.type("#expressions textarea", "\n".join(map(str, range(17))))
    page.click("#segment")
    note(page, "17 expressions: at most 16 at once.")
    segment(page, "the red box that is on the left", 1)
    note(page, "Only the first 6 tokens of")


@with_browser
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fake.jpg", "fake.jpg is not an image"),
        ("large.png", "large.png has 1200x900 pixels: at most 1,000,000 are taken here"),
    ],
)
def test_bad_files_are_named(page: Page, server: Server, name: str, message: str) -> None:
    (server.folder / "fake.jpg").write_text("no image at all")
    draw_boxes(server.folder / "large.png", (1200, 900))
    upload(page, server.folder / name)
    page.type("#expressions textarea", "red")
    page.click("#segment")
    assert str(server.folder) not in note(page, message)


@with_browser
def test_two_visitors_get_their_own_results(page: Page, server: Server, tmp_path: Path) -> None:
    with open_browser(tmp_path / "second") as other:
        start(other, server)
        for visitor in (page, other):
            upload(visitor, server.folder / "boxes.png")
        page.type("#expressions textarea", "red\nred one\nred two")
        other.type("#expressions textarea", "blue\nblue one")
        page.click("#segment")
        other.click("#segment")
        for visitor, count in ((page, 3), (other, 2)):
            visitor.wait(f"document.querySelectorAll('#masks .caption-label').length === {count}")
        assert all(text.startswith("red") for text in captions(page))
        assert all(text.startswith("blue") for text in captions(other))
        move_threshold(other, 0.95)
        note(other, "Nothing found for “blue”")
        assert "7.5 %" in captions(page)[0]


@with_browser
def test_files_are_written_at_the_threshold(page: Page, server: Server) -> None:
    upload(page, server.folder / "boxes.png")
    segment(page, "the red box", 1)
    open_tab(page, "Files")
    page.click("#write-files")
    page.wait("document.querySelectorAll('#files a[download]').length >= 2")
    links = page.run("[...document.querySelectorAll('#files a[download]')].map((a) => a.href)")
    content = {}
    for link in links:
        with urllib.request.urlopen(link) as reply:
            content[Path(urllib.parse.urlparse(link).path).name] = reply.read()
    (server.folder / "mask.png").write_bytes(content["boxes_the-red-box.mask.png"])
    mask = np.asarray(Image.open(server.folder / "mask.png"))
    assert int((mask == 255).sum()) == RED_BOX
    rle = json.loads(content["boxes_the-red-box.rle.json"])
    assert np.array_equal(coco_mask.decode(rle) * 255, mask)


@with_browser
def test_attention_is_drawn_on_demand(page: Page, server: Server) -> None:
    upload(page, server.folder / "boxes.png")
    segment(page, "the red box\nblue", 2)
    open_tab(page, "Attention")
    page.click("#show-attention")
    page.wait("document.querySelector('#attention img')?.naturalWidth === 300")


def upload_by_request(server: Server, name: str, content: bytes) -> str:
    """Where an upload lies on the server."""
    body = (
        f'--b\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    ).encode() + content + b"\r\n--b--\r\n"  # fmt: skip
    request = urllib.request.Request(
        server.address + "gradio_api/upload",
        body,
        {"Content-Type": "multipart/form-data; boundary=b"},
    )
    with urllib.request.urlopen(request) as reply:
        return json.loads(reply.read())[0]


def test_an_upload_by_request_is_segmented(server: Server) -> None:
    """So that the refusals below are about the path, not about the message."""
    content = (server.folder / "boxes.png").read_bytes()
    path = upload_by_request(server, "../../evil.png", content)
    assert Path(path).is_relative_to(server.folder / "temp")
    given = {"path": path, "meta": FILE}
    session = uuid.uuid4().hex
    server.press(server.event(), [given, "red"], session)
    for threshold, note in ((0.5, ""), (0.95, "Nothing found")):
        answer = server.press(server.event("finish"), [None, given, threshold], session)
        assert answer["data"][1][0]["caption"].startswith("red\n")
        assert note in answer["data"][5]
    assert server.get(f"/gradio_api/file={path}")[0] == 200


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    """Gradio would keep its name, fail to delete it, and delete nothing after that."""
    with serving(tmp_path, "--resume", "x") as server:
        inside = str(next((tmp_path / "temp").glob("page-*")))
        for path in (inside, f"{inside}/scenes/..", "/etc/passwd"):
            given = {"path": path, "meta": FILE}
            answer = server.press(server.event(), [given, "red"])
            assert answer["error"].startswith("No such upload")
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(30) == 0
        assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("meta", [{"meta": FILE}, {}, {"meta": {}}, {"meta": FILE, "url": "x"}])
def test_no_message_names_a_file_of_the_server(server: Server, meta: dict[str, Any]) -> None:
    image = server.folder / "boxes.png"  # would be segmented, were it read
    asked = server.asked()
    inside = next((server.folder / "temp").glob("page-*"))
    paths = [image, "/etc/passwd", inside, f"{inside}/../../boxes.png", f"file://{image}"]
    paths += ["http://127.0.0.1:1/x.png", "https://example.com/x.png", "README.md"]
    for path in paths:
        given = {"path": str(path)} | meta
        answer = server.press(server.event(), [given, "red"])
        assert "data" not in answer or "No image" in answer["data"][1], path
        assert "root:" not in json.dumps(answer)
    given = {"path": "http://127.0.0.1:1/x.png", "meta": FILE}
    assert "data" not in server.press(server.event(), [None, given])
    assert server.asked() == asked


def test_the_queue_cannot_be_passed_by(server: Server) -> None:
    events = json.loads(server.get("/config")[1])["dependencies"]
    for event in events:
        if event["api_name"] != "load_example":
            message = {"data": [None] * len(event["inputs"]), "fn_index": event["id"]}
            assert server.get("/gradio_api/run/predict", message)[0] == 404, event["api_name"]


def test_addresses_are_never_fetched(server: Server) -> None:
    given = {"path": "https://example.com/x.png", "meta": FILE}
    answer = server.press(server.event(), [given, "red"])
    assert answer["error"] == "addresses are not fetched: upload the image"


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file={folder}/boxes.png",
        "/gradio_api/file={folder}/temp/../boxes.png",
        "/gradio_api/file={folder}/temp/%2e%2e/boxes.png",
        "/gradio_api/file=README.md",
        "/gradio_api/file=http://example.com/",
        "/gradio_api/file/etc/passwd",
        "/gradio_api/proxy=http://example.com/",
        "/static/..%2f..%2froutes.py",
        "/assets/..%2f..%2f..%2froutes.py",
        "/assets//etc/passwd",
        "/gradio_api/info",
        "/gradio_api/run/segment",
        "/gradio_api/call/segment",
        "/gradio_api/api/segment",
        "/docs",
        "/openapi.json",
        "/monitoring",
        "/gradio_api/runs",
    ],
)
def test_what_the_page_does_not_ask_for_is_refused(server: Server, path: str) -> None:
    path = path.format(folder=server.folder)
    for data in (None, {"data": [None, "red", 0.5]}):
        assert server.get(path, data)[0] in (403, 404, 405)


def test_another_name_of_the_machine_is_refused(server: Server) -> None:
    """It may be a website's, whose scripts would then reach the page."""
    for host, status in (("evil.example", 400), (f"localhost:{server.port}", 200)):
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port)) as connection:
            connection.request("GET", "/", headers={"Host": host})
            assert connection.getresponse().status == status


def test_ctrl_c_ends_quietly_and_leaves_no_files(tmp_path: Path) -> None:
    """Even while the model runs, which ended in an abort."""
    with serving(tmp_path, "--resume", "x") as server:
        path = upload_by_request(server, "x.png", (tmp_path / "boxes.png").read_bytes())
        assert list((tmp_path / "temp").iterdir())
        data = [{"path": path, "meta": FILE}, "\n".join(map(str, range(16)))]
        message = {"data": data, "fn_index": server.event(), "session_hash": "s"}
        assert server.get("/gradio_api/queue/join", message)[0] == 200
        while not server.asked():
            time.sleep(0.05)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(30) == 0
        opened, *rest = server.log.read_text().splitlines()
        assert opened == f"open {server.address} in a browser; Ctrl-C ends it"
        assert all(line.startswith("asked for") for line in rest)
        assert not list((tmp_path / "temp").iterdir())


@pytest.mark.parametrize(
    ("host", "opened"),
    [("::1", "open http://[::1]:"), ("0.0.0.0", f"from other machines, http://{NAME}:")],
)
def test_other_hosts_and_a_free_port(tmp_path: Path, host: str, opened: str) -> None:
    with serving(tmp_path, "--resume", "x", "--host", host, "--port", "0") as server:
        assert opened in server.log.read_text()


@with_browser
def test_examples_without_expressions_give_the_image_alone(tmp_path: Path, browser: Page) -> None:
    (tmp_path / "images").mkdir()
    draw_boxes(tmp_path / "images" / "boxes.png")
    with serving(tmp_path, "--resume", "x", "--examples", str(tmp_path / "images")) as server:
        start(browser, server)
        browser.type("#expressions textarea", "red")
        browser.wait("document.querySelector('#examples button')")
        browser.click("#examples button")
        browser.wait("document.querySelector('#image img')")
        assert segment(browser, "red", 1)[0].startswith("red")
        assert browser.run("document.querySelector('#notes').innerText").strip() == ""

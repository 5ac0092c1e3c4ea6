"""Drive a real browser (Chromium) from tests through its DevTools pipe; no other package needed."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # containers run as root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--force-color-profile=srgb",
    "--remote-debugging-pipe",
)
TIMEOUT = 60.0  # seconds until an answer


def find_browser() -> str | None:
    """Chromium's or Chrome's command, None where there is none on PATH."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Page:
    """A tab.

    Attributes:
        problems: uncaught errors, console messages of warnings and errors, blocked requests.
        requests: addresses that the page asked for, other than data: and its own.
    """

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._rest = b""
        self._number = 0
        self._session: str | None = None
        self.problems: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the DevTools protocol, and its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        packed = json.dumps(message).encode() + b"\0"
        while packed:
            packed = packed[os.write(self._to, packed) :]
        while True:
            reply = self._read()
            if reply.get("id") == self._number:
                assert "error" not in reply, f"{method}: {reply['error']}"
                return reply["result"]
            self._note(reply)

    def _read(self) -> dict[str, Any]:
        end = time.monotonic() + TIMEOUT
        while b"\0" not in self._rest:
            ready = select.select([self._from], [], [], max(0.0, end - time.monotonic()))[0]
            part = os.read(self._from, 1 << 20) if ready else b""
            assert part, "the browser does not answer"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(params["exceptionDetails"])[:500])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.problems.append(json.dumps(params["args"])[:500])
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent" and params["type"] != "Document":
            url = params["request"]["url"]
            self.requests += [] if url.startswith("data:") else [url]

    def open(self, path: Path) -> None:
        """Load a file and wait until its scripts have run."""
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")

    def visit(self, address: str) -> None:
        """Load a page of a server."""
        self.call("Page.navigate", url=address)
        self.wait(f"location.href.startsWith({json.dumps(address)})")

    def choose_file(self, selector: str, path: Path) -> None:
        """Give a file to an input of files."""
        document = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=document, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def run(self, script: str) -> Any:
        """Value of a JavaScript expression; a promise's, once it is kept."""
        result = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until a JavaScript expression is true."""
        end = time.monotonic() + TIMEOUT
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < end, f"never true: {condition}"
            time.sleep(0.02)

    def click(self, selector: str) -> None:
        """Press the mouse where the first such element is, once it is there and at rest.

        A page that is still laying itself out moves its buttons away from under the mouse.
        """
        where = (
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "if (!e) return null; e.scrollIntoView({block: 'center', behavior: 'instant'});"
            "const r = e.getBoundingClientRect();"
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        self.wait(f"document.querySelector({json.dumps(selector)})")
        before, place = None, self.run(where)
        while place is None or place != before:
            time.sleep(0.05)
            before, place = place, self.run(where)
        x, y = place
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, selector: str, text: str) -> None:
        """Replace the text of a field, as a keyboard would."""
        self.click(selector)
        self.run(f"document.querySelector({json.dumps(selector)}).select()")
        if text:
            self.call("Input.insertText", text=text)
        else:
            self.key("Backspace", 8)

    def key(self, name: str, code: int = 0) -> None:
        """Press and release a key: 'ArrowLeft', 'Escape', or a letter."""
        more = {"text": name} if len(name) == 1 else {}
        number = code or {"Escape": 27, "ArrowLeft": 37, "ArrowRight": 39}.get(name, 0)
        for kind in ("keyDown", "keyUp"):
            params = {"key": name, "windowsVirtualKeyCode": number} | (
                more if kind == "keyDown" else {}
            )
            self.call("Input.dispatchKeyEvent", type=kind, **params)

    def look(self, width: int, height: int, dark: bool = False, scale: float = 1) -> None:
        """Set the window's size in CSS pixels, and light or dark mode."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """Write a PNG of the window, or of the whole page."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def open_browser(profile: Path) -> Iterator[Page]:
    """A browser of its own, with an empty tab.

    Args:
        profile: an empty folder for it.
    """
    command = find_browser()
    assert command, "no browser on PATH"
    ends = [*os.pipe(), *os.pipe()]
    # Out of the way of 3 and 4, which the browser wants its ends of the pipes to be.
    high = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in ends]
    for end in ends:
        os.close(end)
    browser_in, to_browser, from_browser, browser_out = high

    def place_ends() -> None:
        os.dup2(browser_in, 3)
        os.dup2(browser_out, 4)

    process = subprocess.Popen(
        [command, *FLAGS, f"--user-data-dir={profile}"],
        preexec_fn=place_ends,
        pass_fds=(3, 4),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(browser_in)
    os.close(browser_out)
    try:
        yield Page(to_browser, from_browser)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(to_browser)
        os.close(from_browser)

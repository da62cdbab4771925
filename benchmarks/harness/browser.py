"""A real Chromium, driven over a pipe by the DevTools protocol: no library, no port, no network but the page's own."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
#: Longest time that anything asked of the browser may take.
PATIENCE_S = 60.0


class BrowserError(Exception):
    """The browser answered with an error, or what was waited for did not come."""


class Browser:
    """One window of a browser.

    Attributes:
        console: errors and warnings of pages, and what their policies forbade.
    """

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._buffer = b""
        self._count = 0
        self._loaded = 0
        self.console: list[str] = []
        target = self._send("Target.createTarget", {"url": "about:blank"}, session=None)["targetId"]
        attached = self._send("Target.attachToTarget", {"targetId": target, "flatten": True}, session=None)
        self._session = str(attached["sessionId"])
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **arguments: Any) -> Any:
        """A command of the DevTools protocol, and its result."""
        return self._send(method, arguments, session=self._session)

    def open(self, url: str) -> None:
        """Load a page and wait until it stands."""
        before = self._loaded
        answer = self.call("Page.navigate", url=url)
        if answer.get("errorText"):
            raise BrowserError(f"{url}: {answer['errorText']}")
        self._until(lambda: self._loaded > before, f"loading {url}")

    def following(self, action: Callable[[], Any]) -> None:
        """Do something that leads to another page, and wait until that stands."""
        before = self._loaded
        action()
        self._until(lambda: self._loaded > before, "the next page")

    def run(self, script: str) -> Any:
        """The value of a script's last expression; a promise is waited for."""
        answer = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True
        )
        if "exceptionDetails" in answer:
            raise BrowserError(str(answer["exceptionDetails"])[:2000])
        return answer["result"].get("value")

    def wait_for(self, script: str) -> Any:
        """Wait until a script's value is true, and return it."""
        until_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < until_s:
            found = self.run(script)
            if found:
                return found
            time.sleep(0.05)
        raise BrowserError(f"waited {PATIENCE_S:.0f} s in vain for {script}")

    def type(self, selector: str, text: str) -> None:
        """Type into a field, as a keyboard does."""
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        """Press a key that types nothing, or Enter."""
        text = {"text": "\r"} if key == "Enter" else {}
        code = {"Enter": 13, "Tab": 9}.get(key, 0)
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                **(text if kind == "keyDown" else {}),
            )

    def screen(self, width: int, height: int, *, dark: bool = False, phone: bool = False) -> None:
        """Look at pages on a screen of this size, in light or in dark."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=phone,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, path: Path) -> None:
        """Write what the screen shows as PNG."""
        answer = self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(answer["data"]))

    def _send(self, method: str, arguments: dict[str, Any], *, session: str | None) -> Any:
        self._count += 1
        number = self._count
        message = {"id": number, "method": method, "params": arguments}
        if session is not None:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        while True:
            answer = self._receive(f"an answer to {method}")
            if answer.get("id") == number:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error']}")
                return answer["result"]

    def _until(self, is_so: Callable[[], bool], what: str) -> None:
        while not is_so():
            self._receive(what)

    def _receive(self, what: str) -> dict[str, Any]:
        """The next message; events are taken note of."""
        until_s = time.monotonic() + PATIENCE_S
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], max(0.0, until_s - time.monotonic()))
            piece = os.read(self._from, 1 << 20) if ready else b""
            if not piece:
                raise BrowserError(f"the browser gave no sign for {PATIENCE_S:.0f} s, waiting for {what}")
            self._buffer += piece
        data, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(data)
        match message.get("method"):
            case "Page.loadEventFired":
                self._loaded += 1
            case "Log.entryAdded":
                entry = message["params"]["entry"]
                self.console.append(f"{entry['level']}: {entry['text']} {entry.get('url', '')}")
            case "Runtime.exceptionThrown":
                self.console.append(str(message["params"]["exceptionDetails"])[:1000])
        return message


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser with a fresh profile.

    Raises:
        BrowserError: there is none on this machine.
    """
    if CHROMIUM is None:
        raise BrowserError("no Chromium on this machine (Debian: apt-get install chromium)")
    their_in, our_out = os.pipe()
    our_in, their_out = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
            *("--hide-scrollbars", "--remote-debugging-pipe", f"--user-data-dir={profile}"),
        ]
        # The protocol's pipes are the third and fourth descriptor of the browser.
        shell = 'exec 3<&"$0" 4>&"$1"; shift; exec "$@"'
        process = subprocess.Popen(
            ["bash", "-c", shell, str(their_in), str(their_out), *command],
            pass_fds=(their_in, their_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(their_in)
        os.close(their_out)
        try:
            yield Browser(our_out, our_in)
        finally:
            os.close(our_out)
            os.close(our_in)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

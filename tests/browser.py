"""A headless Chromium for tests that look at pages: what they show, and what they complain of."""

import base64
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.sync.client import ClientConnection, connect

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-port=0",
    "--window-size=1400,1000",
)  # fmt: skip

needs_chromium = pytest.mark.skipif(
    shutil.which("chromium") is None, reason="chromium is not here: install Debian's package chromium"
)


class Page:
    """The browser's one page, over the DevTools protocol."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._numbers = socket, itertools.count(1)
        self.errors: list[str] = []
        """What the page's console has said in anger."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                result: dict[str, Any] = message["result"]
                return result
            self._hear(message)

    def _hear(self, event: dict[str, Any]) -> None:
        told = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(told["exceptionDetails"].get("text")))
        elif event.get("method") == "Runtime.consoleAPICalled" and told["type"] == "error":
            self.errors.append(str([each.get("value", each.get("description")) for each in told["args"]]))
        elif event.get("method") == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.errors.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def evaluate(self, script: str) -> Any:
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def text(self) -> str:
        return str(self.evaluate("document.body ? document.body.innerText : ''"))

    def wait_for(self, *texts: str, limit_s: float = 60.0) -> str:
        """Wait until the page shows all of them; returns all that it shows."""
        deadline_s = time.monotonic() + limit_s
        while any(text not in (shown := self.text()) for text in texts):
            assert time.monotonic() < deadline_s, f"the page does not show {texts}:\n{shown[:3000]}"
            time.sleep(0.3)
        return shown

    def picture(self, path: Path) -> None:
        taken = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(taken["data"]))


@contextmanager
def chromium(folder: Path) -> Iterator[Page]:
    """A browser that knows nothing, with an empty page.

    Args:
        folder: Of its own, empty.
    """
    process = subprocess.Popen(
        ["chromium", *FLAGS, f"--user-data-dir={folder}", "about:blank"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        with connect(_address(folder, process), max_size=1 << 28) as socket:
            yield Page(socket)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def _address(folder: Path, process: "subprocess.Popen[bytes]") -> str:
    file, deadline_s = folder / "DevToolsActivePort", time.monotonic() + 60
    while not file.exists() or not file.read_text():
        assert process.poll() is None, "chromium has ended"
        assert time.monotonic() < deadline_s, "chromium does not come up"
        time.sleep(0.1)
    port = file.read_text().split()[0]
    pages = httpx.get(f"http://127.0.0.1:{port}/json/list").json()
    address: str = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
    return address

"""A real browser, driven by WebDriver's protocol: Chromium without a window.

`python -m tests.wrap.browser OUT PICTURE` opens the page that `examples/web/make.py` wrote to OUT, and saves a picture of it once
it has drawn its digits.
"""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

#: No window, and nothing that is not the page's: no updates, no accounts, no requests in the background.
_FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
          "--disable-background-networking", "--disable-component-update", "--disable-sync",
          "--window-size=1080,850"]  # fmt: skip

#: Seconds that a page, or the browser's start, may take.
_PATIENCE = 120.0


def missing() -> list[str]:
    """Which programs are not installed."""
    return [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]


class Browser:
    """One page of a browser."""

    def __init__(self, url: str) -> None:
        self._url = url

    def open(self, address: str) -> None:
        """Load a page."""
        self._ask("POST", "/url", {"url": address})

    def run(self, script: str) -> Any:
        """What a script returns, where it returns a promise once that is kept.

        Raises:
            RuntimeError: it throws, or the promise is broken.
        """
        return self._ask("POST", "/execute/sync", {"script": script, "args": []})

    def messages(self) -> list[str]:
        """Errors that the page has written to its console since they were last asked for."""
        found = self._ask("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in found if entry["level"] == "SEVERE"]

    def picture(self) -> bytes:
        """The page as a PNG file."""
        return base64.b64decode(self._ask("GET", "/screenshot"))

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        return _ask(method, self._url + path, body)


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A browser that knows nothing of an earlier one."""
    port = _free_port()
    with tempfile.TemporaryDirectory() as profile:
        driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL)
        try:
            flags = [*_FLAGS, f"--user-data-dir={profile}"]
            options = {"goog:chromeOptions": {"args": flags, "binary": shutil.which("chromium")},
                       "goog:loggingPrefs": {"browser": "SEVERE"},
                       "timeouts": {"script": 1000 * _PATIENCE, "pageLoad": 1000 * _PATIENCE}}  # fmt: skip
            _wait(f"http://127.0.0.1:{port}/status")
            server = f"http://127.0.0.1:{port}/session"
            session = _ask("POST", server, {"capabilities": {"alwaysMatch": options}})
            url = f"{server}/{session['sessionId']}"
            try:
                yield Browser(url)
            finally:
                _ask("DELETE", url)
        finally:
            driver.terminate()
            driver.wait()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """A folder's address, as `python -m http.server` gives it."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


#: Nothing between here and the driver: it is on this machine.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _ask(method: str, url: str, body: Any = None) -> Any:
    data = None if method == "GET" else json.dumps({} if body is None else body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with _OPENER.open(request, timeout=2 * _PATIENCE) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise RuntimeError(json.load(error)["value"]["message"].splitlines()[0]) from None


def _wait(url: str) -> None:
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            if _ask("GET", url)["ready"]:
                return
        except urllib.error.URLError:
            if time.monotonic() > end:
                raise
        time.sleep(0.1)


def main(out: str, picture: str) -> None:
    with served(Path(out)) as address, browser() as page:
        page.open(address)
        page.run("return window.results.then(() => true)")
        Path(picture).write_bytes(page.picture())


if __name__ == "__main__":
    main(*sys.argv[1:])

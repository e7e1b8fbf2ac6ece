"""A real browser for tests: headless Chromium by chromedriver's HTTP protocol; nothing but the standard library."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

_CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def missing() -> str | None:
    """Why no browser can be driven here, or ``None`` when one can."""
    if not any(map(shutil.which, _CHROMIUM)):
        return "no Chromium here (Debian: apt-get install chromium chromium-driver)"
    return None if shutil.which("chromedriver") else "no chromedriver here (Debian: apt-get install chromium-driver)"


class Browser:
    """One session; entered, it runs.

    Nothing is fetched from elsewhere even if a page asked for it: every host name resolves to nowhere.
    """

    def __enter__(self) -> Browser:
        self._scratch = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        environment = {**os.environ, "HOME": self._scratch.name, "TMPDIR": self._scratch.name}
        command = [str(shutil.which("chromedriver")), "--port=0"]
        self._driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        try:
            self._address = f"http://127.0.0.1:{self._port()}/session"
            binary = next(filter(None, map(shutil.which, _CHROMIUM)))
            flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                     "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
                     f"--user-data-dir={self._scratch.name}/profile"]  # fmt: skip
            options = {"binary": binary, "args": flags}
            capabilities = {"browserName": "chrome", "goog:chromeOptions": options}
            session = self._call("POST", "", {"capabilities": {"alwaysMatch": capabilities}})["sessionId"]
        except BaseException:
            self._stop()
            raise
        self._address += f"/{session}"
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._call("DELETE", "")
        finally:
            self._stop()

    def _stop(self) -> None:
        self._driver.terminate()
        self._driver.wait(20)
        assert self._driver.stdout
        self._driver.stdout.close()
        self._scratch.cleanup()

    def _port(self) -> int:
        assert self._driver.stdout
        for line in self._driver.stdout:
            if found := re.search(r"started successfully on port (\d+)", line):
                return int(found[1])
        raise RuntimeError("chromedriver did not start")

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if method == "DELETE" else json.dumps(body or {}).encode()
        request = Request(self._address + path, data, {"Content-Type": "application/json"}, method=method)
        with urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def _devtools(self, command: str, **parameters: Any) -> Any:
        return self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def open(self, page: Path, width: int, height: int = 900, *, dark: bool = False) -> None:
        """Load a page from disk in a window of this size (CSS pixels), for eyes that prefer light or dark."""
        phone = width < 700
        self._devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._devtools("Emulation.setEmulatedMedia", features=[scheme])
        self._call("POST", "/url", {"url": page.absolute().as_uri()})

    def ask(self, script: str) -> Any:
        """What a script in the page returns."""
        return self._call("POST", "/execute/sync", {"script": script, "args": []})

    def screenshot(self) -> bytes:
        """The whole page as PNG, however long."""
        return base64.b64decode(
            self._devtools("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        )

    def pdf(self) -> bytes:
        """The page as it prints on A4."""
        options = {"paperWidth": 8.27, "paperHeight": 11.69, "printBackground": True, "preferCSSPageSize": True}
        return base64.b64decode(self._devtools("Page.printToPDF", **options)["data"])

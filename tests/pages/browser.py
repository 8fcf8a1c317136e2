"""A headless Chromium for tests of pages, told what to do through a pipe."""

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any


class Browser:
    """A headless Chromium, told what to do through a pipe (DevTools protocol)."""

    def __init__(self, program: str, profile: Path) -> None:
        (to_read, self._to), (self._from, to_write) = os.pipe(), os.pipe()
        words = (
            f"exec {program} --headless --no-sandbox --disable-gpu --remote-debugging-pipe "
            f"--window-size=1280,800 --user-data-dir={profile} about:blank "
            f"3<&{to_read} 4>&{to_write}"
        )
        self._process = subprocess.Popen(
            ["bash", "-c", words], pass_fds=(to_read, to_write), stderr=subprocess.DEVNULL
        )
        os.close(to_read)
        os.close(to_write)
        self._count, self._buffer, self._session = 0, b"", ""
        self.errors: list[str] = []  # that the console shows
        self.requests: list[str] = []  # addresses that the page has asked for
        pages = self("Target.getTargets")["targetInfos"]
        target = next(page["targetId"] for page in pages if page["type"] == "page")
        words_of = {"targetId": target, "flatten": True}
        self._session = self("Target.attachToTarget", **words_of)["sessionId"]

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        call: dict[str, Any] = {"id": self._count, "method": method, "params": params}
        if self._session:
            call["sessionId"] = self._session
        os.write(self._to, json.dumps(call).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                read = os.read(self._from, 1 << 16)
                assert read, "the browser ended"
                self._buffer += read
            line, _, self._buffer = self._buffer.partition(b"\0")
            answer = json.loads(line)
            self.errors += _errors(answer)
            if answer.get("method") == "Network.requestWillBeSent":
                self.requests.append(answer["params"]["request"]["url"])
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def value(self, script: str) -> Any:
        """Evaluate an expression in the page; None while a new one is being loaded."""
        result = self("Runtime.evaluate", expression=script, returnByValue=True)["result"]
        return result.get("value")

    def forget(self) -> None:
        """Leave the page, and be as at the start."""
        self("Emulation.clearDeviceMetricsOverride")
        self("Page.navigate", url="about:blank")
        self.wait("location.href == 'about:blank'")
        self.errors.clear()
        self.requests.clear()

    def open(self, page: Path, width: int, height: int = 800, *, address: str = "") -> None:
        """Load a page in a window of this size, and wait until all of it is there."""
        self.resize(width, height)
        for domain in ("Runtime", "Log", "Network"):
            self(f"{domain}.enable")
        url = page.as_uri() + address
        self("Page.navigate", url=url)
        self.wait(f"location.href == {json.dumps(url)} && document.readyState == 'complete'")

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self("Emulation.setDeviceMetricsOverride", **size)

    def wait(self, script: str, seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not self.value(script):
            assert time.monotonic() < end, f"{script} did not become true"
            assert not self.errors, self.errors
            time.sleep(0.05)

    def end(self) -> None:
        self._process.terminate()
        self._process.wait(20)
        os.close(self._to)
        os.close(self._from)


def _errors(event: dict[str, Any]) -> list[str]:
    """Return what an event of the browser says went wrong."""
    params = event.get("params", {})
    if event.get("method") == "Runtime.exceptionThrown":
        return [json.dumps(params["exceptionDetails"])]
    if event.get("method") == "Runtime.consoleAPICalled" and params["type"] == "error":
        return [json.dumps(params["args"])]
    if event.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
        return [params["entry"]["text"]]
    return []

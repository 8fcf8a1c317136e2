"""A headless Chromium, told what to do through a pipe (DevTools protocol)."""

import base64
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any


class Browser:
    """One page; ``events`` holds what it has reported since it was opened."""

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
        self.events: list[dict[str, Any]] = []
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
            if "method" in answer:
                self.events.append(answer)
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def open(self, url: str) -> None:
        """Go to a page as if it had never been seen, and listen to what it reports."""
        for domain in ("Runtime", "Log", "Network"):
            self(f"{domain}.enable")
        self("Page.navigate", url="about:blank")
        self.wait("location.href == 'about:blank'")
        self.events.clear()
        self("Page.navigate", url=url)

    def value(self, script: str) -> Any:
        """Evaluate an expression in the page; None while a new one is being loaded."""
        result = self("Runtime.evaluate", expression=script, returnByValue=True)["result"]
        return result.get("value")

    def wait(self, script: str, seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not self.value(script):
            assert time.monotonic() < end, f"{script} did not become true"
            assert not self.complaints(), self.complaints()
            time.sleep(0.05)

    def complaints(self) -> list[str]:
        """Return exceptions, console errors and warnings, and logged errors of the page."""
        found = []
        for event in self.events:
            what = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                found.append(json.dumps(what["exceptionDetails"]))
            if event["method"] == "Runtime.consoleAPICalled" and what["type"] in (
                "error",
                "warning",
                "assert",
            ):
                found.append(json.dumps(what["args"]))
            if event["method"] == "Log.entryAdded":
                found.append(what["entry"]["text"])
        return found

    def requests(self) -> list[str]:
        """Return the addresses that the page has asked for."""
        sent = (e for e in self.events if e["method"] == "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in sent]

    def resize(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self("Emulation.setDeviceMetricsOverride", **metrics)

    def screenshot(self) -> bytes:
        return base64.b64decode(self("Page.captureScreenshot")["data"])

    def end(self) -> None:
        self._process.terminate()
        self._process.wait(20)
        os.close(self._to)
        os.close(self._from)

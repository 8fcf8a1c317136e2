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
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def value(self, script: str) -> Any:
        """Evaluate an expression in the page; None while a new one is being loaded."""
        result = self("Runtime.evaluate", expression=script, returnByValue=True)["result"]
        return result.get("value")

    def open(self, page: Path, width: int) -> None:
        """Load a page in a window of this width, and wait until all of it is there."""
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        self("Emulation.setDeviceMetricsOverride", **size)
        self("Runtime.enable")
        self("Log.enable")
        self("Page.navigate", url=page.as_uri())
        self.wait(
            f"location.href == {json.dumps(page.as_uri())} && document.readyState == 'complete'"
        )

    def wait(self, script: str, seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not self.value(script):
            assert time.monotonic() < end, f"{script} did not become true"
            time.sleep(0.1)

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

"""A page in Chromium without a window, driven as a person would: mouse, keys and pictures of the screen."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """Chromium, over its debugging pipe: messages of JSON that end in a zero byte."""

    def __init__(self, folder: Path) -> None:
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        # Chromium reads from descriptor 3 and writes to 4.
        shell = f'exec 3<&{theirs_in} 4>&{theirs_out}; exec "$0" "$@"'
        options = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--window-size=1300,1000")
        command = ["bash", "-c", shell, str(CHROMIUM), *options, f"--user-data-dir={folder}", "about:blank"]
        self.process = subprocess.Popen(
            command, pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.input, self.output = os.fdopen(ours_in, "rb"), os.fdopen(ours_out, "wb")
        self.buffer, self.number, self.session = b"", 0, ""
        pages = self.send("Target.getTargets")["targetInfos"]
        target = next(page["targetId"] for page in pages if page["type"] == "page")
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; events are dropped."""
        self.number += 1
        message = dict(id=self.number, method=method, params=params)
        if self.session:
            message["sessionId"] = self.session
        self.output.write(json.dumps(message).encode() + b"\0")
        self.output.flush()
        while True:
            while b"\0" not in self.buffer:
                part = os.read(self.input.fileno(), 65536)
                assert part, "the browser has ended"
                self.buffer += part
            answer, _, self.buffer = self.buffer.partition(b"\0")
            content = json.loads(answer)
            if content.get("id") == self.number:
                assert "error" not in content, content
                return content["result"]

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, page: Path, place: str = "") -> None:
        """Open a file that says when it is ready, at a place in it."""
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=f"file://{page}{place}")
        for _ in range(300):
            if self.run("document.body && document.body.dataset.ready") == "yes":
                return
            time.sleep(0.1)
        raise AssertionError("the page does not get ready")

    def mouse(self, kind: str, x: float, y: float) -> None:
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str, modifiers: int = 0) -> None:
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, modifiers=modifiers)

    def close(self) -> None:
        self.send("Browser.close")
        self.process.wait(30)
        self.input.close()
        self.output.close()

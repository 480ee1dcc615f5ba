"""Chromium without a window, driven through its own pipes: no port, no driver program, no library.

    with Browser() as browser:
        seen = browser.open(page, width=400)

It speaks the DevTools protocol: a JSON message, a zero byte, on descriptors 3 (to it) and 4 (from it).
"""

from __future__ import annotations

import base64
import dataclasses
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

PROGRAM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
TIMEOUT_S = 60.0

_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
    *("--remote-debugging-pipe", "--hide-scrollbars"),
)
_TO, _FROM = 3, 4
_WIDTHS = """(() => {
  const root = document.documentElement;
  const wide = [...document.querySelectorAll("body *")].filter((e) => !e.closest(".scroll, .command, .skip, thead, svg")
    && e.getBoundingClientRect().right > root.clientWidth + 1).map((e) => e.tagName + "." + e.className);
  return JSON.stringify({scroll: root.scrollWidth, client: root.clientWidth, height: root.scrollHeight, wide});
})()"""


@dataclasses.dataclass(frozen=True)
class Seen:
    """A page as it was shown: what its console said, what it asked for, how wide it came out, in CSS pixels.

    `wide`: elements that stand out of the page to the right.
    """

    console: tuple[str, ...]
    requests: tuple[str, ...]
    scroll_width: int
    client_width: int
    height: int
    wide: tuple[str, ...]


class Browser:
    """A running Chromium with a profile of its own, which ends with the block."""

    def __init__(self) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="spach-chromium-", ignore_cleanup_errors=True)
        self._number = 0
        self._buffer = b""
        self._session = ""
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        read_here, write_there = os.pipe()
        read_there, write_here = os.pipe()
        high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10) for descriptor in (read_there, write_there)]

        def place() -> None:
            os.dup2(high[0], _TO)
            os.dup2(high[1], _FROM)

        self._process = subprocess.Popen(
            [PROGRAM, *_FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"],
            preexec_fn=place,
            pass_fds=(_TO, _FROM),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for descriptor in (read_there, write_there, *high):
            os.close(descriptor)
        self._read, self._write = read_here, write_here
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)
        self._profile.cleanup()

    def open(self, page: Path, *, width: int, scheme: str = "light") -> Seen:
        """Show a page at a width, in `light` or `dark`."""
        self._resize(width, 900)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        self._until(lambda event: event.get("method") == "Page.loadEventFired")
        widths = json.loads(self.evaluate(_WIDTHS))
        return Seen(
            tuple(self._console()),
            tuple(self._requests()),
            widths["scroll"],
            widths["client"],
            widths["height"],
            tuple(widths["wide"]),
        )

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def picture(self, file: Path, *, width: int, height: int) -> None:
        """The page that is open, as a PNG."""
        self._resize(width, height)
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=False)
        file.write_bytes(base64.b64decode(shot["data"]))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command's result. RuntimeError where Chromium refuses it, TimeoutError where it does not answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        number = self._number
        answer = self._until(lambda event: event.get("id") == number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result

    def _resize(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def _until(self, is_it: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        end = time.monotonic() + TIMEOUT_S
        while True:
            event = self._next(end)
            self.events.append(event)
            if is_it(event):
                return event

    def _next(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            chunk = os.read(self._read, 1 << 16) if ready else b""
            if not chunk:
                raise TimeoutError(f"{PROGRAM} did not answer.")
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        event: dict[str, Any] = json.loads(message)
        return event

    def _console(self) -> list[str]:
        """What a developer's console would show: messages, exceptions, refusals of the content security policy."""
        wanted = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        return [json.dumps(event["params"]) for event in self.events if event.get("method") in wanted]

    def _requests(self) -> list[str]:
        urls = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith("data:")]

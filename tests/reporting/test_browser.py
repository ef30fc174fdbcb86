# SPDX-License-Identifier: Apache-2.0
"""The page in a real browser, headless: it opens, its pictures are drawn, and it asks for nothing."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import threading
from html import unescape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lightning_lora.reporting.page import render
from tests.reporting.record import SCRIPT, full

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

#: What the browser says of the page, as an attribute: only the tree comes out of it.
PROBE = """<script>addEventListener("load", () => {
  const box = e => e.getBoundingClientRect();
  document.body.dataset.found = JSON.stringify({
    title: document.title,
    pictures: [...document.querySelectorAll("svg")].map(e => [box(e).width, box(e).height]),
    texts: [...document.querySelectorAll("svg text")].filter(e => box(e).width > 0).length,
    cut: [...document.querySelectorAll("svg text")].filter(e => {
      const all = box(e.closest("svg")), own = box(e);
      const across = own.left < all.left - 2 || own.right > all.right + 2;
      return across || own.top < all.top - 2 || own.bottom > all.bottom + 2;
    }).map(e => e.textContent),
    images: [...document.images].map(e => e.complete && e.naturalWidth > 0),
    width: innerWidth, needed: document.documentElement.scrollWidth,
  });
});</script>"""


class Files(SimpleHTTPRequestHandler):
    """Serves a folder and remembers what was asked for."""

    asked: list[str]

    def do_GET(self) -> None:
        if "Referer" in self.headers or self.path == "/page.html":  # browsers ask their makers for this and that
            self.asked.append(f"{self.headers['Host'].partition(':')[0]}{self.path}")
        super().do_GET()

    def log_message(self, *args: Any) -> None:
        pass


def opened(html: str, width: int, tmp_path: Path) -> dict[str, Any]:
    """Open a page with the probe in it; what the browser saw of it, and everything that it asked for, from any host."""
    html = re.sub(r"<meta http-equiv=.*?>", "", html)  # it forbids every script, the probe too
    (tmp_path / "page.html").write_text(html.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    asked: list[str] = []
    handler = functools.partial(type("Asked", (Files,), {"asked": asked}), directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"127.0.0.1:{server.server_port}"
        command = [
            str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            "--disable-component-update", "--disable-features=NetworkTimeServiceQuerying",
            "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}",
            f"--host-resolver-rules=MAP * {here}", "--virtual-time-budget=4000", f"--window-size={width},3000",
            "--dump-dom", f"http://{here}/page.html",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        server.shutdown()
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    return {**json.loads(unescape(found[1])), "asked": asked}


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_opens_the_page(width: int, tmp_path: Path) -> None:
    seen = opened(render(full()), width, tmp_path)
    assert seen["title"] == f"Run of {SCRIPT}"
    assert seen["asked"] == ["127.0.0.1/page.html"]
    assert all(seen["images"])
    assert len(seen["pictures"]) == 5
    assert all(w > 200 and h > 150 for w, h in seen["pictures"])
    assert seen["texts"] > 50
    assert [text for text in seen["cut"] if SCRIPT not in text] == []
    assert seen["needed"] <= seen["width"]  # wide tables scroll in themselves


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_the_probe_sees_what_a_page_asks_for(tmp_path: Path) -> None:
    asking = (
        '<html><head><link rel="icon" href="data:,"><link rel="stylesheet" href="a.css"></head>'
        '<body style="width:3000px"><img src="http://elsewhere.example/b.png"></body></html>'
    )
    seen = opened(asking, 500, tmp_path)
    assert sorted(seen["asked"]) == ["127.0.0.1/a.css", "127.0.0.1/page.html", "elsewhere.example/b.png"]
    assert seen["images"] == [False]
    assert seen["needed"] > seen["width"]

# SPDX-License-Identifier: Apache-2.0
"""Looks at a built site: every link inside it leads somewhere, and no page loads anything from elsewhere.

    python docs/tools/dead_links.py site

mkdocs checks what is written in Markdown; this checks the pages that came of it, docstrings and navigation included.
Links to other sites (``<a href="https://...">``) are not followed.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

#: Attributes that name something, by element.
LINKS = {"a": "href", "link": "href", "img": "src", "script": "src", "iframe": "src", "source": "src"}


class Page(HTMLParser):
    """What a page links to, and the anchors that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[tuple[str, str]] = []
        self.anchors: set[str] = {""}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the element's link and its id."""
        values = dict(attrs)
        target = values.get(LINKS.get(tag, ""))
        if target is not None and "canonical" not in (values.get("rel") or ""):
            self.links.append((tag, target))
        self.anchors.update(value for value in (values.get("id"), values.get("name")) if value)


def problems(site: Path) -> list[str]:
    """What is wrong with the site, a line each.

    Args:
        site: Folder of a built site.
    """
    pages = {path.resolve(): Page(path.read_text()) for path in sorted(site.rglob("*.html"))}
    if not pages:
        return [f"{site} holds no page"]
    found = []
    for path, page in pages.items():
        for tag, link in page.links:
            problem = _problem(site.resolve(), pages, path, tag, link)
            if problem:
                found.append(f"{path.relative_to(site.resolve())}: {link}: {problem}")
    return found


def _problem(site: Path, pages: dict[Path, Page], path: Path, tag: str, link: str) -> str | None:
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        elsewhere = tag != "a" and parts.scheme != "data"
        return "loaded from another site" if elsewhere else None
    # 404.html is served for any address, and so its links begin at the site's root.
    folder = site if parts.path.startswith("/") or path.name == "404.html" else path.parent
    target = (folder / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
    if target.is_dir():
        target /= "index.html"
    if not target.is_file():
        return "leads nowhere"
    if parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
        return "no such place on the page"
    return None


def main() -> int:
    """Print what is wrong; the exit code is 1 if anything is."""
    found = problems(Path(sys.argv[1]))
    print("\n".join(found) or f"{sys.argv[1]}: no dead link")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

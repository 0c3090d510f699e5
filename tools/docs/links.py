"""Finds links of a built site that lead nowhere: also those that the builder does not look at, to images and files."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value for key, value in attrs if key in ("href", "src") and value]
        self.anchors |= {value for key, value in attrs if key == "id" and value}


def broken(site: Path) -> list[tuple[str, str]]:
    """The (page, link) pairs whose link names no file of the built site, or no anchor in it."""
    site = site.resolve()
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    return sorted(
        {
            (str(path.relative_to(site)), link)
            for path, page in pages.items()
            if path.name != "404.html"  # served at any address, so that its links start at the site's root
            for link in page.links
            if not leads_somewhere(link, path, site, pages)
        }
    )


def leads_somewhere(link: str, path: Path, site: Path, pages: dict[Path, Page]) -> bool:
    """Whether a link on the page ``path`` is a foreign address, or has its target in the site."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return True
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    target = target / "index.html" if target.is_dir() else target
    anchored = not parts.fragment or target not in pages or parts.fragment in pages[target].anchors
    return target.is_relative_to(site) and target.is_file() and anchored

"""``python -m tools.docs``: writes the generated page, builds the site strictly into ``site/``, checks its links."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from tools.docs import links, settings


def build() -> list[str]:
    """Builds the site of the folder it runs in; returns what is wrong with it, a line each."""
    # as a module: Python then finds this package, which mkdocs.yml names, in the folder
    built = subprocess.run([sys.executable, "-m", "zensical", "build", "--strict", "--clean"], check=False)
    if built.returncode:
        return ["the site could not be built"]
    return [f"{page}: {link} leads nowhere" for page, link in links.broken(Path("site"))]


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.docs", description=__doc__)
    parser.add_argument("what", nargs="?", choices=("all", "settings", "build"), default="all")
    what = parser.parse_args().what
    if what != "build":
        settings.PAGE.write_text(settings.page(), encoding="utf-8")
    problems = build() if what != "settings" else []
    for problem in problems:
        print(problem, file=sys.stderr)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())

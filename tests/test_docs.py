"""The documentation: what it shows is current and runs, and the site builds strictly."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
EXTRA = ("zensical", "mkdocstrings", "latex2mathml")


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"([a-z_]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == [page.name for page in PAGES]


def test_the_page_of_settings_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    from tools.docs import settings

    assert (DOCS / "settings.md").read_text(encoding="utf-8") == settings.page(), "run python -m tools.docs settings"


def test_pages_name_settings_that_exist() -> None:
    """Every `--set key=` and every `section.key` in the documentation is a setting."""
    text = (DOCS / "settings.md").read_text(encoding="utf-8")
    known = set(re.findall(r"^\| `([a-z_.]+)`", text, re.MULTILINE)) | {"algorithm.name"}
    sections = {key.partition(".")[0] for key in known if "." in key}
    for page in [*PAGES, ROOT / "README.md"]:
        content = page.read_text(encoding="utf-8")
        named = set(re.findall(r"--set '?([a-z_.]+)=", content))
        if page.name != "coming_from.md":  # its tables have the settings of others
            named |= {key for key in re.findall(r"`([a-z_]+\.[a-z_.]+)`", content) if key.partition(".")[0] in sections}
        named = {key for key in named if not key.endswith((".jsonl", ".py"))}
        wrong = {key for key in named - known if not any(one.startswith(f"{key}.") for one in known)}
        assert wrong <= {"section.key", "algorithm.batch"}, page.name


def test_the_loop_by_hand_runs() -> None:
    mark = r"<!-- the test suite runs this block -->\n```python\n(.*?)```"
    (block,) = re.findall(mark, (DOCS / "extending.md").read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(block, "extending.md", "exec"), {})  # noqa: S102


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "is kept without outputs"
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)  # noqa: S102
    assert (tmp_path / "runs" / "quickstart" / "lora" / "quickstart.kohya.safetensors").is_file()
    first, last = [
        json.loads(line)["mean"] for line in (tmp_path / "runs/quickstart/evaluations.jsonl").read_text().splitlines()
    ]
    assert last > first  # redder


@pytest.mark.skipif(
    not all(map(find_spec, EXTRA)), reason="the site needs zensical and mkdocstrings: pip install 'diffexp[docs]'"
)
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    shutil.copytree(DOCS, tmp_path / "docs")  # the builder follows no links
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    for name in ("examples", "src", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    built = subprocess.run(
        [sys.executable, "-m", "tools.docs", "build"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stdout + built.stderr
    concepts = (tmp_path / "site" / "concepts" / "index.html").read_text(encoding="utf-8")
    assert concepts.count("<math") == len(re.findall("^```math", (DOCS / "concepts.md").read_text(), re.MULTILINE)) > 5
    assert 'class="highlight"' in concepts
    for page in (tmp_path / "site").rglob("index.html"):  # nothing is fetched from elsewhere
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)"', text), page

"""What the figures hold: sizes, pixels, labels. How they look is for eyes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffexp import figures


def flat(colour: str, size: int = 64) -> Image.Image:
    return Image.new("RGB", (size, size), colour)


def test_small_images_are_enlarged_by_a_whole_factor_and_keep_their_pixels():
    checks = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype("uint8"))
    grid = figures.image_grid([[checks]])
    pixels = np.asarray(grid.convert("L"))
    found = pixels[-128 - 5 : -5, -128 - 5 : -5]
    np.testing.assert_array_equal(found, np.kron(np.asarray(checks), np.ones((2, 2))))


def test_grid_has_each_image_in_its_place():
    rows = [[flat("red"), flat("lime")], [flat("blue")]]
    grid = figures.image_grid(rows, ["before", "after"], ["a cat", "a dolphin riding a bike"])
    right, bottom = grid.width - 70, grid.height - 70
    assert grid.getpixel((right - 133, bottom - 133)) == (255, 0, 0)
    assert grid.getpixel((right, bottom - 133)) == (0, 255, 0)
    assert grid.getpixel((right - 133, bottom)) == (0, 0, 255)
    assert grid.getpixel((right, bottom)) == (255, 255, 255)


def test_labels_take_room_and_leave_ink():
    bare = figures.image_grid([[flat("white")]])
    labelled = figures.image_grid([[flat("white")]], ["before"], ["an ant washing the dishes"])
    assert labelled.width > bare.width + 30
    assert labelled.height > bare.height + 20
    assert np.asarray(bare).min() == 255
    assert np.asarray(labelled)[:, : labelled.width - bare.width].min() < 100
    assert np.asarray(labelled)[: labelled.height - bare.height].min() < 100


def test_a_long_prompt_is_cut_off():
    short, long = (figures.image_grid([[flat("red")]], (), ["a word " * n]).height for n in (30, 300))
    assert short == long


def test_no_label_runs_into_its_neighbour():
    for text in ("Donaudampfschifffahrtsgesellschaft", "a donkey and an octopus are playing a game with a rope " * 3):
        grid = figures.image_grid([[flat("red")] * 3], (), ["", text, ""])
        above = np.asarray(grid)[: grid.height - 140]
        inked = np.flatnonzero((above < 200).any(axis=(0, 2)))
        start = grid.width - 2 * 133
        assert start - 2 <= inked[0] < inked[-1] <= start + 128 + 2


def test_large_images_keep_their_size():
    assert figures.image_grid([[flat("red", 512)]]).width >= 512
    assert figures.image_grid([[flat("red", 512)]]).width < 600


def test_before_after_is_a_grid_of_two_rows():
    picture = figures.before_after([flat("red")] * 2, [flat("blue")] * 2)
    assert picture.getpixel((picture.width - 70, picture.height - 70)) == (0, 0, 255)
    assert picture.getpixel((picture.width - 70, picture.height - 203)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("rows", "row_labels", "column_labels"),
    [([], (), ()), ([[]], (), ()), ([["x"]], ["a", "b"], ()), ([["x"]], (), ["a", "b"])],
)
def test_grids_that_make_no_sense(rows, row_labels, column_labels):
    with pytest.raises(ValueError, match=r"grid"):
        figures.image_grid(rows, row_labels, column_labels)


def lines(*arms: tuple[str, str, bool]) -> list[figures.Line]:
    return [
        figures.Line(label, [0, 64, 128], np.array([0.0, 1.0, 2.0]), np.full(3, 0.1), algorithm, explores)
        for label, algorithm, explores in arms
    ]


ARMS = lines(
    ("DDPO", "ddpo", False),
    ("DDPO + DiffExp", "ddpo", True),
    ("AlignProp", "alignprop", False),
    ("AlignProp + DiffExp", "alignprop", True),
)


def test_colour_tells_exploration_and_dashes_the_algorithm():
    figure = figures.curves([figures.Panel("animals", "reward", ARMS)])
    plain, exploring, plain_2, exploring_2 = figure.axes[0].lines
    assert plain.get_color() == plain_2.get_color() == figures.PLAIN[0]
    assert exploring.get_color() == exploring_2.get_color() == figures.EXPLORING[0]
    assert plain.get_linestyle() == exploring.get_linestyle() != plain_2.get_linestyle()


def test_arms_of_one_kind_get_colours_of_their_own():
    figure = figures.curves([figures.Panel("animals", "reward", lines(("a", "ddpo", True), ("b", "ddpo", True)))])
    assert len({line.get_color() for line in figure.axes[0].lines}) == 2


def test_panels_levels_and_legend(tmp_path: Path):
    level = figures.Level("final reward of DDPO", 1.5, {"DDPO + DiffExp": 96.0})
    panels = [figures.Panel(f"set {k}", "reward", ARMS[:2], [level] if k == 0 else []) for k in range(5)]
    figure = figures.curves(panels)
    assert [ax.get_title(loc="left") for ax in figure.axes] == [f"set {k}" for k in range(5)]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["DDPO", "DDPO + DiffExp"]
    assert [text.get_text() for text in figure.axes[0].texts] == ["final reward of DDPO"]
    np.testing.assert_allclose(figure.axes[0].collections[-1].get_offsets(), [[96.0, 1.5]])
    files = [tmp_path / "curves.png", tmp_path / "curves.svg"]
    figures.save(figure, *files)
    with Image.open(files[0]) as image:
        assert image.width > 2000


def test_the_same_figure_gives_the_same_svg(tmp_path: Path):
    for name in ("a.svg", "b.svg"):
        figures.save(figures.curves([figures.Panel("animals", "reward", ARMS)]), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_importing_is_cheap():
    code = "import sys, diffexp.figures; sys.exit('matplotlib' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

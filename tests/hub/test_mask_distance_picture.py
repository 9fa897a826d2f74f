"""One picture per search: the distances between the would-be masks of all checks."""

import sys

import pytest
import torch

from sparse_hf.algorithms.settling import distance_matrix
from sparse_hf.hub.mask_distance_picture import plot_mask_distances


DISTANCES = [[0, 0.5, 0.6], [0.5, 0, 0.05], [0.6, 0.05, 0]]
STEPS = [10, 20, 30]
NEEDS_MATPLOTLIB = "pictures are drawn by matplotlib, which the extra `demo` installs"


@pytest.mark.parametrize("drawn_at", [None, 10, 30])
def test_picture_is_written(tmp_path, drawn_at):
    pytest.importorskip("matplotlib", reason=NEEDS_MATPLOTLIB)
    path = plot_mask_distances(DISTANCES, STEPS, drawn_at, str(tmp_path / "distances.png"))
    assert path == tmp_path / "distances.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def drawing(monkeypatch, tmp_path, *args, **kwargs):
    """The axes of what would be saved, and of its colour bar."""
    figure = pytest.importorskip("matplotlib.figure", reason=NEEDS_MATPLOTLIB)
    saved = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: saved.append(self))
    plot_mask_distances(*args, tmp_path / "distances.png", **kwargs)
    (picture,) = saved
    return picture.axes


def test_cells_scale_and_steps(monkeypatch, tmp_path):
    axes, colours = drawing(monkeypatch, tmp_path, DISTANCES, STEPS, None)
    (image,) = axes.get_images()
    assert image.get_array().tolist() == DISTANCES
    assert image.get_clim() == (0, 1)
    for axis in (axes.xaxis, axes.yaxis):
        assert [label.get_text() for label in axis.get_ticklabels()] == ["10", "20", "30"]
    assert colours.get_ylabel() == "mask distance"
    assert axes.get_legend() is None
    assert not axes.get_lines()


def test_the_matrix_of_a_search_is_drawn(monkeypatch, tmp_path):
    masks = [{"a.heads": torch.tensor(kept)} for kept in ([True, False], [True, True], [False, True])]
    axes, _ = drawing(monkeypatch, tmp_path, distance_matrix(masks), STEPS, None)
    assert axes.get_images()[0].get_array().tolist() == [[0, 0.5, 1], [0.5, 0, 0.5], [1, 0.5, 0]]


def test_the_draw_is_a_line_at_its_check(monkeypatch, tmp_path):
    axes, _ = drawing(monkeypatch, tmp_path, DISTANCES, STEPS, 20, title="my own title")
    (line,) = axes.get_lines()
    assert list(line.get_xdata()) == [1, 1]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["drawn at step 20"]
    assert axes.get_title() == "my own title"


@pytest.mark.parametrize(("checks", "labels"), [(1, 1), (12, 12), (13, 7), (30, 10)])
def test_labels_stay_few(monkeypatch, tmp_path, checks, labels):
    axes, _ = drawing(monkeypatch, tmp_path, [[0] * checks] * checks, range(checks), None)
    assert len(axes.get_xticks()) == len(axes.get_yticks()) == labels


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="A picture needs matplotlib. Run `pip install 'sparse_hf.demo.'`"):
        plot_mask_distances(DISTANCES, STEPS, None, tmp_path / "distances.png")


@pytest.mark.parametrize("steps", [[], [10, 10, 20], [30, 20, 10]])
def test_steps_must_increase(tmp_path, steps):
    with pytest.raises(ValueError, match="`steps` must be the increasing steps of at least one check, got "):
        plot_mask_distances(DISTANCES, steps, None, tmp_path / "distances.png")


@pytest.mark.parametrize(
    ("distances", "told"),
    [([], "0 rows of 0"), (DISTANCES[:2], "2 rows of 3"), ([[0], [0.5, 0], [0.6, 0.1, 0]], "3 rows of 1 or 2 or 3")],
)
def test_distances_must_be_square(tmp_path, distances, told):
    with pytest.raises(ValueError, match=f"`distances` must be 3 rows of 3 for 3 steps, got {told}"):
        plot_mask_distances(distances, STEPS, None, tmp_path / "distances.png")


@pytest.mark.parametrize(
    ("distances", "told"),
    [
        ([[0, 0.5], [0.4, 0]], r"got 0.4 at \[1\]\[0\] and 0.5 at \[0\]\[1\]"),
        ([[0, 1.5], [1.5, 0]], r"got 1.5 at \[1\]\[0\]"),
        ([[0, -0.1], [-0.1, 0]], r"got -0.1 at \[1\]\[0\]"),
        ([[0, float("nan")], [float("nan"), 0]], r"got nan at \[1\]\[0\]"),
        ([[0, 0.5], [0.5, 0.5]], r"got 0.5 at \[1\]\[1\]"),
    ],
)
def test_distances_must_be_distances(tmp_path, distances, told):
    with pytest.raises(ValueError, match=rf"must be symmetric, in \[0, 1\] and 0 on the diagonal, {told}"):
        plot_mask_distances(distances, [1, 2], None, tmp_path / "distances.png")


def test_the_draw_must_be_at_a_check(tmp_path):
    with pytest.raises(ValueError, match="`drawn_at` must be the step of a check, got 25, not among 10, 20, 30"):
        plot_mask_distances(DISTANCES, STEPS, 25, tmp_path / "distances.png")
    assert not list(tmp_path.iterdir())

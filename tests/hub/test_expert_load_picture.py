"""One picture per mixture: how often each expert was chosen, against a fair share."""

import math
import sys

import pytest
import torch

from sparse_hf import plot_expert_load
from sparse_hf.moe.usage import ExpertUsage


COUNTS = torch.tensor([[10, 10, 10, 10], [20, 16, 4, 0], [1, 1, 1, 97]])
NEEDS_MATPLOTLIB = "pictures are drawn by matplotlib, which the extra `demo` installs"


def drawing(monkeypatch, tmp_path, load, **options):
    """The axes of what would be saved, and of its colour bar."""
    figure = pytest.importorskip("matplotlib.figure", reason=NEEDS_MATPLOTLIB)
    saved = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: saved.append(self))
    plot_expert_load(load, tmp_path / "load.png", **options)
    (picture,) = saved
    return picture.axes


def labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_picture_is_written(tmp_path):
    pytest.importorskip("matplotlib", reason=NEEDS_MATPLOTLIB)
    path = plot_expert_load(COUNTS, str(tmp_path / "load.png"))
    assert path == tmp_path / "load.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_cells_by_hand(monkeypatch, tmp_path):
    """Colours are doublings of a fair share, between an eighth and 8 times; dead experts have a cross."""
    axes, colours = drawing(monkeypatch, tmp_path, COUNTS)
    (image,) = axes.get_images()
    found = image.get_array().tolist()
    assert found[0] == [0, 0, 0, 0]
    assert found[1] == pytest.approx([1, math.log2(1.6), math.log2(0.4), -3])
    assert found[2] == pytest.approx([-3, -3, -3, math.log2(97 / 25)])
    assert image.get_clim() == (-3, 3)
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["1.0"] * 4 + ["2.0", "1.6", "0.4", "×"] + ["×"] * 3 + ["3.9"]
    assert labels(colours.yaxis) == ["1/8", "1/4", "1/2", "fair (1/4)", "x 2", "x 4", "x 8"]
    assert labels(axes.xaxis) == ["0", "1", "2", "3"]
    assert labels(axes.yaxis) == ["0", "1", "2"]


def test_many_experts_stay_legible(monkeypatch, tmp_path):
    counts = torch.full((40, 64), 100)
    counts[3, 5] = 0
    axes, _ = drawing(monkeypatch, tmp_path, counts)
    assert [text.get_text() for text in axes.texts] == ["×"]
    assert labels(axes.xaxis)[:3] == ["0", "4", "8"]
    assert len(labels(axes.yaxis)) <= 16
    assert max(axes.figure.get_size_inches()) <= 16


def test_layers_of_a_usage_and_given_ones(monkeypatch, tmp_path):
    usage = ExpertUsage({3: COUNTS[0], 5: COUNTS[1]}, {})
    axes, _ = drawing(monkeypatch, tmp_path, usage)
    assert labels(axes.yaxis) == ["3", "5"]
    axes, _ = drawing(monkeypatch, tmp_path, usage, layers=["a", "b"], title="my own title")
    assert labels(axes.yaxis) == ["a", "b"]
    assert axes.get_title() == "my own title"


@pytest.mark.parametrize(
    ("load", "options", "message"),
    [
        (COUNTS[None], {}, r"counts of \(layers, experts\), got \[1, 3, 4\]"),
        (COUNTS[:0], {}, r"got \[0, 4\]"),
        (COUNTS, {"layers": ["a"]}, "must name each of 3 layers, got 1 names"),
        (COUNTS * torch.tensor([[1], [0], [1]]), {"layers": list("abc")}, "layer b has not"),
        (COUNTS - 1, {}, "counts of 0 or more, .* layer 1 has not"),
    ],
)
def test_refusals(tmp_path, load, options, message):
    with pytest.raises(ValueError, match=message):
        plot_expert_load(load, tmp_path / "load.png", **options)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="A picture needs matplotlib. Run `pip install 'sparse_hf.demo.'`"):
        plot_expert_load(COUNTS, tmp_path / "load.png")

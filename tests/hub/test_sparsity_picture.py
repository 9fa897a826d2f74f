"""One picture per ticket: layers by kinds of matrix."""

import sys

import pytest
import torch

from sparse_hf import plot_sparsity, prune
from sparse_hf.cards.sparsity_picture import _cells
from sparse_hf.tickets.ticket import Ticket
from tiny_models import tiny_model


def masks(**sparsities):
    return Ticket.from_masks({name: torch.arange(10).view(2, 5) >= 10 * value for name, value in sparsities.items()})


@pytest.mark.parametrize(
    ("family", "head"), [("bert", "base"), ("gpt2", "causal_lm"), ("mixtral", "causal_lm"), ("t5", "base")]
)
def test_picture_is_written(tmp_path, family, head):
    pytest.importorskip("matplotlib", reason="pictures are drawn by matplotlib, which the extra `demo` installs")
    ticket = prune(tiny_model(family, head), 0.5)
    path = plot_sparsity(ticket, tmp_path / "sparsity.png")
    assert path == tmp_path / "sparsity.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_ending_says_the_format(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures are drawn by matplotlib, which the extra `demo` installs")
    ticket = masks(**{"layer.0.a.weight": 0.3, "pooler.weight": 0.1})
    path = plot_sparsity(ticket, str(tmp_path / "sparsity.svg"), title="my own title")
    assert "<svg" in path.read_text()


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="A picture needs matplotlib. Run `pip install 'sparse_hf.demo.'`"):
        plot_sparsity(masks(a=0.5), tmp_path / "sparsity.png")


def test_cells_by_hand():
    ticket = masks(**{"encoder.layer.0.up.weight": 0.5, "encoder.layer.10.up.weight": 0.2, "pooler.weight": 0.1})
    assert _cells(ticket.sparsity_by_site()) == pytest.approx({(0, "up"): 0.5, (10, "up"): 0.2, (-1, "pooler"): 0.1})


def test_experts_of_a_layer_share_a_cell():
    mask = torch.ones(2, 2, 5, dtype=torch.bool)
    mask[0] = False
    assert _cells(Ticket.from_masks({"layers.1.experts.up_proj": mask}).sparsity_by_site()) == {
        (1, "experts.up_proj"): 0.5
    }


def test_encoder_and_decoder_do_not_share_a_cell():
    ticket = masks(**{"encoder.block.0.q.weight": 0.5, "decoder.block.0.q.weight": 0.2})
    assert _cells(ticket.sparsity_by_site()) == pytest.approx(
        {(0, "encoder.block q"): 0.5, (0, "decoder.block q"): 0.2}
    )


def test_every_matrix_of_bert_has_its_cell():
    ticket = prune(tiny_model("bert"), 0.5)
    assert len(_cells(ticket.sparsity_by_site())) == len(ticket.bits) == 13

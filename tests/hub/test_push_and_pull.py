"""What is pushed with the real client comes back as it was, with a card."""

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dsee.tiny_dsee import base_model, dsee_model, logits
from hub.hub_server import hub as hub  # a fixture
from sparse_hf import EarlyBirdConfig, StructuredTicket, Ticket, prune, slim, upcycle
from sparse_hf.cards.publish import publish
from tiny_dense import save_dense
from tiny_models import tiny_inputs, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model("bert", "sequence_classification")


def half(model):
    return StructuredTicket.from_model(model, EarlyBirdConfig(heads=0.5, neurons=0.5))


def card(hub, name):
    return ModelCard(hub.text(name, "README.md"))


def test_a_ticket(hub):
    ticket = prune(tiny_model("bert", "sequence_classification"), 0.6)
    address = ticket.push_to_hub("bert-60")  # the user's name is the Hub's to add
    assert address.startswith("https://huggingface.co/me/bert-60/commit/")
    pulled = Ticket.from_pretrained("me/bert-60")
    assert all(torch.equal(pulled.bits[name], bits) for name, bits in ticket.bits.items())
    assert pulled.origin == ticket.origin
    assert set(hub.files("me/bert-60")) == {
        ".gitattributes",
        "README.md",
        "sparse_hf.json",
        "sparse_masks.safetensors",
        "sparsity.png",
    }
    assert card(hub, "me/bert-60").data.tags[:3] == ["sparse_hf", "sparsity", "pruning"]
    assert "60.00% (10,445 of 17,408)" in hub.text("me/bert-60", "README.md")
    assert 'Ticket.from_pretrained("me/bert-60")' in hub.text("me/bert-60", "README.md")


def test_a_structured_ticket(hub, model):
    ticket = half(model)
    ticket.push_to_hub("me/half")
    pulled = StructuredTicket.from_pretrained("me/half")
    assert pulled.counts() == ticket.counts()
    assert all(torch.equal(pulled.units[key], mask) for key, mask in ticket.units.items())
    assert "| heads kept | 4 of 8 |" in hub.text("me/half", "README.md")


def test_a_slim_model(hub, model, tmp_path):
    smaller = slim(model, half(model)).eval()
    smaller.save_pretrained(tmp_path / "slim")
    publish(tmp_path / "slim", "me/slim")
    pulled = AutoModelForSequenceClassification.from_pretrained("me/slim").eval()
    inputs = tiny_inputs(model)
    assert torch.equal(pulled(**inputs).logits, smaller(**inputs).logits)
    assert "modeling_slim.py" in hub.files("me/slim")  # without it nobody else could read the model
    assert "import sparse_hf\nfrom transformers" in hub.text("me/slim", "README.md")


def test_a_dsee_adapter(hub, tmp_path):
    adapted = dsee_model("gpt2")
    adapted.save_pretrained(tmp_path / "adapter")
    publish(tmp_path / "adapter", "me/adapter")
    pulled = PeftModel.from_pretrained(base_model("gpt2"), "me/adapter").eval()
    assert torch.equal(logits(pulled), logits(adapted))
    text = hub.text("me/adapter", "README.md")
    assert "[More Information Needed]" not in text  # PEFT's draft gave way
    assert "import sparse_hf  # lets PEFT know DSEE adapters" in text
    assert "| zeros among the frozen matrices' weights | 50.00% (3,072 of 6,144) |" in text


def test_an_upcycled_mixture(hub, tmp_path):
    save_dense(tmp_path / "dense", "llama")
    upcycle(tmp_path / "dense", tmp_path / "moe", experts=4, top_k=2, progress=False)
    publish(tmp_path / "moe", "me/moe")
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "moe").eval()
    pulled = AutoModelForCausalLM.from_pretrained("me/moe").eval()
    assert all(torch.equal(one, two) for one, two in zip(stored.parameters(), pulled.parameters(), strict=True))
    text = hub.text("me/moe", "README.md")
    assert "sparse-hf upcycle MODEL FOLDER --experts 4 --top-k 2" in text
    assert "| begins as the dense model's function | yes |" in text
    assert "| base model | `dense` |" in text
    assert str(tmp_path) not in text


def test_an_upcycled_model_of_the_hub_names_it_and_its_licence(hub, tmp_path):
    save_dense(tmp_path / "dense", "llama")
    (tmp_path / "dense" / "README.md").write_text("---\nlicense: apache-2.0\n---\nby hand\n")
    publish(tmp_path / "dense", "me/dense")
    assert hub.text("me/dense", "README.md").endswith("by hand\n")
    upcycle("me/dense", tmp_path / "moe", experts=2, top_k=2, progress=False, check_tokens=0)
    publish(tmp_path / "moe", "me/moe")
    data = card(hub, "me/moe").data
    assert (data.base_model, data.license, data.library_name) == ("me/dense", "apache-2.0", "sparse_hf")
    assert HfApi().model_info("me/dense").sha[:12] in hub.text("me/moe", "README.md")

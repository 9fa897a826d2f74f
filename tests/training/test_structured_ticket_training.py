"""Training the model that a structured ticket leaves."""

import json

from sparse_hf.tickets.structured_ticket import StructuredTicket
from training.tiny_early_bird import bird_trainer, early_bird, whole_bert


def test_training_under_a_structured_ticket(tmp_path):
    model = whole_bert()
    ticket = StructuredTicket.from_model(model, early_bird())
    trainer = bird_trainer(tmp_path, ticket, model=model)
    trainer.train()
    trainer.save_model()
    assert trainer.ticket is ticket
    assert trainer.model.config.slim["kept"] == ticket.counts()
    assert model.config.model_type == "bert"
    described = json.loads((tmp_path / "sparse_hf.json").read_text())
    assert described["kind"] == "slim_model"
    assert described["method"] == "magnitude_units"

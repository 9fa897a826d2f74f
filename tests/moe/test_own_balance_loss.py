"""A stock model's own balance loss is turned off, said once, and never quietly replaced where somebody chose it."""

import pytest

from sparse_hf.moe.own_balance_loss import turn_off_own_balance_loss
from tiny_models import tiny_inputs, tiny_model


FAMILIES = ["mixtral", "qwen2-moe", "qwen3-moe", "gpt-oss"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_becomes_the_tasks(family, caplog):
    default = type(tiny_model(family).config)().router_aux_loss_coef
    changes = {"output_router_logits": True, "router_aux_loss_coef": default}
    model, plain = tiny_model(family, "causal_lm", **changes), tiny_model(family, "causal_lm")
    inputs = tiny_inputs(model)
    inputs["labels"] = inputs["input_ids"]
    task = plain(**inputs).loss
    assert model(**inputs).loss > task
    turn_off_own_balance_loss(model)
    turn_off_own_balance_loss(model)
    assert model(**inputs).loss == task
    assert [one.message for one in caplog.records if one.name == turn_off_own_balance_loss.__module__] == [
        f"The model's own balance loss (`router_aux_loss_coef`={default}) is turned off: `balance` takes its place."
    ]
    assert model.config.router_aux_loss_coef == default  # what is saved


def test_a_chosen_coefficient_is_an_error():
    model = tiny_model("mixtral", "causal_lm", output_router_logits=True, router_aux_loss_coef=0.05)
    with pytest.raises(ValueError, match="the model's own with `router_aux_loss_coef`=0.05"):
        turn_off_own_balance_loss(model)
    model.config.output_router_logits = False
    turn_off_own_balance_loss(model)


def test_a_loss_that_is_not_in_use_needs_no_word(caplog):
    model = tiny_model("mixtral", "causal_lm", router_aux_loss_coef=0.05)
    turn_off_own_balance_loss(model)
    assert not caplog.records
    inputs = tiny_inputs(model)
    inputs["labels"] = inputs["input_ids"]
    # Not even where a caller asks for logits.
    assert model(**inputs, output_router_logits=True).loss == model(**inputs).loss

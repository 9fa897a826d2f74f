"""LoRA on a base that is pruned: the base's zeros are not in the adapter's files, but the masks beside them are."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from sparse_hf import StaticSparsityConfig, Ticket
from training.tiny_training import tiny_classifier, tiny_rows, tiny_trainer


def logits(model):
    rows = torch.stack([torch.as_tensor(row["input_ids"]) for row in tiny_rows()[:4]])
    with torch.no_grad():
        return model.eval()(rows).logits


def test_the_base_is_pruned_and_a_ticket_brings_its_zeros_back(tmp_path):
    adapted = get_peft_model(tiny_classifier(), LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    trainer = tiny_trainer(tmp_path, StaticSparsityConfig(sparsity=0.5), adapted, max_steps=3, learning_rate=1e-2)
    trainer.train()
    trainer.save_model()
    masks = trainer.ticket.masks()
    assert masks
    assert not any("lora" in name for name in masks)
    parameters = dict(adapted.named_parameters())
    bases = [one for name, one in parameters.items() if name.endswith("query.base_layer.weight")]
    assert sum(int((one == 0).sum()) for one in bases) > 0
    assert not any((one == 0).any() for name, one in parameters.items() if "lora_" in name)

    base = tiny_classifier()
    Ticket.from_pretrained(tmp_path).apply(base)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path)), logits(adapted))
    dense = PeftModel.from_pretrained(tiny_classifier(), tmp_path)
    assert not torch.equal(logits(dense), logits(adapted))

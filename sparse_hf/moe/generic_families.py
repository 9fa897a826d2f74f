"""How do checkpoints of families without a mixture-of-experts sibling name their FFNs?

Names are those on disk, which for ViT differ from the modules'; `modeling_mixture.FEED_FORWARDS` has the modules.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class StoredFeedForward:
    """The tensors of an FFN: names of layers, relative to `{prefix}.{layers}.{number}`, the prefix there or not."""

    prefix: str = field(metadata={"help": "Of the base model's tensors, where a head is beside it."})
    layers: str
    up: tuple[str, ...] = field(metadata={"help": "Linear layers that make the neurons: up, or gate and up."})
    down: str = field(metadata={"help": "Linear layer that reads the neurons."})
    block: str = field(metadata={"help": "The mixture."})
    transposed: bool = field(default=False, metadata={"help": "Conv1D: weights are (inputs, outputs)."})
    biased: bool = True
    buffers: tuple[str, ...] = field(
        default=(), metadata={"help": "Ends of names that old checkpoints hold and no model reads."}
    )
    foreign: tuple[str, ...] = field(
        default=(), metadata={"help": "Beginnings of names that a mixture has no place for."}
    )


def _bert_like(prefix: str) -> StoredFeedForward:
    return StoredFeedForward(
        prefix=prefix,
        layers="encoder.layer",
        up=("intermediate.dense",),
        down="output.dense",
        block="output.dense",
        buffers=("embeddings.position_ids",),
    )


def _t5(*up: str) -> StoredFeedForward:
    ffn = "layer.1.DenseReluDense"
    return StoredFeedForward(
        prefix="transformer",
        layers="encoder.block",
        up=tuple(f"{ffn}.{name}" for name in up),
        down=f"{ffn}.wo",
        block=ffn,
        biased=False,
        foreign=("decoder.", "transformer.decoder.", "lm_head."),
    )


# The variants of each family by `model_type`; the one whose names are in the checkpoint is taken.
STORED_FEED_FORWARDS: dict[str, tuple[StoredFeedForward, ...]] = {
    "bert": (_bert_like("bert"),),
    "roberta": (_bert_like("roberta"),),
    "gpt2": (
        StoredFeedForward(
            prefix="transformer",
            layers="h",
            up=("mlp.c_fc",),
            down="mlp.c_proj",
            block="mlp",
            transposed=True,
            buffers=(".attn.bias", ".attn.masked_bias"),
        ),
    ),
    "vit": (
        StoredFeedForward(
            prefix="vit", layers="encoder.layer", up=("intermediate.dense",), down="output.dense", block="mlp"
        ),
    ),
    "t5": (_t5("wi"), _t5("wi_0", "wi_1")),
}

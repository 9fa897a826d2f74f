"""Where are the heads and neurons of each family? Tables, keyed by `config.model_type`.

Each family has the tables of its variants; the one whose paths all exist in the model is taken. Checked against
Transformers 5.17 and 5.23.
"""

from sparse_hf.anatomy.modeling_slim import UnitTable


def _bert_like() -> UnitTable:
    return UnitTable(
        layers="encoder.layer",
        head_projections={"attention.self.query": 1, "attention.self.key": 1, "attention.self.value": 1},
        head_output="attention.output.dense",
        head_attributes={"attention.self": ["num_attention_heads", "all_head_size"]},
        neuron_projections={"intermediate.dense": 1},
        neuron_output="output.dense",
        stock_names={"neurons": "intermediate_size"},
    )


def _llama_like() -> UnitTable:
    return UnitTable(
        layers="layers",
        head_projections={"self_attn.q_proj": 1, "self_attn.k_proj": 1, "self_attn.v_proj": 1},
        head_output="self_attn.o_proj",
        neuron_projections={"mlp.gate_proj": 1, "mlp.up_proj": 1},
        neuron_output="mlp.down_proj",
        stock_names={
            "heads": "num_attention_heads",
            "key_value_heads": "num_key_value_heads",
            "head_size": "head_dim",
            "neurons": "intermediate_size",
        },
    )


def _t5(*neuron_projections: str) -> UnitTable:
    # Of the encoder. Its config has the decoder's sizes too, so no stock name can tell what is missing.
    attention = "layer.0.SelfAttention"
    return UnitTable(
        layers="encoder.block",
        head_projections={f"{attention}.q": 1, f"{attention}.k": 1, f"{attention}.v": 1},
        head_output=f"{attention}.o",
        head_attributes={attention: ["n_heads", "inner_dim"]},
        neuron_projections={f"layer.1.DenseReluDense.{name}": 1 for name in neuron_projections},
        neuron_output="layer.1.DenseReluDense.wo",
        position_bias=f"{attention}.relative_attention_bias",
    )


UNIT_TABLES: dict[str, tuple[UnitTable, ...]] = {
    "bert": (_bert_like(),),
    "roberta": (_bert_like(),),
    "distilbert": (
        UnitTable(
            layers="transformer.layer",
            head_projections={"attention.q_lin": 1, "attention.k_lin": 1, "attention.v_lin": 1},
            head_output="attention.out_lin",
            head_attributes={"attention": ["n_heads"]},
            neuron_projections={"ffn.lin1": 1},
            neuron_output="ffn.lin2",
            stock_names={"neurons": "hidden_dim"},
        ),
    ),
    "vit": (
        UnitTable(
            layers="layers",
            head_projections={"attention.q_proj": 1, "attention.k_proj": 1, "attention.v_proj": 1},
            head_output="attention.o_proj",
            head_attributes={"attention": ["num_attention_heads"]},
            neuron_projections={"mlp.fc1": 1},
            neuron_output="mlp.fc2",
            stock_names={"heads": "num_attention_heads", "head_size": "head_dim", "neurons": "intermediate_size"},
        ),
    ),
    "gpt2": (
        UnitTable(
            layers="h",
            head_projections={"attn.c_attn": 3},
            head_output="attn.c_proj",
            head_attributes={"attn": ["num_heads", "split_size"]},
            neuron_projections={"mlp.c_fc": 1},
            neuron_output="mlp.c_proj",
            stock_names={"neurons": "n_inner"},
        ),
    ),
    "llama": (_llama_like(),),
    "mistral": (_llama_like(),),
    "qwen2": (_llama_like(),),
    "qwen3": (_llama_like(),),
    "t5": (_t5("wi"), _t5("wi_0", "wi_1")),
}

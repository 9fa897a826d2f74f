"""Where does Transformers keep in memory what a mixture's checkpoint holds under other names?

In memory all experts of a layer are two parameters: `gate_up_proj` of shape (experts, 2 neurons, hidden), the gate's
rows first, and `down_proj` of shape (experts, hidden, neurons). Most checkpoints hold a tensor per matrix.
"""

from dataclasses import dataclass

from sparse_hf.moe.targets import Target


# Module of the experts in a decoder layer, where it is not "mlp.experts".
EXPERTS = {
    "granitemoe": "block_sparse_moe.experts",
    "granitemoeshared": "block_sparse_moe.experts",
    "lfm2_moe": "feed_forward.experts",
}
# Parts of stored names and what stands for them in memory.
RENAMED = (
    ("block_sparse_moe.gate.", "mlp.gate."),
    ("block_sparse_moe.router.layer.", "block_sparse_moe.router."),
    ("mlp.moe_statics.", "mlp.gate.moe_statics."),
)
PARAMETERS = {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "down_proj": ("down_proj", 0)}


@dataclass(frozen=True)
class Place:
    """Where one dense matrix of one expert lies: in `parameter`, as its `part`-th matrix (gate 0, up 1, down 0)."""

    parameter: str
    expert: int
    part: int


def expert_targets(target: Target) -> list[str]:
    """The experts' parameters as PEFT's `target_parameters` wants them: ends of names."""
    module = EXPERTS.get(target.model_type, "mlp.experts")
    return [f"{module}.gate_up_proj", f"{module}.down_proj"]


def router_module(target: Target) -> str:
    """The router's module as PEFT's `modules_to_save` wants it: the end of its name."""
    return memory_name(target.router).removeprefix("model.layers.{layer}.").removesuffix(".weight")


def memory_name(name: str) -> str:
    """The parameter or buffer that a stored tensor becomes; not for the experts' matrices."""
    for stored, there in RENAMED:
        name = name.replace(stored, there)
    return name


def expert_places(target: Target, layers: int, experts: int) -> dict[str, tuple[Place, ...]]:
    """The places of the matrices that a stored tensor of experts holds, one after the other, by its name."""
    module, found = EXPERTS.get(target.model_type, "mlp.experts"), {}
    for layer in range(layers):
        for template, matrices in target.experts.items():
            places = [
                tuple(Place(f"model.layers.{layer}.{module}.{name}", expert, part) for name, part in both)
                for expert in range(experts)
                for both in [[PARAMETERS[matrix] for matrix in matrices]]
            ]
            if "{expert}" in template:
                found |= {template.format(layer=layer, expert=expert): one for expert, one in enumerate(places)}
            else:
                found[template.format(layer=layer)] = tuple(place for one in places for place in one)
    return found

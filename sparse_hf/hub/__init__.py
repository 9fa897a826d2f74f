"""How a sparse model is described to people: pictures now, cards and compressed checkpoints later."""

"""Mixtures of experts: made from dense checkpoints, in the form that stock Transformers and engines load."""

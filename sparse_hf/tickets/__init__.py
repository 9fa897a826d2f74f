"""Which weights stay: lottery tickets and sparsity methods as data plus small steps."""

"""DSEE: sparse frozen weights plus a low-rank and a sparse update, as a PEFT method."""

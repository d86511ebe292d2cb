"""How a piece gets into a model and out again. Knows no method by name."""

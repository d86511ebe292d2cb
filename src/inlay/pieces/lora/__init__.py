"""LoRA's piece, and what its relatives make of it: how factors start, ranks that grow or shrink, many at once."""

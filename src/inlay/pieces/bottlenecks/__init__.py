"""The bottleneck networks of adapters, plain and of other forms, and the pieces that run them."""

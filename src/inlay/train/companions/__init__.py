"""Companions of an optimiser: each changes what one does to an adapter, and works with any loop."""

"""What the pieces of several methods share: bases to build on, starts, and what stands in for several. No method."""

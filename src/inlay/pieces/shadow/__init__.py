"""A small trained network beside a model (the shadow): its state enters every block, and moves by what comes out."""

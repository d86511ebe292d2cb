"""What multiplies the activations: scales and rotations."""

"""How dense the activations of feed-forward networks are: watched in training, measured on data."""

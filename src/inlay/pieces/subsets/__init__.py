"""Which entries of a model matter, and changes of these alone."""

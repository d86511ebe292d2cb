"""What the places of a model share: frozen random bases, trained vectors."""

"""How an example becomes what a model reads: templates, label words, demonstrations, token ids."""

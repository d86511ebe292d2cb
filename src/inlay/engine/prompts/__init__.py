"""How prompts and prefixes enter a model whose code is never touched."""

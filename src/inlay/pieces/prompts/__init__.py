"""What prompts and prefixes share: where they start, what they are made of, and whom they learn from."""

"""The hot path: what methods compute in every step, each beside its plain reference."""

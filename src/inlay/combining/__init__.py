"""Adapters made out of adapters."""

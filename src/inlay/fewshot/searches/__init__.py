"""Searches for label words and templates, and the ranking of what they find."""

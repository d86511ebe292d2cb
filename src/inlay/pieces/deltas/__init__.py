"""Changes of a weight that are neither a plain product of rank r nor a plain matrix."""

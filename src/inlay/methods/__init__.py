"""One file per method: the paper and the formula, a frozen dataclass, an nn.Module. Found by file name on first use."""

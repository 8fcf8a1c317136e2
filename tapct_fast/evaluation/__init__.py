"""What frozen features are worth: the same splits, heads and budget for every backbone."""

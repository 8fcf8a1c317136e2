"""What frozen features are used for: whole-scan embedding and probes."""

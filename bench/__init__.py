"""Benchmarks: one module per subject, each ``python -m bench.<name>`` from the repository root.

``results/<device>.jsonl`` holds committed rows; ``gpu.sh`` measures what is missing or stale there.
"""

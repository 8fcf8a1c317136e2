"""Benchmarks: one module per subject, each ``python -m bench.<name>`` from the repository root.

``python -m bench`` (``tapct-fast bench``) lists, runs, compares and plots them; ``pytest bench``
runs the ops under pytest-benchmark; ``python -m bench.tune`` chooses launch configurations.

``results/<device>.jsonl`` holds committed rows; ``gpu.sh`` measures what is missing or stale there.
"""

"""Speed and memory claims, one file each: `python -m bench NAME`, or `make bench` for all of them.

A claim is a module with `run(rounds=...)`, which returns lines (`bench/claim.py`): a figure, the goal beside it, and
the peer's figure from the same run. Ratios are of sides measured in turn in one process, A B A B ..., after all of them
were warmed up: the median of the per-round ratios with a 95 % bootstrap interval. Memory is measured in processes of
their own (`bench/probe_memory.py`). What was measured is kept in bench/results; docs/performance.md is written from it.
Nothing here is a test.
"""

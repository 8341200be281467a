"""Benchmarks of softjax and its peers: `python -m benchmarks list | run [SUITE...]`."""

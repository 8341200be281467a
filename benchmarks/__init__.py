"""Benchmarks of softjax beside its peers: `python -m benchmarks list | run [SUITE...]`."""

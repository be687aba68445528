"""Measurements: speed beside other ways to attend, and the record of what ran on which GPU.

`python -m benchmarks.op`, `python -m benchmarks.model`, `python -m benchmarks.gpu` and
`python -m benchmarks.freshness`, from the root of a checkout. Nothing here is installed.
"""

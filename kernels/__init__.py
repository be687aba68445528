"""CUDA sources (`*.cu`, `*.cuh`), read as text and compiled at run time."""

"""The CUDA engine: `plan` (arithmetic), `jit` (text to launch), `ops` (the torch contract).

In: nothing. Out: nothing; importing this package imports neither CuPy nor any of its rooms.
"""

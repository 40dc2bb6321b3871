"""The two operations of a memory mosaic: the masked retrieval and the leaky average.

Each folder holds one operation: `api.py` (signature, checks, choice of the implementation), `reference.py` (the
definition, dense and differentiable by jax), `blockwise.py` (the XLA path with its own derivative) and `hopper*.py`
(Mosaic GPU kernels).
Dimension letters are those of `mosaics_jax/dims.py`.
"""

"""The legend: one letter for every tensor dimension, one name for every logical and mesh axis.

A tensor's suffix spells its shape (`key_BTHK`); letters are logical dimensions and do not change under sharding.
"Dimension" (dim) is said of tensors, "axis" of the device mesh.

| letter | dimension | letter | dimension |
|---|---|---|---|
| B | batch: sequences, or rows of packed documents | K | head width (key width) |
| T | time: query positions | V | head width of values in the operations; vocabulary in the model |
| S | stored positions a query may read | F | feed-forward width, d' |
| D | model width, d | L | layers (depth), of scanned parameters |
| H | heads | M | contextual memories of a block |
| C | positions of one chunk | N | chunks |
"""

from typing import Final

# Logical axes: what a dimension of a parameter or an activation means. `sharding.py` maps each to the mesh.
LAYER: Final = "layer"
VOCABULARY: Final = "vocabulary"
WIDTH: Final = "width"
HEADS: Final = "heads"
HEAD_WIDTH: Final = "head_width"
FFN: Final = "ffn"
MEMORY: Final = "memory"
NORM: Final = "norm"  # the model width of a norm's scale

# Mesh axes, outermost first.
DATA: Final = "data"
FSDP: Final = "fsdp"
SEQUENCE: Final = "sequence"
TENSOR: Final = "tensor"
MESH_AXES: Final = (DATA, FSDP, SEQUENCE, TENSOR)


def is_matrix(axes: tuple[str, ...]) -> bool:
    """Whether a parameter with these logical axes is a matrix; norms and per-head scalars are not, stacked or not."""
    return len([axis for axis in axes if axis != LAYER]) > 1

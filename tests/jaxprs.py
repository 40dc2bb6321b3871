"""What a traced program holds, without running it."""

import math
from collections.abc import Iterator

import jax
import numpy as np


def array_sizes(jaxpr) -> Iterator[int]:
    """The number of elements of every array in a program and the programs inside it."""
    if hasattr(jaxpr, "consts"):
        yield from (np.size(const) for const in jaxpr.consts)
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for variable in (*jaxpr.invars, *jaxpr.constvars, *jaxpr.outvars):
        yield math.prod(variable.aval.shape)
    for equation in jaxpr.eqns:
        yield from (math.prod(variable.aval.shape) for variable in equation.outvars)
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            if hasattr(inner, "eqns"):
                yield from array_sizes(inner)

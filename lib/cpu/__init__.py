"""Optional: faster modules for a built model on a CPU with AVX-512. The network imports none of it.

:func:`accelerate` exchanges the classes of a model's modules for subclasses with the same
parameters, whose ``forward`` uses oneDNN and prepared weights. They compute what the plain modules
do, to rounding, and run the plain ``forward`` where theirs does not apply: on a GPU, in a compiled
or exported graph, under functorch, forward-mode differentiation, tensor subclasses and whatever
intercepts operators (FLOP counters, fake tensors). Second derivatives need a plain model.
"""

from lib.cpu.capability import multiplies_bfloat16, pays
from lib.cpu.modules import accelerate

__all__ = ["accelerate", "multiplies_bfloat16", "pays"]

"""A step of decoding as one CUDA graph: a GPU is done with its small products sooner than a host can launch them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class StepGraph:
    """What `step` launches, recorded once and then replayed, with other numbers in the same tensors.

    `step` takes tensors of the shapes of `inputs` and returns one; all else that it reads and writes stays where it is,
    and it may not look at a number on the host. Recording runs nothing.
    """

    def __init__(self, step: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
        self.inputs = [x.clone() for x in inputs]
        with torch.cuda.device(inputs[0].device):  # the current one may be another, whose stream would record nothing
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.output = step(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """A tensor of its own, which the next replay leaves alone."""
        for kept, given in zip(self.inputs, inputs, strict=True):
            kept.copy_(given)
        self.graph.replay()
        return self.output.clone()

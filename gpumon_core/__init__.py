"""gpumon, the GPU Model Monitor: what the GPUs do, who does it, and what happened before."""

__version__ = "0.1.0"

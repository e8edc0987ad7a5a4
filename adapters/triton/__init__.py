"""NVIDIA Triton Inference Server, the one bundled in the wheel ``nvidia-pytriton``, with its Python backend."""

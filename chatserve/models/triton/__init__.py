"""Triton kernels for CUDA. Every module here imports triton: import them inside functions only.

Each kernel is judged by the plain PyTorch code in `chatserve.models` (tests/unit/models), run in
Triton's interpreter where there is no GPU. No model, no policy, no engine.
"""

"""CPU kernels in C++ behind a plain C interface. No torch, no Python objects inside.

`src/` is compiled by `build` when the package is installed; `library` loads the result.
"""

"""How the members of a cohort share a device: `layouts.py` has one generator for each way.

`stacked.py` trains members as one computation, with the optimizer of `stacked_adam.py` and the kernels of
`stacked_kernels.py`; `graphs.py` captures each member's epoch as CUDA graphs.
"""

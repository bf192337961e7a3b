"""Algorithms take tensors and return tensors. They know no structure; structures call them.

Each algorithm is one file, which holds its plain torch version and its compiled kernels.
"""

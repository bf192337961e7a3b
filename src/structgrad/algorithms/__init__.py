"""Algorithms: tensors in, tensors out. They know no structure; structures are made of them.

One file an algorithm, its plain torch version and its compiled kernel together.
"""

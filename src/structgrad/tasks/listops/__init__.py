"""Unsupervised parsing on ListOps (Paulus et al. 2020, section 8.2)."""

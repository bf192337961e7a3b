"""Structures: finite sets of vertices, known through their oracles."""

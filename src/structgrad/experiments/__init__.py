"""Runs and tables. This package reads the folders of runs and knows no model."""

"""Runs and tables: reads run folders, knows no model."""

"""Neural relational inference of the graph behind a layout (Paulus et al. 2020, section 8.1)."""

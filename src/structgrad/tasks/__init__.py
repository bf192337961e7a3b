"""The experiments: data, encoder, decoder, objective and metrics."""

"""Exact backpropagation along the sequence. Knows no model, no file and no process group."""

"""Whole folders of videos on all cores, GPUs and machines that Ray has: memories, and tables of Δ and tokens."""

"""Measuring: each bench prints figures that README and docs quote with the command that reproduces them."""

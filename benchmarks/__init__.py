"""Measured figures and the tools that make pages of them."""

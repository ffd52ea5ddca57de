"""What one client computes: local SGD, batch normalisation, and how its machine does it."""

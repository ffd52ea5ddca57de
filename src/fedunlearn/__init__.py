"""fedunlearn makes a federated image classifier forget classes, fast, and shows that it did."""

__version__ = "0.1.0"

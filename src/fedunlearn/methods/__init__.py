"""Methods to compare with, one file each, on the same federation."""

"""What clients minimise beside or instead of the cross-entropy of the images that stay: a file each, and a table."""

"""What is measured, ranked and cut: the channels of convolutions."""

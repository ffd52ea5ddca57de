"""What an unlearned model still knows of the forgotten class, held against models retrained without it.

One file per audit, each a plain function on tensors or on a model; ``measure.py`` does them all on one model and
``verdict.py`` holds the figures against the retrained models.
"""

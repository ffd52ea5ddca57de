"""All methods and controls that a run compares with, in the order of its tables."""

from fedunlearn.methods.base import Method
from fedunlearn.methods.erase_only import ERASE_ONLY
from fedunlearn.methods.finetune import FINETUNE
from fedunlearn.methods.head_only import HEAD_ONLY
from fedunlearn.methods.original import ORIGINAL
from fedunlearn.methods.pruned import PRUNED
from fedunlearn.methods.random import RANDOM

CONTROLS: tuple[Method, ...] = (ORIGINAL, HEAD_ONLY, PRUNED, RANDOM, FINETUNE, ERASE_ONLY)

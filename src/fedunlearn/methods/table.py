"""All methods and controls, in the order of their tables."""

from fedunlearn.methods.base import Method
from fedunlearn.methods.distil import DELETE
from fedunlearn.methods.erase_only import ERASE_ONLY
from fedunlearn.methods.finetune import FINETUNE
from fedunlearn.methods.head_only import HEAD_ONLY
from fedunlearn.methods.l1_sparse import L1_SPARSE
from fedunlearn.methods.neg_grad import NEG_GRAD
from fedunlearn.methods.negate import NEGATE
from fedunlearn.methods.original import ORIGINAL
from fedunlearn.methods.prune import CONTRAST, ERASE, TF_IDF
from fedunlearn.methods.pruned import PRUNED
from fedunlearn.methods.random import RANDOM
from fedunlearn.methods.relabel import RELABEL
from fedunlearn.methods.salun import SALUN
from fedunlearn.methods.scrub import SCRUB
from fedunlearn.methods.ssd import SSD
from fedunlearn.methods.svd import SVD

# What a run compares its own unlearning with.
CONTROLS: tuple[Method, ...] = (ORIGINAL, HEAD_ONLY, PRUNED, RANDOM, FINETUNE, ERASE_ONLY)
# What a recipe can name in unlearn.method.
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        TF_IDF,
        CONTRAST,
        ERASE,
        ERASE_ONLY,
        FINETUNE,
        L1_SPARSE,
        NEG_GRAD,
        SALUN,
        NEGATE,
        DELETE,
        SSD,
        SVD,
        RELABEL,
        SCRUB,
    )
}
# What a comparison does: also what only seems to forget.
COMPARED = METHODS | {method.name: method for method in (RANDOM, HEAD_ONLY)}

"""transformers models, of any family, without code for any of them.

    model = AutoModelForCausalLM.from_pretrained(path)
    report = lt.apply(model, lt.Plan(chunk_tokens=4096))

Read `mask.py` (what a mask is), `attention.py` (our attention under transformers' interface), `trace.py` (how layers are found),
`observe.py` (what a layer shows when it is run), `layer.py` (how it becomes streamable), `head.py` (the loss without logits), `model.py`
(all of it together). Importing this package registers "longtrain" with transformers, so that ``attn_implementation="longtrain"`` works
alone too, for training and for generation.
"""

try:
    import transformers
except ImportError as error:
    raise ImportError('longtrain.hf needs transformers: pip install "longtrain[hf]"') from error

from transformers import AttentionInterface, AttentionMaskInterface

from longtrain.hf.attention import longtrain_attention
from longtrain.hf.mask import longtrain_mask

OLDEST, FIRST_UNTRIED = (5, 21), (6, 0)
"""Tried with 5.21, 5.22 and 5.23. Before, `sdpa` attention ignored softcaps without a word; with 6 the interfaces may change."""


def check_version(version: str) -> None:
    """Raise ImportError for a transformers outside the range that is known to work."""
    if not OLDEST <= tuple(int(part) for part in version.split(".")[:2]) < FIRST_UNTRIED:
        raise ImportError(
            f"longtrain.hf works with transformers >= {'.'.join(map(str, OLDEST))}, < {FIRST_UNTRIED[0]}; found {version}: "
            'pip install "longtrain[hf]"'
        )


check_version(transformers.__version__)
AttentionInterface.register("longtrain", longtrain_attention)
AttentionMaskInterface.register("longtrain", longtrain_mask)

from longtrain.hf.model import adapt, pretrained_of  # noqa: E402  (it sets the implementation registered above)
from longtrain.hf.promise import LazyHidden  # noqa: E402
from longtrain.hf.share import share  # noqa: E402

__all__ = ["LazyHidden", "adapt", "longtrain_attention", "longtrain_mask", "pretrained_of", "share"]

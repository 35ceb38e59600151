"""Documents: where they come from, tokens on disk, packing into sequences. What an update reads of them is for `train/loader.py` to say.

Read in this order: `corpus.py`, `packing.py`; then `built.py` and `build.py` for what is on disk.
"""

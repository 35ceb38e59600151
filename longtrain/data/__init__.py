"""Documents: where they come from, tokens on disk, packing into sequences, and the loader of what each update reads.

Read in this order: `corpus.py`, `packing.py`, `loader.py`; then `built.py` and `build.py` for what is on disk.
"""

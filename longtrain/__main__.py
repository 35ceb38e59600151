"""`python -m longtrain`, as torchrun starts it: `torchrun --nproc-per-node=P -m longtrain train CONFIG`."""

import sys

from longtrain.cli import main

if __name__ == "__main__":
    sys.exit(main())

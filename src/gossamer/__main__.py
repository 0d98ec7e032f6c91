"""The command line as a module: `torchrun --nproc-per-node 2 -m gossamer pretrain ...`."""

import sys

from gossamer.cli import main

if __name__ == "__main__":
    sys.exit(main())

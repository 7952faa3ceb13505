"""Every op, forward and backward, on each instruction set this CPU has, and on a GPU: `llmc bench kernels`, from a
checkout.

    python bench/kernels.py                                    # GPT-2 124M's shapes at B=4, T=64
    python bench/kernels.py --init d1 --seconds 0 --repeats 1  # does it run?
    python bench/kernels.py --device cuda --dtype fp32,tf32,bf16
"""

import sys

from simulate import simulate

from llmc.__main__ import main

if __name__ == "__main__":
    simulate()
    sys.exit(main(["bench", "kernels", *sys.argv[1:]]))

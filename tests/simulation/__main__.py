"""`python -m simulation train --device cuda ...`, from the folder of tests: llmc on the simulated GPU."""

from __future__ import annotations

import sys

import simulation
from llmc.__main__ import main

simulation.load()
sys.exit(main())

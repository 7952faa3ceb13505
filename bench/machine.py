"""What a figure must be read with, as the package knows it."""

from llmc.machine import commit, facts, installed, memory, processor
from llmc.results import table

__all__ = ["commit", "facts", "installed", "memory", "processor", "table"]

"""CHGNet interatomic potentials: train, fine-tune and run them, fast."""

from importlib.metadata import version

__version__ = version("fastchgnet")

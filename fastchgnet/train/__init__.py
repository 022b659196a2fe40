"""Training: `train(config)` runs a `RunConfig`."""

from fastchgnet.train.loop import Watcher
from fastchgnet.train.run import Summary, train

__all__ = ["Summary", "Watcher", "train"]

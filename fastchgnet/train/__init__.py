"""Training: `train(config)` runs a `RunConfig`."""

from fastchgnet.train.loop import Summary, Watcher, train

__all__ = ["Summary", "Watcher", "train"]

"""Files of labelled crystals in, a memory-mapped store of them out."""

"""What `fastchgnet bench` runs: ours and the published chgnet in one process, on the same frames."""

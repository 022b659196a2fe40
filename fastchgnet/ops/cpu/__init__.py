"""C++ bodies of the ops, for CPUs."""

"""`python -m fastchgnet` is `fastchgnet`, so that torchrun can start it."""

from fastchgnet.cli import main

main()

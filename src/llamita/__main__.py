"""`python -m llamita`, and so `torchrun -m llamita`: the command line."""

import sys

from llamita.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m nbdserver` and the command `sheepfold`."""

import sys

from nbdserver.cli import main

if __name__ == "__main__":
    sys.exit(main())

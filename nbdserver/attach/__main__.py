"""`python3 -m nbdserver.attach`: for an initramfs, where the command `sheepfold` is not."""

import sys

from nbdserver.attach.command import main

if __name__ == "__main__":
    sys.exit(main())

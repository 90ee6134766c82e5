"""`python -m openemu3.cli` is the command `emu3`."""

import sys

from openemu3.cli import main

sys.exit(main())

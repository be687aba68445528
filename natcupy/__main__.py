"""`python -m natcupy` is the command `natcupy`."""

import sys

from natcupy.cli import main

sys.exit(main())

"""``python -m xipfs`` is the ``xipfs`` command."""

import sys

from xipfs.cli import main

sys.exit(main())

"""`python -m deit_models.cli` is the `deit-models` command."""

import sys

from . import main

sys.exit(main())

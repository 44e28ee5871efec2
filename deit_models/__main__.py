"""`python -m deit_models` is the `deit-models` command."""

import sys

from .cli import main

sys.exit(main())

"""`python -m budgetnet`: the command line."""

import sys

from budgetnet.cli import main

sys.exit(main())

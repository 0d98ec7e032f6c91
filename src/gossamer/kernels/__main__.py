"""`python -m gossamer.kernels`: compile what is optional, for the processor at hand, and say where it is."""

import sys

from gossamer.errors import UserError
from gossamer.kernels import native

try:
    print(native.build())
except (UserError, OSError) as error:
    sys.exit(str(error))

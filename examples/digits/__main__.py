"""`python -m examples.digits`: the demo. Here, so that Ctrl-C is understood while scikit-learn is still loading."""

import signal
import sys

try:
    from examples.digits.demo import main

    main()
except KeyboardInterrupt:
    sys.exit(128 + signal.SIGINT)

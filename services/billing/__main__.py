"""``python -m services.billing [rebuild]``."""

import sys

from services.billing.app import main
from services.billing.rebuilding import main as rebuild
from services.kit.lifecycle import EXIT_USAGE, run_service

if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["rebuild"]):
        sys.stderr.write("usage: python -m services.billing [rebuild]\n")
        sys.exit(EXIT_USAGE)
    run_service(rebuild if sys.argv[1:] else main)

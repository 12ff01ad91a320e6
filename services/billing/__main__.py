"""``python -m services.billing``."""

from services.billing.app import main
from services.kit.lifecycle import run_service

if __name__ == "__main__":
    run_service(main)

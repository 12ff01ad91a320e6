"""``python -m services.delivery``."""

from services.delivery.workers import main
from services.kit.lifecycle import run_service

if __name__ == "__main__":
    run_service(main)

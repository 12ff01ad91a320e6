"""``python -m services.producer``."""

from services.kit.lifecycle import run_service
from services.producer.app import main

if __name__ == "__main__":
    run_service(main)

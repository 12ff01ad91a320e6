"""``python -m bench``: measure the relay end to end, fan-out and billing, and check what holds under faults."""

import click

from bench.billing.command import billing
from bench.chaos.command import chaos
from bench.chaos.kills_command import billing_kills
from bench.fanout.command import fanout
from bench.relay.command import relay


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def main() -> None:
    """Measure Tailrace on this machine. Everything runs on loopback ports that are free, in a temporary folder."""


for command in (billing, billing_kills, chaos, fanout, relay):
    main.add_command(command)


if __name__ == "__main__":
    main(prog_name="python -m bench")

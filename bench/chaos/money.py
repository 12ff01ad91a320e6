"""Check the ledger's guarantee: its sums are the price of the final usage, and budgets agree with it. Pure.

The price is computed independently here: a checker must not share the code that it checks.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from decimal import Decimal
from typing import Final

from bench.chaos.bills import Call, calls_of
from bench.chaos.evidence import Evidence
from bench.chaos.history import Exported
from bench.chaos.told import Told
from bench.chaos.violation import Violation

__all__ = ["INPUT_PRICE", "OUTPUT_PRICE", "PRICES", "check_money"]

INPUT_PRICE: Final = Decimal("1.25")
OUTPUT_PRICE: Final = Decimal("10.000001")
PRICES: Final = (
    "provider,model,class,currency,amount,from,until\r\n"
    f"chaos,*,input,USD,{INPUT_PRICE},2020-01-01,\r\n"
    f"chaos,*,output,USD,{OUTPUT_PRICE},2020-01-01,\r\n"
)
_MILLION: Final = 1_000_000


def check_money(evidence: Evidence) -> Iterator[Violation]:
    """Compare the ledger with the log and the exports, and the spending sums with the ledger."""
    if evidence.amounts is None:
        return
    sums: dict[str, Decimal] = defaultdict(Decimal)
    numbers: dict[str, list[int]] = defaultdict(list)
    for entry in evidence.amounts.entries:
        sums[entry["generation"]] += Decimal(entry["amount"])
        numbers[entry["generation"]].append(entry["number"])
    tokens = Counter[str]()
    for name, told in evidence.told.items():
        if sorted(numbers[name]) != list(range(1, len(numbers[name]) + 1)):
            yield Violation("ledger", name, f"its entries are numbered {sorted(numbers[name])}")
        allowed = list(_costs(told, evidence, name))
        found = next(((cost, used) for cost, used in allowed if cost == sums[name]), None)
        if found is None:
            yield Violation("ledger", name, f"entries sum up to {sums[name]}, and it cost one of {allowed}")
        else:
            tokens["all"] += found[1]
    spent = sum((Decimal(row["amount"]) for row in evidence.amounts.spending), Decimal(0))
    if spent != sum(sums.values(), Decimal(0)):
        yield Violation("spending", "all", f"{spent} is what budgets know, {sum(sums.values())} stands in the ledger")
    used = sum(row["tokens"] for row in evidence.amounts.spending)
    if used != tokens["all"]:
        yield Violation("spending", "all", f"{used} tokens is what budgets know, {tokens['all']} were used")
    for row in evidence.amounts.reserved:
        if row["generation"] in evidence.told:
            yield Violation("reserved", row["generation"], "it has settled, and something is still reserved for it")


def _costs(told: Told, evidence: Evidence, name: str) -> Iterator[tuple[Decimal, int]]:
    """Yield what the generation may have cost, and in tokens: by the last export, where two were brought by either."""
    *left, last = calls_of(told)
    before, used = Decimal(0), 0
    for call in left:  # charged as the provider would, if it sent or reported tokens
        inputs, outputs = _reported_or_counted(call)
        if call.output is not None or call.counted_output:
            before, used = before + _price(inputs, outputs), used + inputs + outputs
    for inputs, outputs in _last(told, last, evidence.exported.get(name, [])):
        yield before + _price(inputs, outputs), used + inputs + outputs


def _last(told: Told, last: Call, exported: list[Exported]) -> Iterator[tuple[int, int]]:
    """Yield the billed tokens of the call that the generation ended with."""
    if not any(entry.type == "completed" for entry in told.terminals):  # by our count, if there are tokens
        told_nothing = not last.counted_output and last.output is None and not exported
        yield (0, 0) if told_nothing else (last.counted_input, last.counted_output)
    elif exported:
        yield from ((export.input, export.output) for export in exported)
    else:
        yield _reported_or_counted(last)


def _reported_or_counted(call: Call) -> tuple[int, int]:
    if call.output is None:
        return call.counted_input, call.counted_output
    return call.input or 0, call.output


def _price(inputs: int, outputs: int) -> Decimal:
    return (inputs * INPUT_PRICE + outputs * OUTPUT_PRICE) / _MILLION

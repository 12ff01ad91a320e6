"""What whoever pays was promised: the ledger's sums are the price of the final usage, and budgets know them. Pure.

The price is reckoned a second time here: a checker must not share the code that it checks.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, Final

from bench.chaos.bills import expected_row
from bench.chaos.evidence import Evidence
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
    """Compare the ledger with the log and the exports, and the sums with the ledger."""
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
    row: dict[str, Any] = expected_row(told)
    exported = evidence.exported.get(name, [])
    if row["state"] != "completed":  # charged by what was counted, if anything was said at all
        used = row["counted_output"]
        told_nothing = not used and row["output"] is None and not exported
        yield _FREE if told_nothing else (_price(row["counted_input"], used), row["counted_input"] + used)
        return
    if exported:
        for export in exported:
            yield _price(export.input, export.output), export.input + export.output
        return
    inputs, outputs = row["input"], row["output"]
    if outputs is None:
        inputs, outputs = row["counted_input"], row["counted_output"]
    yield _price(inputs, outputs), inputs + outputs


_FREE: Final = (Decimal(0), 0)


def _price(inputs: int, outputs: int) -> Decimal:
    return (inputs * INPUT_PRICE + outputs * OUTPUT_PRICE) / _MILLION

"""A promise that was broken."""

import msgspec

__all__ = ["Violation"]


class Violation(msgspec.Struct, frozen=True):
    """``rule``: which promise. ``where``: the generation, subscriber or process. ``detail``: what was seen."""

    rule: str
    where: str
    detail: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.where}: {self.detail}"

"""A violated guarantee."""

import msgspec

__all__ = ["Violation"]


class Violation(msgspec.Struct, frozen=True):
    """``rule``: the guarantee. ``where``: generation, subscriber or process. ``detail``: the observation."""

    rule: str
    where: str
    detail: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.where}: {self.detail}"

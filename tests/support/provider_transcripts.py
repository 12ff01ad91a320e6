"""The recorded answers of providers in ``schemas/vectors/providers``, and their expected parts."""

from pathlib import Path
from typing import Any, NamedTuple

import msgspec

import schemas
from services.producer.core.dialects import Dialect, Parser, dialect_of
from services.producer.core.dialects.joined import join
from services.producer.core.parts import Alive, End, NoticePart, Part, UpstreamFailure

FOLDER = Path(schemas.__file__).parent / "vectors" / "providers"
GENERATION_ID = "gen-1764870200-mQ2VhT8sWcXrYbKd9LpA"


class Transcript(NamedTuple):
    """One answer as it went over the wire."""

    dialect: str
    case: str

    @property
    def wire(self) -> bytes:
        return (FOLDER / self.dialect / f"{self.case}.sse").read_bytes()

    @property
    def expected(self) -> list[dict[str, Any]]:
        return msgspec.json.decode(
            (FOLDER / self.dialect / f"{self.case}.json").read_bytes(), type=list[dict[str, Any]]
        )

    @property
    def is_foreign(self) -> bool:
        """Whether its server departs from the dialect, so that the provider's own SDK reads it otherwise."""
        return self.case.startswith("foreign-")

    @property
    def headers(self) -> dict[str, str]:
        own = {"x-generation-id": GENERATION_ID} if self.dialect == "openrouter" else {}
        return {"content-type": "text/event-stream", **own}

    def spoken_by(self) -> Dialect:
        return dialect_of(self.dialect)  # type: ignore[arg-type]  # folder names are the dialects' names

    def parser(self) -> Parser:
        return self.spoken_by().parser(self.headers)

    def __str__(self) -> str:
        return f"{self.dialect}-{self.case}"


TRANSCRIPTS = [Transcript(path.parent.name, path.stem) for path in sorted(FOLDER.glob("*/*.sse"))]


def read(parser: Parser, chunks: list[bytes]) -> list[Part]:
    """Return the parts of a complete body that arrives in these chunks."""
    parts = [part for chunk in chunks for part in parser.feed(chunk)]
    return [*parts, *parser.finish()]


def described(parts: list[Part]) -> list[dict[str, Any]]:
    """Return parts as in the expectation files: joined, without keep-alives and unset fields.

    Notices, which follow the other parts of a read, are directly before the ending.
    """
    notices: list[Part] = [part for part in parts if isinstance(part, NoticePart)]
    spoken = join([part for part in parts if not isinstance(part, Alive | NoticePart)])
    at = len(spoken) - any(isinstance(part, End | UpstreamFailure) for part in spoken)
    spoken[at:at] = notices
    return [{"part": type(part).__name__, **_without_defaults(part)} for part in spoken]


def _without_defaults(part: Part) -> dict[str, Any]:
    defaults = {f.name: f.default for f in msgspec.structs.fields(part)}
    values = msgspec.to_builtins(part)
    return {name: value for name, value in values.items() if value != defaults[name]}

"""Configured providers and aliases, and the resolution of model names to candidates.

A provider is a dialect at an address with a key; an alias is an ordered list of candidates ``provider/model``. Both are
defined in the configuration file; without providers there, the conventional variables define them.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

import msgspec

from schemas.requests import Announcement
from services.producer.core.dialects import DIALECTS
from services.producer.core.script import MODELS

__all__ = [
    "ENCODINGS",
    "SCRIPTED",
    "Candidate",
    "DeadlineOverrides",
    "Provider",
    "Registry",
    "RegistryError",
    "Secret",
    "UnknownModel",
]

AfterCancel = Literal["estimate", "drain", "lookup"]
SCRIPTED: Final = "scripted"
ENCODINGS: Final = ("cl100k_base", "o200k_base", "o200k_harmony", "qwen3.5")
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class _Convention(msgspec.Struct, frozen=True):
    base_url: str
    key_env: str
    base_url_env: str | None = None


# The variables that the providers' own SDKs read, and the address of each API.
_CONVENTIONS: Final = {
    "openai": _Convention("https://api.openai.com/v1", "OPENAI_API_KEY", "OPENAI_BASE_URL"),
    "anthropic": _Convention("https://api.anthropic.com", "ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL"),
    "cohere": _Convention("https://api.cohere.com", "CO_API_KEY"),
    "openrouter": _Convention("https://openrouter.ai/api/v1", "OPENROUTER_API_KEY"),
}


class RegistryError(ValueError):
    """The configuration of providers or models is invalid; ``problems`` names each with its location."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("providers and models are not usable:\n" + "\n".join(f"  - {p}" for p in problems))


class UnknownModel(LookupError):
    """A model name that is neither an alias nor ``provider/model`` of a configured provider."""

    def __init__(self, model: str, hint: str) -> None:
        self.model = model
        super().__init__(f"model {model[:120]!r} is unknown: {hint}")


class Secret:
    """A value that is hidden in ``repr`` and ``str``; `reveal` returns it."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """Return the value itself."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(***)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)


class DeadlineOverrides(msgspec.Struct, frozen=True, kw_only=True):
    """Deadlines of one model in seconds; ``None`` keeps the producer's own."""

    connect: float | None = None
    first_token: float | None = None
    between_tokens: float | None = None
    total: float | None = None


class Provider(msgspec.Struct, frozen=True, kw_only=True):
    """A configured provider. ``headers`` may contain secrets as well, so they are hidden too.

    ``max_streams`` and ``requests_per_minute`` bound the calls of one producer process. ``after_cancel``: the source of
    a cancelled answer's usage: our own count (``estimate``), the provider's report, read for up to ``drain_seconds``
    (``drain``), or a later query of the provider (``lookup``).
    """

    name: str
    dialect: str
    base_url: str = ""
    key: Secret | None = None
    headers: Mapping[str, str] = {}
    include_usage: bool = True
    max_streams: int | None = None
    requests_per_minute: int | None = None
    after_cancel: AfterCancel = "estimate"
    drain_seconds: float = 5.0

    def __repr__(self) -> str:
        return f"Provider({self.name!r}, dialect={self.dialect!r}, base_url={self.base_url!r})"


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A provider and model that may answer. ``encoding``: the exact tokenizer, if configured.

    ``failover``: whether it may replace a failed candidate before it. ``configured``: whether the configuration
    contains this model; otherwise the caller named it.
    """

    provider: Provider
    upstream_model: str
    encoding: str | None = None
    deadlines: DeadlineOverrides = DeadlineOverrides()
    failover: bool = True
    configured: bool = False


class _ProviderTable(msgspec.Struct, kw_only=True):
    dialect: str
    base_url: str | None = None
    key_env: str | None = None
    headers: dict[str, str] = {}
    include_usage: bool = True
    enabled: bool = True
    max_streams: Annotated[int, msgspec.Meta(ge=1)] | None = None
    requests_per_minute: Annotated[int, msgspec.Meta(ge=1)] | None = None
    after_cancel: AfterCancel | None = None
    drain_seconds: Annotated[float, msgspec.Meta(gt=0, le=60)] = 5.0


class _CandidateTable(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    model: str
    failover: bool = True


class _ModelTable(msgspec.Struct, kw_only=True):
    candidates: list[str | _CandidateTable]
    encoding: str | None = None
    connect: float | None = None
    first_token: float | None = None
    between_tokens: float | None = None
    total: float | None = None


class Registry:
    """Providers by name, and aliases of models."""

    def __init__(self, providers: Mapping[str, Provider], aliases: Mapping[str, list[Candidate]]) -> None:
        self.providers = providers
        self.aliases = aliases

    @classmethod
    def load(cls, config: Mapping[str, Any], env: Mapping[str, str]) -> "Registry":
        """Build the registry from the parsed configuration file and the environment.

        Raises:
            RegistryError: with every problem found.
        """
        problems: list[str] = []
        tables = _tables(config, "providers", problems)
        described = {name: table for name, table in tables.items() if name != SCRIPTED}
        found = (
            [_provider(name, table, env, problems) for name, table in described.items()]
            if described
            else [_conventional(name, convention, env, problems) for name, convention in _CONVENTIONS.items()]
        )
        providers = {p.name: p for p in found if p is not None}
        if _scripted_is_on(tables.get(SCRIPTED), problems):
            providers[SCRIPTED] = Provider(name=SCRIPTED, dialect=SCRIPTED)
        known = set(providers) | set(described)
        aliases = {
            name: _candidates(name, table, providers, known, problems)
            for name, table in _tables(config, "models", problems).items()
        }
        if problems:
            raise RegistryError(problems)
        return cls(providers, aliases)

    def announcement(self) -> Announcement:
        """Return the announcement of its models for delivery."""
        aliases = {
            name: [f"{c.provider.name}/{c.upstream_model}" for c in candidates]
            for name, candidates in sorted(self.aliases.items())
        }
        models = {name: list(MODELS) for name, provider in self.providers.items() if provider.dialect == "scripted"}
        return Announcement(aliases=aliases, providers=sorted(self.providers), models=models)

    def encodings(self) -> set[str]:
        """Return the encodings that the configuration names for the candidates of its aliases."""
        return {c.encoding for candidates in self.aliases.values() for c in candidates if c.encoding}

    def resolve(self, model: str) -> list[Candidate]:
        """Return the candidates for a model's name in order of trial; an alias has priority over ``provider/model``.

        Raises:
            UnknownModel: no alias or provider has this name.
        """
        if model in self.aliases:
            return self.aliases[model]
        name, _, upstream_model = model.partition("/")
        if name in self.providers and upstream_model:
            return [_direct(self.providers[name], upstream_model)]
        raise UnknownModel(model, self._hint(name))

    def _hint(self, name: str) -> str:
        options = []
        if self.aliases:
            options.append(f"one of {', '.join(sorted(self.aliases))}")
        if self.providers:
            options.append(f"<provider>/<model> with a provider out of {', '.join(sorted(self.providers))}")
        hint = "use " + ", or ".join(options) if options else "no provider is configured"
        if name in _CONVENTIONS and name not in self.providers:
            hint += f" (set {_CONVENTIONS[name].key_env} to use {name})"
        return hint


def _direct(provider: Provider, upstream_model: str) -> Candidate:
    encoding = "o200k_base" if provider.dialect == SCRIPTED else None
    return Candidate(provider=provider, upstream_model=upstream_model, encoding=encoding)


def _conventional(name: str, convention: _Convention, env: Mapping[str, str], problems: list[str]) -> Provider | None:
    key = env.get(convention.key_env, "").strip()
    address = env.get(convention.base_url_env or "", "").strip()
    if not (key or address):
        return None
    base_url = address or convention.base_url
    if fault := _fault_of(base_url):
        problems.append(f"{convention.base_url_env}: {fault}")
    secret = Secret(key) if key else None
    return Provider(name=name, dialect=name, base_url=base_url, key=secret, after_cancel=_after_cancel(name))


def _after_cancel(dialect: str) -> AfterCancel:
    return "lookup" if dialect == "openrouter" else "estimate"


def _tables(config: Mapping[str, Any], section: str, problems: list[str]) -> dict[str, Any]:
    tables = config.get(section, {})
    if isinstance(tables, dict):
        return tables
    problems.append(f"[{section}]: must be a table of tables")
    return {}


def _convert(cls: type[Any], table_name: str, table: Any, problems: list[str]) -> Any:
    if not isinstance(table, dict):
        problems.append(f"{table_name}: must be a table")
        return None
    before = len(problems)
    problems += [f"{table_name} {key}: no such setting" for key in sorted(set(table) - set(cls.__struct_fields__))]
    values = {}
    for field in msgspec.structs.fields(cls):
        if field.name not in table:
            if field.required:
                problems.append(f"{table_name} {field.name}: must be set")
            continue
        try:
            values[field.name] = msgspec.convert(table[field.name], field.type)
        except msgspec.ValidationError as error:
            problems.append(f"{table_name} {field.name}: {str(error)[0].lower()}{str(error)[1:]}")
    return cls(**values) if len(problems) == before else None


def _scripted_is_on(table: Any, problems: list[str]) -> bool:
    if table is None:
        return True
    described = _convert(_ProviderTable, f"[providers.{SCRIPTED}]", {"dialect": SCRIPTED, **table}, problems)
    return described is not None and bool(described.enabled)


def _provider(name: str, table: Any, env: Mapping[str, str], problems: list[str]) -> Provider | None:
    table_name = f"[providers.{name}]"
    if not _NAME.fullmatch(name):
        problems.append(f"{table_name}: a provider's name must be 1 to 64 letters, digits, '_', '.' and '-'")
    described: _ProviderTable | None = _convert(_ProviderTable, table_name, table, problems)
    if described is None or not described.enabled:
        return None
    if described.dialect not in DIALECTS:
        problems.append(f"{table_name} dialect: {described.dialect!r} is not one of {', '.join(DIALECTS)}")
        return None
    convention = _CONVENTIONS[described.dialect]
    base_url = described.base_url or convention.base_url
    if fault := _fault_of(base_url):
        problems.append(f"{table_name} base_url: {fault}")
    # A custom address (a local server) may need no key; the provider's official address always does.
    key_env = described.key_env or (None if described.base_url else convention.key_env)
    key = env.get(key_env, "").strip() if key_env else ""
    if key_env and not key:
        problems.append(f"{table_name} key_env: the variable {key_env} is not set")
    return Provider(
        name=name,
        dialect=described.dialect,
        base_url=base_url,
        key=Secret(key) if key else None,
        headers=described.headers,
        include_usage=described.include_usage,
        max_streams=described.max_streams,
        requests_per_minute=described.requests_per_minute,
        after_cancel=described.after_cancel or _after_cancel(described.dialect),
        drain_seconds=described.drain_seconds,
    )


def _fault_of(base_url: str) -> str | None:
    try:
        parts = urlsplit(base_url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        return "must be a URL like https://host/v1"
    if not valid:
        return "must be a URL like https://host/v1"
    if parts.username or parts.password:
        return "must not contain credentials: name the key's variable in key_env"
    return None


def _candidates(
    alias: str, table: Any, providers: Mapping[str, Provider], known: set[str], problems: list[str]
) -> list[Candidate]:
    table_name = f"[models.{alias}]"
    described: _ModelTable | None = _convert(_ModelTable, table_name, table, problems)
    if described is None:
        return []
    if not described.candidates:
        problems.append(f"{table_name} candidates: must name at least one provider/model")
    if described.encoding is not None and described.encoding not in ENCODINGS:
        problems.append(f"{table_name} encoding: {described.encoding!r} is not one of {', '.join(ENCODINGS)}")
    deadlines = {name: getattr(described, name) for name in DeadlineOverrides.__struct_fields__}
    problems += [
        f"{table_name} {name}: must be more than 0 seconds"
        for name, value in deadlines.items()
        if value is not None and value <= 0
    ]
    before = len(problems)
    candidates = []
    for listed in described.candidates:
        wanted = _CandidateTable(model=listed) if isinstance(listed, str) else listed
        address = wanted.model
        name, _, upstream_model = address.partition("/")
        if not upstream_model:
            problems.append(f"{table_name} candidates: {address!r} is not of the form provider/model")
        elif name not in known:
            problems.append(
                f"{table_name} candidates: there is no provider {name!r}; there are {', '.join(sorted(known))}"
            )
        elif name in providers:
            direct = _direct(providers[name], upstream_model)
            encoding = described.encoding or direct.encoding
            overrides = DeadlineOverrides(**deadlines)
            changes = {"encoding": encoding, "deadlines": overrides, "failover": wanted.failover, "configured": True}
            candidates.append(msgspec.structs.replace(direct, **changes))
    if described.candidates and not candidates and len(problems) == before:
        problems.append(f"{table_name} candidates: none of their providers is usable")
    return candidates

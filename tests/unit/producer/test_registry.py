"""Test the resolution of a model's name to its provider."""

import tomllib

import pytest

from services.producer.core.registry import DeadlineOverrides, Registry, RegistryError, Secret, UnknownModel

FILE = """
[providers.main]
dialect = "openai"
key_env = "MAIN_KEY"
headers = { X-Org = "o-secret" }

[providers.local]
dialect = "openai"
base_url = "http://127.0.0.1:8000/v1"
include_usage = false

[models.fast]
candidates = ["main/gpt-4o-mini", "local/org/model"]
encoding = "o200k_base"
first_token = 5
total = 90.5

[models."main/gpt-4o"]
candidates = ["local/other"]
"""
ENV = {"MAIN_KEY": "sk-main-1234567"}


def loaded(text: str = "", env: dict[str, str] | None = None) -> Registry:
    return Registry.load(tomllib.loads(text), env or {})


def resolved(registry: Registry, model: str) -> list[tuple[str, str]]:
    return [(c.provider.name, c.upstream_model) for c in registry.resolve(model)]


def test_without_a_file_the_conventional_variables_make_providers() -> None:
    registry = loaded(
        env={"OPENAI_API_KEY": "k1", "ANTHROPIC_API_KEY": "k2", "CO_API_KEY": "k3", "OPENROUTER_API_KEY": "k4"}
    )
    assert sorted(registry.providers) == ["anthropic", "cohere", "openai", "openrouter", "scripted"]
    assert registry.providers["openai"].base_url == "https://api.openai.com/v1"
    assert registry.providers["cohere"].key == Secret("k3")


def test_without_keys_only_the_scripted_provider_exists() -> None:
    assert list(loaded().providers) == ["scripted"]
    assert resolved(loaded(), "scripted/story") == [("scripted", "story")]
    assert loaded().resolve("scripted/story")[0].encoding == "o200k_base"


def test_an_address_without_a_key_is_enough_for_a_local_server() -> None:
    provider = loaded(env={"OPENAI_BASE_URL": "http://127.0.0.1:8000/v1"}).providers["openai"]
    assert (provider.base_url, provider.key) == ("http://127.0.0.1:8000/v1", None)


def test_the_first_slash_separates_provider_and_model() -> None:
    registry = loaded(env={"OPENROUTER_API_KEY": "k"})
    assert resolved(registry, "openrouter/meta-llama/llama-3.3") == [("openrouter", "meta-llama/llama-3.3")]


def test_an_alias_gives_its_candidates_in_order_with_its_settings() -> None:
    registry = loaded(FILE, ENV)
    assert resolved(registry, "fast") == [("main", "gpt-4o-mini"), ("local", "org/model")]
    first = registry.resolve("fast")[0]
    assert first.encoding == "o200k_base"
    assert first.deadlines == DeadlineOverrides(first_token=5.0, total=90.5)
    assert registry.providers["local"].include_usage is False
    assert registry.providers["local"].key is None


def test_an_alias_wins_over_a_provider_of_the_same_name() -> None:
    assert resolved(loaded(FILE, ENV), "main/gpt-4o") == [("local", "other")]


def test_a_file_with_aliases_alone_keeps_the_conventional_providers() -> None:
    registry = loaded('[models.chat]\ncandidates = ["openai/gpt-4o"]', {"OPENAI_API_KEY": "k"})
    assert resolved(registry, "chat") == [("openai", "gpt-4o")]


def test_the_scripted_provider_can_be_switched_off() -> None:
    registry = loaded("[providers.scripted]\nenabled = false", {"OPENAI_API_KEY": "k"})
    assert list(registry.providers) == ["openai"]


@pytest.mark.parametrize("model", ["", "gpt-4o", "main/", "/x", "nobody/x", "fast/x"])
def test_an_unknown_model_is_refused_with_the_known_names(model: str) -> None:
    with pytest.raises(
        UnknownModel, match=r"use one of fast, main/gpt-4o, or <provider>/<model>.* local, main, scripted"
    ):
        loaded(FILE, ENV).resolve(model)


def test_a_conventional_provider_without_its_key_names_the_variable() -> None:
    with pytest.raises(UnknownModel, match="set OPENAI_API_KEY to use openai"):
        loaded().resolve("openai/gpt-4o")


def test_all_problems_are_reported_together() -> None:
    text = """
[providers.a]
dialect = "openai"
key_env = "A_KEY"
colour = "red"
[providers.b]
dialect = "klingon"
[providers.c]
dialect = "cohere"
key_env = "C_KEY"
[providers.d]
base_url = 3
[providers.e]
dialect = "openai"
base_url = "https://user:hunter2@host/v1"
[providers."f g"]
dialect = "openai"
base_url = "nowhere"
[models.m]
candidates = ["c/x", "nobody/x", "c"]
encoding = "morse"
total = 0
[models.n]
candidates = "c/x"
"""
    with pytest.raises(RegistryError) as caught:
        loaded(text)
    assert caught.value.problems == [
        "[providers.a] colour: no such setting",
        "[providers.b] dialect: 'klingon' is not one of openai, openrouter, anthropic, cohere",
        "[providers.c] key_env: the variable C_KEY is not set",
        "[providers.d] dialect: must be set",
        "[providers.d] base_url: expected `str | null`, got `int`",
        "[providers.e] base_url: must not contain credentials: name the key's variable in key_env",
        "[providers.f g]: a provider's name must be 1 to 64 letters, digits, '_', '.' and '-'",
        "[providers.f g] base_url: must be a URL like https://host/v1",
        "[models.m] encoding: 'morse' is not one of cl100k_base, o200k_base, o200k_harmony, qwen3.5",
        "[models.m] total: must be more than 0 seconds",
        "[models.m] candidates: there is no provider 'nobody'; there are a, b, c, d, e, f g, scripted",
        "[models.m] candidates: 'c' is not of the form provider/model",
        "[models.n] candidates: expected `array`, got `str`",
    ]
    assert "hunter2" not in str(caught.value)


def test_an_alias_of_switched_off_providers_is_a_problem() -> None:
    text = '[providers.a]\ndialect = "openai"\nenabled = false\n[models.m]\ncandidates = ["a/x"]'
    with pytest.raises(RegistryError, match="none of their providers is usable"):
        loaded(text)


def test_sections_that_are_no_tables_are_problems() -> None:
    with pytest.raises(RegistryError) as caught:
        Registry.load({"providers": 3, "models": {"m": 4}}, {})
    assert caught.value.problems == ["[providers]: must be a table of tables", "[models.m]: must be a table"]


def test_keys_of_the_registry_are_hidden_in_text() -> None:
    registry = loaded(FILE, ENV)
    shown = f"{registry.providers} {registry.resolve('fast')} {registry.providers['main'].key}"
    assert "sk-main" not in shown
    assert "o-secret" not in shown
    assert registry.providers["main"].key is not None
    assert registry.providers["main"].key.reveal() == "sk-main-1234567"

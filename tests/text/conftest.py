"""The two vocabularies and the two templates that text/ is tested with."""

from typing import Any

import gguf
import pytest
import qwen_vocabulary
from template_sources import OFFICIAL_STYLE, TINY_STYLE, VECTORS

from daemon.text.template import ChatTemplate
from daemon.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def published() -> Any:
    return qwen_vocabulary.published()


@pytest.fixture(scope="session")
def qwen_metadata(published: Any) -> dict[str, Any]:
    return qwen_vocabulary.metadata(published)


@pytest.fixture(scope="session")
def qwen(qwen_metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_metadata(qwen_metadata)


@pytest.fixture(scope="session")
def tiny_metadata() -> dict[str, Any]:
    reader = gguf.GGUFReader(VECTORS / "tiny-coder-BF16.gguf")
    fields = reader.fields.items()
    return {key: field.contents() for key, field in fields if key.startswith("tokenizer.")}


@pytest.fixture(scope="session")
def tiny(tiny_metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_metadata(tiny_metadata)


@pytest.fixture(scope="session", params=["official", "tiny"])
def template(request: pytest.FixtureRequest, tiny: Tokenizer) -> ChatTemplate:
    source = OFFICIAL_STYLE if request.param == "official" else TINY_STYLE
    return ChatTemplate(source, tiny.control_tokens)


@pytest.fixture(scope="session")
def official(tiny: Tokenizer) -> ChatTemplate:
    return ChatTemplate(OFFICIAL_STYLE, tiny.control_tokens)

"""Conversations as tokens: every prompt is the one before, its answer, and what is asked next."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from kvspec.demo.texts import SCRIPTS, Script
from kvspec.errors import ContractError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Chat", "TemplateChat", "WordChat", "next_prompt", "stop_tokens"]

_MARK = "\u241e\u241f\u241e"
"""Stands where an answer will be, while the template is looked at."""


class Chat(Protocol):
    """How a conversation becomes tokens, and tokens become words."""

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """What ends an answer."""

    def opening(self, system: str, user: str) -> list[int]:
        """The first prompt."""

    def follow_up(self, user: str) -> list[int]:
        """What stands between an answer without its stop token and the next answer."""

    def text(self, token_ids: Sequence[int]) -> str:
        """Words, without what only a model reads."""


def next_prompt(chat: Chat, prompt: Sequence[int], answer: Sequence[int], user: str) -> list[int]:
    """The prompt of the next turn: all tokens so far, as they are, and what follows (DEMO-8).

    A stop token that the model said itself is not said again.
    """
    more = chat.follow_up(user)
    if answer and more and answer[-1] == more[0] and answer[-1] in chat.stop_token_ids:
        more = more[1:]
    return [*prompt, *answer, *more]


class TemplateChat:
    """By a tokenizer's chat template; without one, `System:`, `User:` and `Assistant:`."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stop_token_ids: Iterable[int]) -> None:
        self._tokenizer: Any = tokenizer
        self.stop_token_ids = frozenset(stop_token_ids)

    def opening(self, system: str, user: str) -> list[int]:
        asked = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        return self._ids(self._rendered(asked))

    def follow_up(self, user: str) -> list[int]:
        said = [
            {"role": "system", "content": "-"},
            {"role": "user", "content": "-"},
            {"role": "assistant", "content": _MARK},
            {"role": "user", "content": user},
        ]
        _, mark, after = self._rendered(said).rpartition(_MARK)
        if not mark:
            raise ContractError("DEMO-8: the chat template does not show what an assistant said")
        return self._ids(after)

    def text(self, token_ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text

    def _rendered(self, messages: list[dict[str, str]]) -> str:
        if not self._tokenizer.chat_template:
            lines = (f"{each['role'].capitalize()}: {each['content']}\n" for each in messages)
            return f"{''.join(lines)}Assistant:"
        from jinja2 import TemplateError

        try:
            return self._by_template(messages)
        except TemplateError:  # it knows no system prompt
            system, user, *rest = messages
            both = f"{system['content']}\n\n{user['content']}"
            return self._by_template([{"role": "user", "content": both}, *rest])

    def _by_template(self, messages: list[dict[str, str]]) -> str:
        text: str = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return text

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


class WordChat:
    """A vocabulary of the scripts' own words, for models without a tokenizer."""

    _MARKS = ("<end>", "<system>", "<user>", "<assistant>")

    def __init__(self, scripts: Iterable[Script] = SCRIPTS) -> None:
        texts = (text for each in scripts for text in (each.system, each.document, *each.questions))
        words = {word for text in texts for word in text.split()}
        self.words: tuple[str, ...] = (*self._MARKS, *sorted(words))
        self._number = {word: number for number, word in enumerate(self.words)}
        self.stop_token_ids = frozenset({0})

    def opening(self, system: str, user: str) -> list[int]:
        return [1, *self._ids(system), 0, 2, *self._ids(user), 0, 3]

    def follow_up(self, user: str) -> list[int]:
        return [0, 2, *self._ids(user), 0, 3]

    def text(self, token_ids: Sequence[int]) -> str:
        said = (self.words[token] for token in token_ids if token >= len(self._MARKS))
        return " ".join(said)

    def _ids(self, text: str) -> list[int]:
        return [self._number[word] for word in text.split()]


def stop_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """What the model's own settings and its tokenizer take for an end."""
    given: list[Any] = [tokenizer.eos_token_id, getattr(model.config, "eos_token_id", None)]
    settings = getattr(model, "generation_config", None)
    given.append(getattr(settings, "eos_token_id", None))
    found: set[int] = set()
    for each in given:
        if isinstance(each, int):
            found.add(each)
        elif isinstance(each, list | tuple):
            found.update(int(token) for token in each)
    return frozenset(found)

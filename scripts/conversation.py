"""A conversation with a model, in which a turn computes only the tokens that are new."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, takewhile

from lit_llama.errors import UserError
from lit_llama.generation import Sampling, next_tokens
from lit_llama.model import KVCache, LLaMA
from lit_llama.prompt import EXCHANGED, Message, attempt, encode, stop_ids
from lit_llama.tokenizer import Tokenizer

import torch


class Conversation:
    """The messages so far, and the keys and values of their tokens.

    Each turn is the model's answer to the whole conversation in its template. Of its tokens, those that the cache
    begins with are not computed again. With a template that takes a single question, each begins a new conversation.
    """

    def __init__(self, model: LLaMA, tokenizer: Tokenizer, template: str) -> None:
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.messages: list[Message] = []  # questions and answers in turn, perhaps after a system message
        self.ended = False  # whether the last answer came to its end
        self.cached: list[int] = []  # the tokens that the cache holds
        self.cache: KVCache | None = None

    def ask(self, question: str, sampling: Sampling) -> Iterator[str]:
        """Yield the answer in pieces. A reader may stop at any of them: that much of it is in the conversation."""
        if not takes_turns(self.template, self.tokenizer):
            self.messages = []
        if self.messages and not self.messages[-1].content:
            del self.messages[-2:]  # a question without an answer
        asked = [*self.messages, Message("user", question)]
        prompt = encode(self.template, asked, self.tokenizer).ids
        context = self.model.config.block_size
        if len(prompt) >= context:
            raise UserError(f"no room for an answer: the context has {context} tokens, the messages {len(prompt)}")
        n_new = min(sampling.max_new_tokens, context - len(prompt))
        tokens = self._answer(prompt, replace(sampling, max_new_tokens=n_new))
        self.messages = [*asked, Message("assistant", "")]
        for piece in self.tokenizer.stream(tokens):
            self.messages[-1] = Message("assistant", self.messages[-1].content + piece)
            yield piece

    def _answer(self, prompt: list[int], sampling: Sampling) -> Iterator[int]:
        """Yield the ids that continue the token ids of `prompt`, up to the end of the answer."""
        new = prompt[self._reuse(prompt, len(prompt) + sampling.max_new_tokens) :]
        stop, self.ended = stop_ids(self.template, self.tokenizer), False
        for tokens in next_tokens(self.model, [new], sampling, self.cache):
            self.cached += new  # not before: an answer may end at any moment, with only some of the layers filled
            new = tokens
            self.ended = new[0] in stop
            if self.ended:
                return
            yield new[0]

    def _reuse(self, prompt: list[int], length: int) -> int:
        """Cut the cache to what `prompt` begins with, its last token aside, with room for `length` tokens."""
        pairs = zip(self.cached, prompt[:-1], strict=False)
        n = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        del self.cached[n:]
        if self.cache is None or length > self.cache.room:
            smaller = chain(*self.cache.layers) if self.cache else ()
            self.cache = self.model.new_cache(1, min(max(256, 1 << length.bit_length()), self.model.config.block_size))
            with torch.inference_mode():
                for old, new in zip(smaller, chain(*self.cache.layers), strict=False):
                    new[:, :, : old.size(2)] = old
        self.cache.length = n
        return n

    def forget(self) -> None:
        """Drop what was computed, after a change of the model."""
        self.cached, self.cache = [], None

    def set_system(self, text: str) -> None:
        """What the model is told before the first question from now on, or nothing."""
        system = [Message("system", text)] if text else []
        encode(self.template, [*system, Message("user", "Hi")], self.tokenizer)  # or it does not take one
        self.messages = [*system, *(message for message in self.messages if message.role != "system")]

    def reset(self) -> None:
        """Start over, with the same system message."""
        self.messages = [message for message in self.messages if message.role == "system"]

    @property
    def is_full(self) -> bool:
        """Whether the last answer has reached the end of the model's context."""
        return len(self.cached) + 1 >= self.model.config.block_size


def takes_turns(template: str, tokenizer: Tokenizer) -> bool:
    """Whether a template takes more than one question."""
    return attempt(template, [*EXCHANGED, Message("user", "Hi")], tokenizer).ids != []

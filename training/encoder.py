"""How a model reads and writes a conversation: the one place where turns become token ids, and token ids a response.

SFT, sampling, log-probs, evaluation, reward models and chat all ask an `Encoder`, so that what is taught is what is asked.
A tokenizer with a chat template writes the prompt by it; another one reads `prompts.plain`.
"""

from __future__ import annotations

import contextlib
import datetime
import re
from collections.abc import Iterable
from functools import cached_property
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from training import prompts
from training.errors import UserError
from training.prompts import Turn, Turns
from training.response import ANSWER_CLOSE, ANSWER_OPEN, SPECIAL, THINK_CLOSE, THINK_OPEN

# A thinking block that a chat template opens at the end of a prompt.
_OPENED = re.compile(rf"{re.escape(THINK_OPEN)}\s*$")
# The date for a template that takes one or asks for one: a run that goes on tomorrow must read the same prompts.
_DAY = datetime.date(2025, 1, 1)
_TODAY = "01 Jan 2025"  # as Llama 3's template writes it
_ASKS_FOR_DATE = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<form>.*?)(?P=quote)\s*\)""")
_PROBE = "qzx"  # an answer that no chat template writes by itself
_TAGS = {THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE, SPECIAL}  # what prompts ask for, tokens or not
_SIGN = "\ue000{}\ue001"  # stands for a control token that a person spelt out, by its number
_SIGNS = re.compile(_SIGN.format(r"(\d+)"))


class Encoded(NamedTuple):
    """Token ids of a prompt, and the part of the response that the prompt already holds ("<think>\\n"; "" for none)."""

    ids: list[int]
    opening: str


class Encoder:
    """The tokenizer of a model, with everything that its folder says about how turns begin and end."""

    def __init__(self, model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase) -> None:
        """model: whose generation config may name more tokens that end a response; None: the tokenizer's alone."""
        self.model, self.tokenizer = model, tokenizer

    @cached_property
    def end_id(self) -> int | None:
        """The token that ends a turn, which SFT teaches: the one that the chat template writes, else an eos token."""
        written = self._end_of_turn()
        if written is not None:
            return written
        known = self._eos_ids()
        return known[0] if known else None

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Every token that ends a response: eos of tokenizer, config and generation config, and the end of a turn."""
        own = [] if self.end_id is None else [self.end_id]
        return tuple(sorted({*own, *self._eos_ids()}))

    @property
    def pad_id(self) -> int:
        """A token for places that nothing reads: any will do that the model has an embedding of."""
        found = self.tokenizer.pad_token_id
        rows = None if self.model is None else self.model.get_input_embeddings().num_embeddings
        usable = found is not None and (rows is None or found < rows)
        return int(found) if usable else self.end_id or 0

    @cached_property
    def positions(self) -> int | None:
        """The longest text that the model can read, in tokens; None where its config sets no limit."""
        if self.model is None:
            return None
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def prompt(self, turns: Turns) -> Encoded:
        """Token ids of everything that stands before the response, the begin-of-text token included where there is one.

        What a turn says is text: a control token spelt out in it ("<|im_end|>") ends no turn.
        """
        return self.prompts([turns])[0]

    def prompts(self, asked: Iterable[Turns]) -> list[Encoded]:
        """`prompt` of each, in a fraction of the time that they take one by one."""
        written = [self._written(turns) for turns in asked]
        whole = [text for text, spelt in written if not spelt]
        ids = iter(self.tokenizer(whole, add_special_tokens=False)["input_ids"] if whole else ())
        return [
            self._begun(text, self._shown(text, spelt) if spelt else next(ids)) for text, spelt in written
        ]

    def _written(self, turns: Turns) -> tuple[str, list[str]]:
        """The text of a prompt with signs for what is spelt out in it, and the spellings."""
        turns, spelt = self._hidden(turns)
        if not self.tokenizer.chat_template:
            return prompts.plain(turns), spelt
        return self._rendered(turns, add_generation_prompt=True), spelt

    def _begun(self, text: str, ids: list[int]) -> Encoded:
        """The prompt of a text with these token ids."""
        if not self.tokenizer.chat_template:
            bos = self.tokenizer.bos_token_id
            return Encoded(([] if bos is None else [bos]) + ids, "")
        opened = _OPENED.search(text)
        return Encoded(ids, opened.group() if opened else "")

    def response(self, text: str, opening: str = "") -> list[int]:
        """Token ids of a response behind a prompt with that `opening`; the end of the turn is the last.

        Where the prompt has opened the thinking, a response in the special-token form takes the tags, and one without thinking
        closes at once.
        """
        if opening:
            if text.count(SPECIAL) == 2 and text.startswith(SPECIAL):
                text = text.replace(SPECIAL, THINK_OPEN, 1).replace(SPECIAL, THINK_CLOSE, 1)
            if text.startswith(THINK_OPEN):
                text = text.removeprefix(THINK_OPEN)
                text = text.lstrip() if opening[-1].isspace() else text
            else:
                text = f"{THINK_CLOSE}\n\n{text}"
        return self._ids(text) + ([] if self.end_id is None else [self.end_id])

    def text(self, ids: Iterable[int], opening: str = "") -> str:
        """The whole response that `ids` (without the end of the turn) make behind a prompt with that `opening`."""
        decoded: str = self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        if opening and decoded.lstrip().startswith(THINK_CLOSE):
            return decoded.lstrip().removeprefix(THINK_CLOSE).lstrip()
        return opening + decoded

    def document(self, text: str) -> list[int]:
        """Token ids of a text of its own, as in pretraining: begin-of-text, the text, an eos token, where there are such."""
        bos, eos = self.tokenizer.bos_token_id, self._eos_ids()[:1]
        return [*([] if bos is None else [bos]), *self._ids(text), *eos]

    def note_ends(self) -> None:
        """Writes every token that ends a response into the model's generation config, so that other programs stop there too."""
        assert self.model is not None
        config = self.model.generation_config
        named = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        if set(named) == set(self.stop_ids) or not self.stop_ids:
            return
        config.eos_token_id = list(self.stop_ids)
        try:
            config.validate(strict=True)
        except (
            ValueError
        ):  # transformers saves no changed config that contradicts itself: what is not about tokens goes
            self.model.generation_config = GenerationConfig(
                bos_token_id=config.bos_token_id,
                eos_token_id=config.eos_token_id,
                pad_token_id=config.pad_token_id,
            )

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """The spelling of any control token: a special one, or one that the chat template writes."""
        written: set[int] = set()
        if self.tokenizer.chat_template:
            turns = [Turn(role, _PROBE) for role in ("user", "assistant", "user")]
            with contextlib.suppress(UserError):
                written = set(self._ids(self._rendered(turns, add_generation_prompt=True)))
        added = self.tokenizer.added_tokens_decoder.items()
        control = {each.content for number, each in added if each.special or number in written} - _TAGS
        longest_first = sorted(filter(str.strip, control), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, [*longest_first, _SIGN[0]])))

    def _hidden(self, turns: Turns) -> tuple[Turns, list[str]]:
        """The turns with a sign for every control token that is spelt out in them, and the spellings by its number."""
        spelt: list[str] = []

        def sign(match: re.Match[str]) -> str:
            spelt.append(match[0])
            return _SIGN.format(len(spelt) - 1)

        return [turn._replace(content=self._control.sub(sign, turn.content)) for turn in turns], spelt

    def _shown(self, text: str, spelt: list[str]) -> list[int]:
        """Token ids of a text with signs for what is spelt out."""
        ids: list[int] = []
        for index, part in enumerate(_SIGNS.split(text)):
            if index % 2:  # in two parts, neither of which is the token
                word = spelt[int(part)]
                ids += self._ids(word[:1]) + self._ids(word[1:])
            elif part:
                ids += self._ids(part)
        return ids

    def _rendered(self, turns: Turns, **options: Any) -> str:
        """What the chat template writes; where it takes no system turn, that text leads the first user's turn."""
        turns = _merged(turns, "instruction")
        try:
            return self._template(turns, **options)
        except TemplateError:
            if not any(turn.role == "system" for turn in turns):
                raise
            return self._template(_merged(turns, "system"), **options)

    @cached_property
    def _chat_template(self) -> str:
        """The chat template; where it asks for today's date, in the form of its literal, the one day of all runs stands."""
        return _ASKS_FOR_DATE.sub(
            lambda match: repr(_DAY.strftime(match["form"])), self.tokenizer.get_chat_template()
        )

    def _template(self, turns: Turns, **options: Any) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                [turn._asdict() for turn in turns],
                tokenize=False,
                chat_template=self._chat_template,
                date_string=_TODAY,
                **options,
            )
        except TemplateError as error:
            if any(turn.role == "system" for turn in turns):
                raise
            roles = ", ".join(turn.role for turn in turns)
            raise UserError(f"the chat template refuses the turns {roles}: {error}") from None
        return text

    def _eos_ids(self) -> list[int]:
        """The eos ids that tokenizer, config and generation config name, the tokenizer's first."""
        sources: list[Any] = [self.tokenizer.eos_token_id]
        if self.model is not None:
            sources.append(getattr(getattr(self.model, "generation_config", None), "eos_token_id", None))
            sources.append(getattr(self.model.config.get_text_config(), "eos_token_id", None))
        found: dict[int, None] = {}
        for source in sources:
            for each in source if isinstance(source, (list, tuple)) else [source]:
                if each is not None:
                    found[int(each)] = None
        return list(found)

    def _end_of_turn(self) -> int | None:
        """The special token that the chat template writes behind an assistant's turn."""
        if not self.tokenizer.chat_template:
            return None
        try:
            text = self._rendered([Turn("user", _PROBE), Turn("assistant", _PROBE)])
        except UserError:
            return None
        behind = self._ids(text.rpartition(_PROBE)[2].lstrip())
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        return behind[0] if behind and behind[0] in special else None


def _merged(turns: Turns, role: str) -> list[Turn]:
    """The turns with those of `role` put at the head of the next turn's content."""
    merged: list[Turn] = []
    before: list[str] = []
    for turn in turns:
        if turn.role == role:
            before.append(turn.content)
        else:
            merged.append(Turn(turn.role, " ".join([*before, turn.content])))
            before = []
    return merged

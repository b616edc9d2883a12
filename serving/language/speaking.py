"""From the tokens of a running sequence to what its client is told."""

from __future__ import annotations

from typing import Any

from serving.language.batch import Made, Sequence
from serving.language.choosing import Chosen
from serving.language.messages import Part, TokenLogprob
from serving.language.text import Decoder, Stops


class Speaker:
    """The text of one sequence, as it may be sent."""

    def __init__(self, sequence: Sequence, tokenizer: Any) -> None:
        self.sequence = sequence
        self._tokenizer = tokenizer
        self._decoder = Decoder(tokenizer)
        self._stops = Stops(sequence.chooser.sampling.stop)

    def say(self, made: Made) -> Part:
        """What a new token brings. A stop string ends the sequence: `finish` is set, and the caller removes it."""
        chosen, finish = made.chosen, made.finish
        # The token that ends an answer is no part of its text.
        text = "" if finish == "stop" else self._decoder.push(chosen.token)
        if finish is not None:
            text += self._decoder.flush()
        said, is_stopped = self._stops.push(text)
        if is_stopped:
            finish = "stop"
        elif finish is not None:
            said += self._stops.flush()
        logprobs = [] if chosen.logprob is None else [self._logprob(chosen, chosen.logprob)]
        return Part(self.sequence.id, 1, said, finish, logprobs)

    def _logprob(self, chosen: Chosen, logprob: float) -> TokenLogprob:
        top = [(self._name(token), value) for token, value in chosen.top]
        return TokenLogprob(self._name(chosen.token), chosen.token, logprob, top)

    def _name(self, token: int) -> str:
        name: str = self._tokenizer.decode([token])
        return name
